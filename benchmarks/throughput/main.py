"""How fast the schedules train: `python benchmarks/throughput/main.py [--quick]`.

Two stages on two cores, one thread per stage, no loader in the run. Candidates in turn within one
run: stream, in_step, sequential, plain backpropagation in one process with two threads, and each
stage alone (its forward, backward and update on recorded inputs, the other core idle). The case
"precision" has stream in float32 and bfloat16, with and without channels_last.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import (  # noqa: E402
    Stats,
    compare,
    pinned_threads,
    stats_rows,
    table,
    write_rows,
)
from benchmarks.models import balanced_cnn, small_vit  # noqa: E402
from scpl_compile import Program, compile_model  # noqa: E402
from scpl_compile.runtime import Trainer  # noqa: E402

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "balanced_cnn": (balanced_cnn, (3, 32, 32), 128, 40),
    "resnet18": (lambda: _resnet18(), (3, 64, 64), 32, 16),
    "small_vit": (small_vit, (3, 32, 32), 64, 12),
}
"""Model, input, batch, steps per timed call: filling the pipeline costs one step of each call."""


PRECISION = "precision"
_PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, channels_last": {"channels_last": True},
    "bfloat16": {"amp": "bf16"},
    "bfloat16, channels_last": {"amp": "bf16", "channels_last": True},
}


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few repeats, nothing written")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each candidate")
    parser.add_argument("--case", choices=[*CASES, PRECISION], action="append")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for name in options.case or [*CASES, PRECISION]:
        run = run_precision if name == PRECISION else partial(run_case, name)
        rows += run(repeats=2 if options.quick else options.repeats)
    table(rows)
    if not options.quick:
        write_rows(Path(__file__).with_name("results.csv"), rows)


def run_case(name: str, repeats: int) -> list[dict[str, object]]:
    """The rows of one model: milliseconds per step of every candidate, and the ratios."""
    build, shape, batch_size, num_steps = CASES[name]
    torch.manual_seed(0)
    inputs = torch.randn(batch_size, *shape)
    labels = torch.randint(10, (batch_size,))
    program = compile_model(
        build(), inputs, num_classes=10, num_stages=2, threads_per_stage=1, devices=("cpu", "cpu")
    )
    with candidates(program, inputs, labels, num_steps) as runs:
        stats = {
            key: one.per_step(num_steps)
            for key, one in compare(runs, repeats=repeats, warmup=1).items()
        }
    config = {"batch": batch_size, "input": list(shape), "steps_per_call": num_steps, "stages": 2}
    common: dict[str, Any] = {
        "benchmark": "throughput", "case": name, "threads": 1, "device": "cpu", "config": config,
    }  # fmt: skip
    return [*stats_rows(stats, **common), *_ratios(stats, common)]


def run_precision(repeats: int) -> list[dict[str, object]]:
    """The rows of stream on the balanced CNN in every precision and memory format."""
    build, shape, batch_size, num_steps = CASES["balanced_cnn"]
    torch.manual_seed(0)
    inputs, labels = torch.randn(batch_size, *shape), torch.randint(10, (batch_size,))
    program = compile_model(
        build(), inputs, num_classes=10, num_stages=2, threads_per_stage=1, devices=("cpu", "cpu")
    )
    with ExitStack() as stack:
        runs = {}
        for name, options in _PRECISIONS.items():
            trainer = program.trainer(threads_per_stage=1, **options)
            stack.callback(trainer.close)
            runs[name] = partial(_train, trainer, inputs, labels, num_steps)
        found = compare(runs, repeats=repeats, warmup=1)
    stats = {name: one.per_step(num_steps) for name, one in found.items()}
    config = {"batch": batch_size, "input": list(shape), "steps_per_call": num_steps, "stages": 2}
    common: dict[str, Any] = {
        "benchmark": "throughput", "case": "balanced_cnn, precision of stream", "threads": 1,
        "device": "cpu", "config": config,
    }  # fmt: skip
    first = stats["float32"].median_ms
    shared = common | {"metric": "ratio of medians", "unit": "x", "n": stats["float32"].n}
    ratios = [
        shared | {"candidate": f"{name} over float32", "value": first / one.median_ms}
        for name, one in stats.items()
        if name != "float32"
    ]
    return [*stats_rows(stats, **common), *ratios]


def _train(trainer: Trainer, inputs: Tensor, labels: Tensor, num_steps: int) -> None:
    for _ in range(num_steps):
        trainer.step(inputs, labels)
    trainer.drain()
    trainer.losses()


def _ratios(stats: dict[str, Stats], common: dict[str, Any]) -> list[dict[str, object]]:
    stream = stats["stream"].median_ms
    slower = max(stats["stage 0 alone"].median_ms, stats["stage 1 alone"].median_ms)
    ratios = {
        "stream over sequential": stats["sequential"].median_ms / stream,
        "stream over in_step": stats["in_step"].median_ms / stream,
        "stream over backpropagation": stats["backpropagation, 2 threads"].median_ms / stream,
        "stream's share of the slower stage's rate": slower / stream,
    }
    shared = common | {"metric": "ratio of medians", "unit": "x", "n": stats["stream"].n}
    return [shared | {"candidate": key, "value": value} for key, value in ratios.items()]


@contextmanager
def candidates(
    program: Program, inputs: Tensor, labels: Tensor, num_steps: int
) -> Iterator[dict[str, Callable[[], object]]]:
    """num_steps training steps of every candidate, each on models of its own."""
    trainers = {
        schedule: program.trainer(schedule=schedule, threads_per_stage=1)
        for schedule in ("stream", "in_step", "sequential")
    }

    runs: dict[str, Callable[[], object]] = {
        schedule: partial(_train, trainer, inputs, labels, num_steps)
        for schedule, trainer in trainers.items()
    }
    runs["backpropagation, 2 threads"] = _backpropagation(program.model, inputs, labels, num_steps)
    for k in range(program.plan.num_stages):
        runs[f"stage {k} alone"] = _alone(program, k, inputs, labels, num_steps)
    try:
        yield runs
    finally:
        for trainer in trainers.values():
            trainer.close()


def _backpropagation(
    model: nn.Module, inputs: Tensor, labels: Tensor, num_steps: int
) -> Callable[[], object]:
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run() -> None:
        with pinned_threads(2):
            for _ in range(num_steps):
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    return run


def _alone(
    program: Program, k: int, inputs: Tensor, labels: Tensor, num_steps: int
) -> Callable[[], object]:
    """Stage k on recorded inputs, in this thread."""
    trainer = program.trainer(schedule="sequential", threads_per_stage=1)
    values = {program.plan.inputs[0].name: inputs}
    for stage in trainer._stages[:k]:
        stage.receive(0, values, labels, None)
        stage.forward(0)
        values, _, _ = stage.outgoing(0)
    stage = trainer._stages[k]
    trainer.close()

    def run() -> None:
        with pinned_threads(1):
            for step in range(num_steps):
                stage.receive(step, values, labels, None)
                stage.forward(step)
                stage.backward(step)
                stage.update(step)
            stage.take_losses()

    return run


if __name__ == "__main__":
    main()
