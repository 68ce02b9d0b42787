"""Whether the emitted programs of well-known models train: `python benchmarks/programs/main.py`.

Every model is compiled at K = 2 and K = 4, verified, and its program run from another directory in
a process of its own: 20 steps on one fixed batch with Adam at 1e-3. Reported: in how many stages
the mean loss of the last 5 steps is below that of the first 5, how many parameters moved, and how
far the costliest stage lies above the best cut between the model's own leaf modules.
tests/test_models.py checks the same, with those runs that fit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import pinned_threads, table, write_rows  # noqa: E402
from scpl_compile import Program, compile_model  # noqa: E402
from scpl_compile.capture import capture  # noqa: E402
from scpl_compile.cost import DEVICES, node_costs  # noqa: E402
from scpl_compile.inputs import forward_parameters  # noqa: E402
from scpl_compile.ir import Scalar  # noqa: E402
from scpl_compile.methods import make_method  # noqa: E402
from scpl_compile.methods.cuts import cut_problem  # noqa: E402
from scpl_compile.partition import PartitionProblem  # noqa: E402
from scpl_compile.runtime.checkpoint import load_tensors  # noqa: E402
from scpl_compile.sources import load_model, parse_inputs  # noqa: E402

__all__ = ["MODELS", "Model", "Trained", "best_bottleneck_us", "compile_program", "cut_problem_of",
           "train_program"]  # fmt: skip

BATCH_SIZE, STEPS, NUM_CLASSES = 8, 20, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Where a model comes from and what it takes."""

    spec: str
    inputs: str = "3x32x32"
    config: Mapping[str, Scalar] = field(default_factory=dict)


def _torchvision(*names: str) -> dict[str, Model]:
    return {name: Model(spec=f"torchvision:{name}") for name in names}


def _text(*names: str) -> dict[str, Model]:
    inputs = "ids:int64:16<1000,mask:int64:16<2"
    return {name: Model(spec=f"benchmarks.models:{name}", inputs=inputs) for name in names}


MODELS: dict[str, Model] = {
    **_torchvision("resnet18", "resnet50", "vgg11_bn", "vgg16_bn", "mobilenet_v3_small"),
    **_torchvision("efficientnet_b0", "densenet121", "convnext_tiny"),
    "vit_b_16": Model(spec="torchvision:vit_b_16", config={"image_size": 32}),
    **_torchvision("swin_t", "regnet_y_400mf", "shufflenet_v2_x1_0"),
    **_text("text_lstm", "text_transformer"),
}

# ---------------------------------------------------------------------- compile and train


def compile_program(name: str, num_stages: int, out: Path) -> Program:
    """The verified program of MODELS[name] in `out`, from the same weights every time."""
    model = MODELS[name]
    torch.manual_seed(0)
    with pinned_threads(1):
        return compile_model(
            model.spec, model.inputs, num_classes=NUM_CLASSES, num_stages=num_stages,
            config=model.config, batch_size=BATCH_SIZE, threads_per_stage=1, out=out,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a run left: for every stage its loss in each step, and the parameters by fate."""

    losses: tuple[tuple[float, ...], ...]
    moved: tuple[str, ...]
    still: tuple[str, ...]

    @property
    def first_and_last(self) -> tuple[tuple[float, float], ...]:
        """For every stage the mean loss of the first 5 and of the last 5 steps."""
        return tuple((float(np.mean(v[:5])), float(np.mean(v[-5:]))) for v in self.losses)


def train_program(program: Program, cwd: Path) -> Trained:
    """Run the program's train.py in a new process, from directory `cwd`, on one fixed batch.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    directory = program.directory
    options = {"data": f"random:{BATCH_SIZE}", "batch-size": BATCH_SIZE, "steps": STEPS,
               "optimizer": "adam", "lr": 1e-3, "lr-schedule": "constant"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(directory / "train.py"), *(f"--{k}={v}" for k, v in options.items())],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"train.py exited with {done.returncode}: {done.stderr[-2000:]}")
    before, _ = load_tensors(directory / "weights.safetensors")
    after, _ = load_tensors(directory / "run" / "final.safetensors")
    names = [name for name, _ in program.model.named_parameters()]
    still = tuple(name for name in names if torch.equal(before[name], after[name]))
    return Trained(
        losses=_losses(directory / "run" / "metrics.jsonl", program.plan.num_stages),
        moved=tuple(name for name in names if name not in still),
        still=still,
    )


def _losses(path: Path, num_stages: int) -> tuple[tuple[float, ...], ...]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by_stage: list[dict[int, float]] = [{} for _ in range(num_stages)]
    for row in rows:
        if "stage" in row:
            by_stage[row["stage"]][row["step"]] = sum(row["losses"].values())
    return tuple(tuple(losses[step] for step in sorted(losses)) for losses in by_stage)


# ---------------------------------------------------------------------- the best cut


def cut_problem_of(name: str) -> PartitionProblem:
    """What a cut at every place between two leaf modules of MODELS[name] would cost."""
    model = MODELS[name]
    module, _ = load_model(model.spec, num_classes=NUM_CLASSES, config=model.config)
    inputs = parse_inputs(model.inputs, forward_parameters(module))
    fine = capture(module, inputs, batch_size=BATCH_SIZE)
    method = make_method("scpl")
    return cut_problem(fine, node_costs(fine), method, NUM_CLASSES, DEVICES["cpu"])


def best_bottleneck_us(problem: PartitionProblem, num_stages: int) -> float:
    """The least cost of the costliest of `num_stages` stages, over all places that allow a cut.

    The plainest dynamic programme, written without a look at partition/: best[e] for k stages is
    the least over b of max(best[b] for k - 1 stages, cost of the nodes after b up to e).
    """
    assert not any(group for _, group in problem.graph.nodes(data="group")), "no tied weights"
    cost_before = np.array([0.0, *accumulate(problem.cost_us)])
    places = [0, *(i + 1 for i, ok in enumerate(problem.allowed) if ok), len(problem.names)]
    head_us = [0.0, *(problem.head_us[place - 1] for place in places[1:-1]), problem.tail_us]
    nodes_us = cost_before[places]
    best = np.full(len(places), np.inf)
    best[0] = 0.0
    for _ in range(num_stages):
        longer = np.full(len(places), np.inf)
        for end in range(1, len(places)):
            stage_us = nodes_us[end] - nodes_us[:end]
            works = np.where(stage_us > 0, stage_us + head_us[end], np.inf)
            longer[end] = np.maximum(best[:end], works).min()
        best = longer
    return float(best[-1])


# ---------------------------------------------------------------------- the benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="K = 2 only, nothing written")
    parser.add_argument("--model", choices=MODELS, action="append")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for name in options.model or MODELS:
        problem = cut_problem_of(name)
        for num_stages in (2,) if options.quick else (2, 4):
            rows += run_model(name, num_stages, problem)
    table(rows)
    if not options.quick:
        write_rows(Path(__file__).with_name("results.csv"), rows)


def run_model(name: str, num_stages: int, problem: PartitionProblem) -> Sequence[dict[str, object]]:
    """The rows of one model at one number of stages."""
    with tempfile.TemporaryDirectory() as folder:
        program = compile_program(name, num_stages, Path(folder, name))
        trained = train_program(program, Path(folder))
    best_us = best_bottleneck_us(problem, num_stages)
    fell = sum(last < first for first, last in trained.first_and_last)
    values = {
        ("stages whose loss fell", "stages"): fell,
        ("parameters that moved", "tensors"): len(trained.moved),
        ("parameters that did not move", "tensors"): len(trained.still),
        ("costliest stage over the best cut", "x"): program.plan.bottleneck_us / best_us,
    }
    common: dict[str, Any] = {
        "benchmark": "programs", "case": f"{name}, {num_stages} stages", "threads": 1,
        "candidate": "emitted program", "device": "cpu", "n": 1,
        "config": {"batch": BATCH_SIZE, "steps": STEPS, "input": MODELS[name].inputs},
    }  # fmt: skip
    return [
        common | {"metric": metric, "unit": unit, "value": value}
        for (metric, unit), value in values.items()
    ]


if __name__ == "__main__":
    main()
