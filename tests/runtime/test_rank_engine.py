"""Stages on ranks compute what they compute in one process, bit for bit.

Compared is all that a stage owns (parameters, both kinds of buffers, optimizer state, random state)
and the losses of every step. Beside rank 0 nobody gets inputs or labels: the ranks there get
tensors without values, and other labels.
"""

import pickle
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from processes import start, wait_all
from scpl_compile import compile_model
from scpl_compile.actions import Action, step_kinds
from scpl_compile.inputs import example_inputs
from scpl_compile.runtime import wire
from scpl_compile.runtime.engine import Event
from scpl_compile.runtime.program import load_stages, read_plan
from scpl_compile.runtime.ranks import Ranks, join
from scpl_compile.runtime.schedules import stage_columns
from scpl_compile.runtime.stage_step import StageStep
from scpl_compile.runtime.trainer import Trainer
from stage_nets import differences, outcome

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parents[2]
TEXT = "ids:int64:6<50,mask:int64:6<2"
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "small_net": ("benchmarks/exactness/main.py:small_net", "4x8", {}),
    "lstm": ("benchmarks/models.py:text_lstm", TEXT, {"config": {"vocabulary": 50, "width": 16}}),
    "text": (
        "tests/runtime/pipelined_nets.py:Text", "ids:int64:5<11,mask:int64:5<2", {"num_classes": 3}
    ),
    "several": ("tests/small_nets.py:UNet", "3x16x16", {"task": "multi-label"}),
    "unet": ("tests/small_nets.py:UNet", "3x16x16", {}),
    "unused": ("tests/small_nets.py:Unused", "8", {}),
}  # fmt: skip
"""Batch norm, dropout of every kind, a buffer that no file has; several tensors and integers over
a cut; skips over a cut, also with several labels per sample; a parameter that nobody uses."""

SIZES = (6, 6, 6, 3, 6, 6, 2, 2, 3, 6, 6, 6, 6, 6, 6, 6, 6, 6, 4, 6)
"""Of the batches: smaller ones in between, and sizes that come back."""


@dataclass(frozen=True)
class Case:
    """A run: views: inputs per label; lengths: of the first dimension of each batch's inputs;
    large: bytes from which a tensor is sent from where it lies, where not as in a program.
    """

    model: str
    num_stages: int
    schedule: str
    views: int = 1
    lengths: tuple[int, ...] = ()
    large: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        extra = {"views": self.views} if self.views > 1 else {}
        extra |= {"lengths": self.lengths} if self.lengths else {}
        extra |= {"large": self.large} if self.large else {}
        told = [f"{name}={value}" for name, value in {**extra, **self.options}.items()]
        return ", ".join([self.model, str(self.num_stages), self.schedule, *told])

    @property
    def method(self) -> str:
        return "bp" if self.schedule == "bp" else "scpl"


CASES = [
    *(Case("small_net", k, s) for k in (2, 3, 4) for s in ("stream", "in_step", "sequential")),
    *(Case("small_net", k, "bp") for k in (2, 3, 4)),
    *(Case("lstm", 2, s, lengths=(6, 4, 6, 9)) for s in ("stream", "bp")),
    Case("lstm", 3, "stream"),
    *(Case("text", 3, s) for s in ("stream", "bp")),
    Case("unet", 3, "stream"),
    Case("unused", 2, "stream"),
    *(Case("several", 2, s, views=v) for s, v in (("stream", 2), ("in_step", 1), ("bp", 2))),
    Case("several", 3, "stream", large=1),
    *(Case("small_net", 3, s, large=64) for s in ("stream", "bp")),
    *(Case("lstm", 3, s, large=1) for s in ("stream", "bp")),
    *(Case("unet", 3, s, large=1) for s in ("stream", "bp")),
    Case("text", 3, "stream", large=1),
    Case("small_net", 2, "stream", views=2),
    Case("small_net", 3, "bp", views=2),
    *(Case("small_net", 3, s, options={"wire_dtype": "bfloat16"}) for s in ("stream", "bp")),
    Case("lstm", 2, "stream", options={"wire_dtype": "float16"}),
    Case("lstm", 2, "stream", options={"amp": "bf16", "clip_norm": 0.1, "accumulate": 2}),
    Case("unet", 2, "stream", options={"channels_last": True, "optimizer": "sgd"}),
]


def batches(case: Case, directory: Path, *, hidden: bool) -> list[tuple[Any, Tensor]]:
    """Inputs and labels of every step; hidden: as a rank gets them that must not need them."""
    plan = read_plan(directory)
    found = []
    for step, size in enumerate(SIZES):
        inputs = list(example_inputs(plan.inputs, case.views * size, seed=step))
        if case.lengths:
            length = case.lengths[step % len(case.lengths)]
            draws = torch.Generator().manual_seed(step)
            shape = (len(inputs[0]), length)
            inputs = [torch.randint(1, 50, shape, generator=draws), torch.ones(shape).long()]
        labels = torch.arange(size) % plan.num_classes
        if plan.task == "multi-label":
            labels = (torch.eye(4)[labels] + torch.eye(4)[labels // 2]).bool()
        if hidden:
            inputs = [torch.empty_like(value, device="meta") for value in inputs]
            labels = labels.flip(0)
        found.append((inputs, labels))
    return found


def make_trainer(case: Case, directory: Path, **options: Any) -> Trainer:
    stages = load_stages(directory, read_plan(directory))
    trainer: Trainer = stages.build_trainer(
        schedule=case.schedule, record_events=True, **case.options, **options
    )
    return trainer


def run(case: Case, directory: Path, **options: Any) -> tuple[dict[str, object], tuple[Event, ...]]:
    """All that the stages of this process own afterwards, and what ran when."""
    hidden = "ranks" in options and options["ranks"].rank != 0
    with make_trainer(case, directory, **options) as trainer:
        for inputs, labels in batches(case, directory, hidden=hidden):
            trainer.step(inputs, labels)
        found = outcome(trainer)
        return found, tuple(trainer.events)


def resting() -> Any:
    """Every U takes 2 ms in which it needs no core: ranks overlap where there are fewer cores."""
    update = StageStep.update

    def update_and_rest(self: StageStep, step: int) -> None:
        update(self, step)
        time.sleep(0.002)

    return mock.patch.object(StageStep, "update", update_and_rest)


def work(cases: Sequence[tuple[Case, Path]], results: Path) -> None:
    """All cases, one after another, in one process group."""
    warnings.simplefilter("error")
    found = []
    ranks: Ranks | None = None
    for case, directory in cases:
        columns = stage_columns(case.schedule, case.num_stages)
        ranks = join(columns, ["cpu"], read_plan(directory).digest, {"case": str(case)})
        with mock.patch.object(wire, "_LARGE", case.large or wire._LARGE), resting():
            found.append(run(case, directory, ranks=ranks))
        ranks.leave()
    assert ranks is not None
    (results / str(ranks.rank)).write_bytes(pickle.dumps(found))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def program(model: str, num_stages: int, method: str) -> Path:
        source, inputs, options = MODELS[model]
        out = tmp_path_factory.mktemp(model) / "program"
        compile_model(
            f"{ROOT}/{source}", inputs, out=out, num_stages=num_stages, method=method,
            **{"num_classes": 4, **options}, batch_size=6, threads_per_stage=1,
        )  # fmt: skip
        return out

    return lambda case: program(case.model, case.num_stages, case.method)


@pytest.fixture(scope="module")
def on_ranks(compiled: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(state and losses, events per rank) of a case; all of the same number of stages at once."""

    @cache
    def group(num_stages: int) -> list[list[Any]]:
        results = tmp_path_factory.mktemp("results")
        cases = [(case, compiled(case)) for case in CASES if case.num_stages == num_stages]
        ended = wait_all(start(work, [(cases, results)] * num_stages, results / "logs"))
        assert [one.code for one in ended] == [0] * num_stages, ended
        return [pickle.loads((results / str(rank)).read_bytes()) for rank in range(num_stages)]

    def found(case: Case) -> tuple[dict[str, object], list[tuple[Event, ...]]]:
        place = [one for one in CASES if one.num_stages == case.num_stages].index(case)
        merged: dict[str, object] = {}
        for rank, rows in enumerate(group(case.num_stages)):
            state, _ = rows[place]
            own = {name: value for name, value in state.items() if not name.endswith("losses")}
            assert all(name.startswith(f"{rank} ") for name in own)
            losses = {name: value for name, value in state.items() if name not in own}
            merged |= own | (losses if rank == 0 else {})
            assert rank == 0 or not any(losses.values())
        return merged, [rows[place][1] for rows in group(case.num_stages)]

    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_leave_the_bits_of_one_process(case: Case, compiled: Any, on_ranks: Any) -> None:
    reference = case if case.method == "bp" else Case(**{**vars(case), "schedule": "sequential"})
    expected, _ = run(reference, compiled(case))
    found, _ = on_ranks(case)
    assert len(found[f"{case.num_stages - 1} losses"]) == len(SIZES)
    assert differences(found, expected) == []


def ends(events: Sequence[tuple[Event, ...]]) -> dict[Action, Event]:
    return {event.action: event for rank in events for event in rank}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rank_runs_its_actions_in_their_order(case: Case, on_ranks: Any) -> None:
    for stage, events in enumerate(on_ranks(case)[1]):
        kinds = step_kinds(case.schedule, stage, case.num_stages)
        order = [Action(stage, kind, step) for step in range(len(SIZES)) for kind in kinds]
        assert [event.action for event in events] == order
        assert all(one.end_ns <= other.start_ns for one, other in pairwise(events))


def small(num_stages: int, schedule: str) -> Case:
    (case,) = [c for c in CASES if c == Case("small_net", num_stages, schedule)]
    return case


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_in_stream_a_rank_is_ahead_of_the_next_one(num_stages: int, on_ranks: Any) -> None:
    at = ends(on_ranks(small(num_stages, "stream"))[1])
    for k in range(num_stages - 1):
        ahead = [
            step for step in range(1, len(SIZES))
            if at[Action(k, "F", step)].start_ns < at[Action(k + 1, "U", step - 1)].end_ns
        ]  # fmt: skip
        assert ahead


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_in_step_waits_for_the_batch_before_on_every_rank(num_stages: int, on_ranks: Any) -> None:
    at = ends(on_ranks(small(num_stages, "in_step"))[1])
    for step in range(1, len(SIZES)):
        for k in range(num_stages):
            end = at[Action(k, "F", step)].end_ns
            assert all(at[Action(j, "U", step - 1)].start_ns < end for j in range(num_stages))


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_in_sequential_one_rank_works_at_a_time(num_stages: int, on_ranks: Any) -> None:
    at = ends(on_ranks(small(num_stages, "sequential"))[1])
    order = [at[Action(k, "B", step)] for step in range(len(SIZES)) for k in range(num_stages)]
    assert all(one.end_ns <= other.start_ns for one, other in pairwise(order))
