"""The contrastive loss beside its alternatives: `python benchmarks/kernels/main.py [--quick]`.

Four claims on CPU: at large batches, at a small one, inside a training step, and its error over the
grid of grid.py, by chunks and by the Triton kernels in their interpreter. Candidates run in turn in
one process; a ratio is of medians of one run. torch.compile needs a C++ compiler.
"""

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torchvision.models import resnet18  # noqa: E402

from benchmarks.measure import (  # noqa: E402
    Stats,
    compare,
    pinned_threads,
    stats_rows,
    table,
    write_rows,
)
from scpl_compile import Program, compile_model  # noqa: E402
from scpl_compile.bench import candidates, memory_note  # noqa: E402
from scpl_compile.kernels import supcon_loss  # noqa: E402

CASES = ((256, 128, 1), (1024, 128, 1), (4096, 128, 1), (4096, 128, 2), (16384, 128, 2))
STEP_BATCH = 256
Row = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    options = parser.parse_args()
    # torch.compile's threads and pytorch-metric-learning's first import have warnings of their own
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for batch, dim, threads in CASES[:2] if options.quick else CASES:
        rows += run_size(batch, dim, threads, compiled=not options.quick)
    rows += run_step(repeats=1 if options.quick else 5)
    if not options.quick:
        rows += [row for impl in ("chunked", "triton") for row in run_grid(impl)]
    table(rows)
    if not options.quick:
        write_rows(Path(__file__).with_name("results.csv"), rows)


def run_size(batch: int, dim: int, threads: int, compiled: bool) -> list[Row]:
    """Forward and backward of every candidate that fits, at one size, in float32."""
    features = torch.randn(batch, dim, requires_grad=True)
    labels = torch.randint(0, 100, (batch,))
    case = f"B={batch} D={dim}, {threads} thread{'s' * (threads > 1)}"
    shared: dict[str, Any] = {"case": case, "benchmark": "kernels", "threads": threads}
    shared["device"] = "cpu"
    runs, rows = {}, []
    for name, loss in candidates(compiled).items():
        if note := memory_note(name, batch, "cpu"):
            rows.append(shared | {"candidate": name, "metric": "forward and backward"})
            rows[-1]["note"] = note
        else:
            runs[name] = partial(forward_and_backward, loss, features, labels)
    repeats = 300 if batch <= 1024 else 10 if batch <= 4096 else 3
    with pinned_threads(threads):
        stats = compare(runs, repeats=repeats, warmup=3 if batch <= 4096 else 1)
    rows += stats_rows(stats, metric="forward and backward", **shared)
    return rows + [shared | row for row in ratios(stats)]


def ratios(stats: dict[str, Stats]) -> list[Row]:
    """How many times as long as ours each other candidate takes."""
    ours = stats["fused"].median_ms
    return [
        {"candidate": name, "metric": "times fused", "unit": "x", "value": one.median_ms / ours,
         "n": one.n, "note": one.note}
        for name, one in stats.items()
        if name != "fused"
    ]  # fmt: skip


def forward_and_backward(
    loss: Callable[[Tensor, Tensor], Tensor], features: Tensor, labels: Tensor
) -> None:
    features.grad = None
    loss(features, labels).backward()


def run_step(repeats: int) -> list[Row]:
    """The loss of the first of two stages of ResNet-18, and that stage's whole training step."""
    torch.manual_seed(0)
    images, labels = torch.randn(STEP_BATCH, 3, 64, 64), torch.randint(10, (STEP_BATCH,))
    program = compile_model(
        resnet18(num_classes=10), images[:16], num_classes=10, num_stages=2, threads_per_stage=1
    )
    width = program.plan.stages[0].losses[0].options["out"]
    features = torch.randn(STEP_BATCH, int(width), requires_grad=True)
    runs = {
        "stage 0": first_stage(program, images, labels),
        "its loss": partial(forward_and_backward, supcon_loss, features, labels),
    }
    with pinned_threads(1):
        stats = compare(runs, repeats=repeats, warmup=1)
    shared: dict[str, Any] = {"benchmark": "kernels", "threads": 1, "device": "cpu"}
    shared["case"] = f"resnet18, 3x64x64, 2 stages, B={STEP_BATCH} D={width}, 1 thread"
    share = 100 * stats["its loss"].median_ms / stats["stage 0"].median_ms
    cell = {"candidate": "its loss", "metric": "share of the stage's step", "unit": "%"}
    rows = stats_rows(stats, metric="forward, backward, update", **shared)
    return [*rows, shared | cell | {"value": share, "note": stats["its loss"].note}]


def first_stage(program: Program, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One training step of stage 0, in this thread."""
    trainer = program.trainer(schedule="sequential", threads_per_stage=1)
    stage, values = trainer._stages[0], {program.plan.inputs[0].name: images}
    trainer.close()

    def run() -> None:
        stage.receive(0, values, labels, None)
        stage.forward(0)
        stage.backward(0)
        stage.update(0)
        stage.take_losses()

    return run


def run_grid(impl: str) -> list[Row]:
    """How many cases of grid.py fail, in a process of its own: Triton's interpreter wants one."""
    variables = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("grid.py")), impl],
        env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = (done.stdout.splitlines() or [done.stderr[-500:]])[-1]
    words = last.split()
    if len(words) != 4 or not words[0].isdigit():
        raise RuntimeError(f"grid.py {impl} did not finish: {last}")
    return [
        {"benchmark": "kernels", "case": "grid of grid.py", "candidate": impl, "threads": 1,
         "device": "cpu", "metric": metric, "unit": "cases", "value": int(value)}
        for metric, value in (("checked", words[0]), ("beyond the triangle rule", words[2]))
    ]  # fmt: skip


if __name__ == "__main__":
    main()
