"""Streaming over batches computes bit for bit what one stage after another computes.

Compared is all that a stage owns (parameters, both kinds of buffers, optimizer state, random
state) and the losses of every step; the cases are those of benchmarks/exactness, which runs them
longer. Then faults are planted, to see that the comparison finds them.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.exactness.main import (
    CASES,
    SMALL_CUTS,
    STEPS,
    Batches,
    Case,
    Outcome,
    differences,
    overlaps,
    run,
)
from scpl_compile import Program
from scpl_compile.actions import SCHEDULES, Action, stage_actions, step_kinds
from scpl_compile.errors import TrainingError
from scpl_compile.runtime.engine import Event
from scpl_compile.runtime.program import assemble, load_stages

SMALL = CASES["small_net"]
Actions = list[Iterator[Action]]


@cache
def small(num_stages: int) -> tuple[Program, Batches, Outcome]:
    """The small net's program, its batches, and what `sequential` makes of them."""
    program = SMALL.compile(num_stages)
    batches = SMALL.batches(program, [SMALL.batch_size] * STEPS)
    return program, batches, run(program, batches, "sequential")


# ---------------------------------------------------------------------- equal in every bit


@pytest.mark.parametrize("num_stages", range(1, 7))
def test_the_schedules_leave_the_same_bits(num_stages: int) -> None:
    program, batches, expected = small(num_stages)
    for repeat in range(3):
        for schedule in ("stream", "in_step"):
            found = run(program, batches, schedule, jitter=repeat)
            assert differences(found, expected) == []


@pytest.mark.parametrize("num_stages", [2, 4])
def test_stream_is_exact_in_twenty_repeats(num_stages: int) -> None:
    program, batches, expected = small(num_stages)
    for repeat in range(20):
        found = run(program, batches, "stream", jitter=100 + repeat)
        assert differences(found, expected) == []


@pytest.mark.parametrize(
    ("name", "smaller", "optimizer", "num_stages"),
    [
        ("balanced_cnn", {"batch_size": 16}, "adam", 2),
        ("resnet18", {"batch_size": 8, "inputs": "3x32x32"}, "sgd", 2),
        ("text_transformer", {}, "adamw", 4),
    ],
)
def test_larger_models(name: str, smaller: dict[str, Any], optimizer: str, num_stages: int) -> None:
    """The first two are what benchmarks/throughput measures, with smaller batches."""
    case = replace(CASES[name], **smaller)
    program = case.compile(num_stages)
    batches = case.batches(program, [case.batch_size] * STEPS)
    train = partial(run, program, batches, optimizer=optimizer)
    expected = train("sequential")
    for repeat in range(2):
        found = train("stream", jitter=repeat)
        assert differences(found, expected) == []
        assert overlaps(found.events)
    assert differences(train("in_step", jitter=0), expected) == []


@pytest.mark.parametrize("options", [{"queue_depth": 1}, {"random_stages": None}])
def test_whatever_the_queues_hold_and_whoever_takes_the_lock(options: dict[str, Any]) -> None:
    program, batches, expected = small(4)
    assert differences(run(program, batches, "stream", jitter=0, **options), expected) == []


def test_small_batches_and_a_batch_of_one_in_the_stream() -> None:
    program = SMALL.compile(4)
    batches = SMALL.batches(program, [6, 6, 3, 6, 1, 6, 1, 1, 6, 2, 6])
    expected = run(program, batches, "sequential")
    for schedule in ("stream", "in_step"):
        assert differences(run(program, batches, schedule, jitter=0), expected) == []


def test_two_views_of_every_sample() -> None:
    case = replace(SMALL, batch_size=5, views=2)
    program = case.compile(4)
    batches = case.batches(program, [5] * STEPS)
    assert batches[0][0][0].shape[0] == 10 and batches[0][1].shape[0] == 5
    expected = run(program, batches, "sequential")
    assert differences(run(program, batches, "stream", jitter=0), expected) == []


# ---------------------------------------------------------------------- what was compared


def test_the_comparison_covers_all_that_changes() -> None:
    """Every kind of state is there, and was changed by the training."""
    program, batches, trained = small(6)
    untrained = run(program, [], "sequential")
    changed = differences(trained, untrained)
    for kind in (
        "stage 0 module.embed.0.weight",
        "stage 1 module.lstm.lstm.weight_hh_l1",
        "stage 2 module.attention.qkv.bias",
        "stage 3 module.deep.linear.weight",
        "stage 5 module.centered.norm.running_var",
        "stage 5 module.centered.norm.num_batches_tracked",
        "stage 5 module.centered.center",  # non-persistent
        "stage 0 module.local_loss.projection.out.weight",
        "stage 0 optimizer.0.exp_avg_sq",
        "stage 0 random.torch",
        "stage 1 random.torch",
        "stage 2 random.torch",
        "stage 3 random.torch",
        "stage 4 random.torch",
        "stage 4 losses",
    ):
        assert kind in changed
    assert "stage 5 random.torch" not in changed  # it draws nothing
    assert program.plan.stages[5].nodes[0] == "centered"
    assert tuple(cut.after for cut in program.plan.cuts) == SMALL_CUTS


def test_another_seed_is_another_run() -> None:
    program, batches, expected = small(2)
    assert differences(run(program, batches, "stream", seed=1), expected) != []


def test_a_backward_that_draws_holds_the_lock() -> None:
    """checkpoint() puts its old random state into the one generator while it runs again."""
    program, batches, expected = small(4)
    home = [stage.index for stage in program.plan.stages if "checkpointed" in stage.nodes]
    assert list(program.verification.recompute_stages) == home
    careless = partial(run, program, batches, recompute_stages=())
    assert differences(careless("sequential"), expected) == []
    assert any(differences(careless("stream", jitter=seed), expected) for seed in range(10))


# ---------------------------------------------------------------------- what ran when


def by_action(events: tuple[Event, ...]) -> dict[Action, Event]:
    return {event.action: event for event in events}


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_every_stage_keeps_its_own_order(schedule: str) -> None:
    program, batches, _ = small(4)
    at = by_action(run(program, batches, schedule, jitter=0).events)
    for k in range(4):
        kinds = step_kinds(schedule, k, 4)
        order = [at[Action(k, kind, t)] for t in range(STEPS) for kind in kinds]
        for one, other in zip(order, order[1:], strict=False):
            assert one.end_ns <= other.start_ns


def test_in_stream_stages_work_on_different_batches_at_the_same_time() -> None:
    program, batches, _ = small(4)
    pairs = overlaps(run(program, batches, "stream").events)
    assert {one.stage for pair in pairs for one in pair} == {0, 1, 2, 3}
    assert any(one.step != other.step for one, other in pairs)


def test_in_step_stages_overlap_on_one_batch_only() -> None:
    program, batches, _ = small(4)
    pairs = overlaps(run(program, batches, "in_step").events)
    assert pairs and all(one.step == other.step for one, other in pairs)


def test_in_sequential_nothing_overlaps() -> None:
    _, _, outcome = small(4)
    assert overlaps(outcome.events) == []


# ---------------------------------------------------------------------- planted faults


class SilentSgd(torch.optim.Optimizer):
    """SGD whose writes autograd does not notice; else torch itself refuses some of the faults."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.data.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])


def planted(order: Callable[[int, int], list[str]], *, silent: bool = True) -> list[str]:
    """What differs after training in the order of actions that `order(stage, num_steps)` gives."""
    program, batches, _ = small(2)

    def train(actions: Actions | None) -> Outcome:
        def make(**options: Any):
            trainer = program.trainer(**options)
            for stage in trainer._stages if silent else ():
                stage.optimizer = SilentSgd([p for p in stage.module.parameters()])
            return trainer

        schedule = "sequential" if actions is None else "stream"
        return run(program, batches, schedule, trainer=make, actions=actions)

    faulty = [iter([Action.parse(f"{k}{text}") for text in order(k, STEPS)]) for k in range(2)]
    return differences(train(faulty), train(None))


def plain(stage: int, num_steps: int) -> list[str]:
    """The right order."""
    return [f"{kind}{t}" for t in range(num_steps) for kind in step_kinds("stream", stage, 2)]


def only_in(stage: int, order: Callable[[int, int], list[str]]) -> Callable[[int, int], list[str]]:
    return lambda k, num_steps: order(k, num_steps) if k == stage else plain(k, num_steps)


def update_after_the_next_forward(stage: int, num_steps: int) -> list[str]:
    """F(t+1) before U(t): RECV F SEND B, RECV' F' SEND' U B', …"""
    send = ["SEND"] if stage == 0 else []
    order: list[str] = []
    for t in range(num_steps):
        order += [f"{kind}{t}" for kind in ("RECV", "F", *send)]
        order += [f"U{t - 1}"] if t else []
        order += [f"B{t}"]
    return [*order, f"U{num_steps - 1}"]


def backward_after_the_next_forward(stage: int, num_steps: int) -> list[str]:
    """B(t) after F(t+1)."""
    send = ["SEND"] if stage == 0 else []
    order: list[str] = []
    for t in range(num_steps):
        order += [f"{kind}{t}" for kind in ("RECV", "F", *send)]
        order += [f"B{t - 1}", f"U{t - 1}"] if t else []
    return [*order, f"B{num_steps - 1}", f"U{num_steps - 1}"]


def two_backwards_one_update(stage: int, num_steps: int) -> list[str]:
    """B(t+1) before U(t): the gradients of two batches add up."""
    order: list[str] = []
    for t in range(0, num_steps, 2):
        for step in (t, t + 1):
            order += [f"{kind}{step}" for kind in step_kinds("stream", stage, 2)[:-1]]
        order += [f"U{t}", f"U{t + 1}"]
    return order


def a_lost_batch(stage: int, num_steps: int) -> list[str]:
    """Batch 7 arrives, is sent on, and is not trained on."""
    lost = {"B7", "U7"} if stage == 0 else {"F7", "B7", "U7"}
    return [text for text in plain(stage, num_steps) if text not in lost]


def a_doubled_batch(stage: int, num_steps: int) -> list[str]:
    """Batch 7 is trained on twice before one update."""
    order = plain(stage, num_steps)
    at = order.index("U7")
    return [*order[:at], "F7", "B7", *order[at:]]


def test_the_plain_order_has_no_difference() -> None:
    assert planted(plain) == []
    assert planted(plain, silent=False) == []


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(
    "order",
    [
        update_after_the_next_forward,
        backward_after_the_next_forward,
        two_backwards_one_update,
        a_lost_batch,
        a_doubled_batch,
    ],
)
def test_a_planted_fault_is_found(stage: int, order: Callable[[int, int], list[str]]) -> None:
    found = planted(only_in(stage, order))
    assert f"stage {stage} losses" in found
    assert any(name.startswith(f"stage {stage} module.") for name in found)
    # Nothing flows back: a fault in stage 1 is invisible in stage 0.
    assert any(name.startswith("stage 0") for name in found) == (stage == 0)


@pytest.mark.parametrize("order", [update_after_the_next_forward, backward_after_the_next_forward])
def test_torch_itself_refuses_weights_that_changed_before_backward(
    order: Callable[[int, int], list[str]],
) -> None:
    with pytest.raises(TrainingError, match="modified by an inplace operation"):
        planted(order, silent=False)


def test_a_batch_that_is_sent_twice_stops_the_training() -> None:
    def send_twice(stage: int, num_steps: int) -> list[str]:
        order = plain(stage, num_steps)
        return [*order[: order.index("B7")], "SEND7", *order[order.index("B7") :]]

    with pytest.raises(TrainingError, match="stage 1 holds no batch of step 8"):
        planted(only_in(0, send_twice))


# ---------------------------------------------------------------------- memory that is shared


class Shared(nn.Module):
    """Stage 1 reads a parameter of stage 0 and a buffer that stage 0 writes in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.count = _Count()
        self.second = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.detach()
        count = self.count(x)
        x = torch.relu(self.first(x) * self.scale)
        logits: Tensor = self.second(x * scale / count)
        return logits


class _Count(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.count


@cache
def shared() -> tuple[Program, Batches]:
    case = Case(build=Shared, inputs="8", batch_size=6)
    program = case.compile(2, split_at=("relu",))
    return program, case.batches(program, [6] * STEPS)


def slow_reader() -> Actions:
    """Stage 1 begins each forward long after stage 0 has gone on."""

    def late() -> Iterator[Action]:
        for action in stage_actions("stream", 1, 2):
            if action.kind == "F":
                time.sleep(5e-3)
            yield action

    return [stage_actions("stream", 0, 2), late()]


def test_memory_that_its_owner_writes_is_cloned_when_it_crosses() -> None:
    program, batches = shared()
    crossings = {c.name: c.alias for c in program.plan.cuts[0].crossings}
    assert sorted(alias for alias in crossings.values() if alias) == ["buffer", "parameter"]
    expected = run(program, batches, "sequential")
    assert differences(run(program, batches, "stream", actions=slow_reader()), expected) == []


@pytest.mark.parametrize("alias", ["buffer", "parameter"])
def test_a_crossing_alias_that_is_not_cloned_is_found(alias: str) -> None:
    program, batches = shared()
    stages = load_stages(program.directory, program.plan)
    crossings = program.plan.cuts[0].crossings
    index = [crossing.alias for crossing in crossings].index(alias)

    class Careless(stages.Stage0):
        def training_step(self, *inputs: Tensor, labels: Tensor):
            sent, losses = super().training_step(*inputs, labels=labels)
            own = self.count.count if alias == "buffer" else self.scale.detach()
            return (*sent[:index], own, *sent[index + 1 :]), losses

    make = partial(
        assemble, program.directory, stages.build_model, (Careless, stages.Stage1),
        model=program.model,
    )  # fmt: skip
    expected = run(program, batches, "sequential")
    found = run(program, batches, "stream", trainer=make, actions=slow_reader())
    assert "stage 1 module.second.weight" in differences(found, expected)
