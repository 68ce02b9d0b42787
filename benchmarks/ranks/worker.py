"""One of two ranks that train the same programs by every schedule in turn: started by main.py.

Both ranks run the same candidates in the same order, so that every call of one is a call of both.
Each is pinned to a core of its own; what belongs to one process (backpropagation with two threads,
threads instead of ranks) runs on rank 0 with both cores while rank 1 waits.
"""

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

RANK = int(os.environ["RANK"])
CORES = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, {CORES[RANK % len(CORES)]})  # before torch makes its threads

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.measure import compare, pinned_threads  # noqa: E402
from scpl_compile.runtime.allocator import keep_freed_memory  # noqa: E402
from scpl_compile.runtime.program import load_stages, read_plan  # noqa: E402
from scpl_compile.runtime.rank_trainer import RankTrainer  # noqa: E402
from scpl_compile.runtime.ranks import join  # noqa: E402
from scpl_compile.runtime.schedules import stage_columns  # noqa: E402
from scpl_compile.sources import example_inputs  # noqa: E402

Run = Callable[[], object]
MICROBATCHES = 8


class Bench:
    """The candidates of one case. scpl, bp: program directories. num_steps: of each timed call.

    options: of every trainer on ranks.
    """

    def __init__(
        self, scpl: Path, bp: Path, batch_size: int, num_steps: int, options: dict[str, Any]
    ) -> None:
        self.programs = {"scpl": scpl, "bp": bp}
        self.options = options
        self.num_steps = num_steps
        self.plan = read_plan(scpl)
        torch.manual_seed(0)
        names = [spec.name for spec in self.plan.inputs]
        self.values = dict(zip(names, example_inputs(self.plan.inputs, batch_size), strict=True))
        self.labels = torch.randint(self.plan.num_classes, (batch_size,))

    def on_ranks(self, schedule: str) -> Run:
        """num_steps training steps over both ranks."""
        directory = self.programs["scpl" if schedule in ("stream", "in_step") else "bp"]
        plan = read_plan(directory)
        ranks = join(stage_columns(schedule, plan.num_stages), ("cpu",), plan.digest)
        build = load_stages(directory, plan).build_trainer
        values, labels = self.values, self.labels
        if ranks.num_replicas > 1:  # each its share of the batch
            values = {name: value.chunk(2)[ranks.replica] for name, value in values.items()}
            labels = labels.chunk(2)[ranks.replica]
        trainer: RankTrainer = build(
            ranks=ranks,
            schedule=schedule,
            threads_per_stage=1,
            microbatches=MICROBATCHES,
            batch_size=len(labels),
            **self.options,
        )

        def run() -> None:
            with pinned_threads(1):
                for _ in range(self.num_steps):
                    trainer.step(values, labels)
                trainer.drain()
                trainer.take_losses()

        return run

    def alone(self, k: int) -> Run:
        """Stage k on recorded inputs, on rank k's core; the other rank waits."""
        return _only(k, self._recorded(k))

    def both(self) -> Run:
        """Each rank its stage on recorded inputs at the same time; nothing is sent."""
        return _only(RANK, self._recorded(RANK))

    def _recorded(self, k: int) -> Run:
        stages = load_stages(self.programs["scpl"], self.plan)
        trainer = stages.build_trainer(schedule="sequential", threads_per_stage=1)
        trainer.close()
        values: dict[str, Tensor] = dict(self.values)
        for stage in trainer._stages[:k]:
            stage.receive(0, values, self.labels, None)
            stage.forward(0)
            values, _, _ = stage.outgoing(0)
        stage = trainer._stages[k]

        def run() -> None:
            with pinned_threads(1):
                for step in range(self.num_steps):
                    stage.receive(step, values, self.labels, None)
                    stage.forward(step)
                    stage.backward(step)
                    stage.update(step)
                stage.take_losses()

        return run

    def threads(self, schedule: str) -> Run:
        """num_steps steps of the engine of one process, both cores."""
        if RANK != 0:
            return _only(0, lambda: None)
        with _BothCores():
            stages = load_stages(self.programs["scpl"], self.plan)
            trainer = stages.build_trainer(schedule=schedule, threads_per_stage=1)

        def run() -> None:
            with _BothCores():
                for _ in range(self.num_steps):
                    trainer.step(self.values, self.labels)
                trainer.drain()
                trainer.take_losses()

        return _only(0, run)

    def whole(self) -> Run:
        """Backpropagation of the unsplit model in one process with two threads."""
        if RANK != 0:
            return _only(0, lambda: None)
        stages = load_stages(self.programs["scpl"], self.plan)
        trainer = stages.build_trainer(schedule="sequential")
        trainer.close()
        model = copy.deepcopy(trainer.model).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        inputs = tuple(self.values.values())

        def run() -> None:
            with _BothCores(), pinned_threads(2):
                for _ in range(self.num_steps):
                    F.cross_entropy(model(*inputs), self.labels).backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

        return _only(0, run)

    def candidates(self, names: list[str]) -> dict[str, Run]:
        """The named ones, in this order."""
        makers: dict[str, Callable[[], Run]] = {
            **{name: lambda name=name: self.on_ranks(name)  # type: ignore[misc]
               for name in ("stream", "in_step", "bp", "gpipe", "1f1b", "zb", "ddp")},
            "stage 0 alone": lambda: self.alone(0),
            "stage 1 alone": lambda: self.alone(1),
            "both stages, nothing sent": self.both,
            "threads: stream": lambda: self.threads("stream"),
            "one process: sequential": lambda: self.threads("sequential"),
            "one process: bp, 2 threads": self.whole,
        }  # fmt: skip
        return {name: makers[name]() for name in names}


class _BothCores:
    """What starts inside, and this thread, may use all cores."""

    def __enter__(self) -> None:
        os.sched_setaffinity(0, CORES)

    def __exit__(self, *exception: object) -> None:
        os.sched_setaffinity(0, {CORES[RANK % len(CORES)]})


def _only(rank: int, run: Run) -> Run:
    """`run` on one rank, between two meetings of both."""

    def together() -> None:
        dist.barrier()
        if rank == RANK:
            run()
        dist.barrier()

    return together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scpl", type=Path, required=True)
    parser.add_argument("--bp", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--candidates", required=True, help="names, separated by ;")
    parser.add_argument("--trainer", type=json.loads, default={}, help="options, as JSON")
    parser.add_argument("--answer", type=Path, required=True)
    options = parser.parse_args()
    keep_freed_memory()  # as every emitted program does
    torch.set_num_threads(1)
    names = options.candidates.split(";")
    stage_names = [
        name for name in names if not name.startswith(("stage", "both", "one", "threads"))
    ]
    bench = Bench(options.scpl, options.bp, options.batch_size, options.steps, options.trainer)
    # The process group first: what waits for the other rank needs it.
    candidates = bench.candidates(stage_names + [n for n in names if n not in stage_names])
    stats = compare(candidates, repeats=options.repeats, warmup=1)
    if RANK == 0:
        rows = {name: asdict(stats[name]) for name in names}
        options.answer.write_text(json.dumps(rows))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # every trainer has threads and connections of its own; nothing is left to save


if __name__ == "__main__":
    main()
