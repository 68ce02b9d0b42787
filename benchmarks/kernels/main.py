"""The contrastive loss beside its alternatives: `python benchmarks/kernels/main.py [--quick]`.

Three claims on CPU: at a large batch, at a small one, and inside a training step. Candidates run in
turn in one process; a ratio is of medians of one run. torch.compile needs a C++ compiler.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torchvision  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.measure import (  # noqa: E402
    compare,
    pinned_threads,
    stats_rows,
    table,
    write_rows,
)
from scpl_compile.bench import candidates  # noqa: E402
from scpl_compile.kernels import supcon_loss  # noqa: E402

CASES = ((256, 128, 1), (1024, 128, 1), (4096, 128, 1), (4096, 128, 2), (16384, 128, 2))
STEP_BATCH, STEP_DIM = 256, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for batch, dim, threads in CASES[:2] if options.quick else CASES:
        rows += run_size(batch, dim, threads, compiled=not options.quick)
    if not options.quick:
        rows += run_step()
    table(rows)
    if not options.quick:
        write_rows(Path(__file__).with_name("results.csv"), rows)


def run_size(batch: int, dim: int, threads: int, compiled: bool) -> list[dict[str, object]]:
    """Forward and backward of every candidate at one size, in float32."""
    features = torch.randn(batch, dim, requires_grad=True)
    labels = torch.randint(0, 100, (batch,))
    runs = {
        name: partial(forward_and_backward, loss, features, labels)
        for name, loss in candidates(compiled).items()
    }
    repeats = 100 if batch <= 1024 else 10 if batch <= 4096 else 3
    with pinned_threads(threads):
        stats = compare(runs, repeats=repeats, warmup=3 if batch <= 4096 else 1)
    case = f"B={batch} D={dim}, {threads} thread{'s' * (threads > 1)}"
    shared = {"benchmark": "kernels", "case": case, "threads": threads, "device": "cpu"}
    rows = stats_rows(stats, metric="forward and backward", **shared)
    ours = stats["fused"].median_ms
    for name, one in stats.items():
        if name != "fused":
            ratio = {"candidate": name, "metric": "times fused", "value": one.median_ms / ours}
            rows.append(shared | ratio | {"note": one.note})
    return rows


def forward_and_backward(
    loss: Callable[[Tensor, Tensor], Tensor], features: Tensor, labels: Tensor
) -> None:
    features.grad = None
    loss(features, labels).backward()


def run_step() -> list[dict[str, object]]:
    """The loss beside the last stage of ResNet-18: its share of the stage's time."""
    stage = torchvision.models.resnet18(weights=None).layer4
    images = torch.randn(STEP_BATCH, 256, 14, 14)
    features = torch.randn(STEP_BATCH, STEP_DIM, requires_grad=True)
    labels = torch.randint(0, 100, (STEP_BATCH,))
    runs = {
        "stage": lambda: stage(images).sum().backward(),
        "loss": partial(forward_and_backward, supcon_loss, features, labels),
    }
    with pinned_threads(1):
        stats = compare(runs, repeats=5, warmup=1)
    shared = {"benchmark": "kernels", "case": f"layer4 of resnet18, B={STEP_BATCH}, 1 thread"}
    shared |= {"threads": 1, "device": "cpu"}
    share = stats["loss"].median_ms / stats["stage"].median_ms
    cell = {"candidate": "loss", "metric": "share of the stage", "value": share}
    rows = stats_rows(stats, metric="forward and backward", **shared)
    return [*rows, shared | cell | {"note": stats["loss"].note}]


if __name__ == "__main__":
    main()
