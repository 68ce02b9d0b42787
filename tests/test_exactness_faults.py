"""Faults planted in the order of the stages or in what they share: the comparison finds them.

The comparison is that of test_exactness.py: all that two stages own after 20 steps, and the losses.
"""

import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.exactness.main import CASES, STEPS, Batches, Case, Outcome, differences, run
from scpl_compile import Program
from scpl_compile.actions import Action, stage_actions, step_kinds
from scpl_compile.errors import TrainingError
from scpl_compile.runtime.program import assemble, load_stages

SMALL = CASES["small_net"]
Actions = list[Iterator[Action]]
Order = Callable[[int, int], list[str]]
"""The actions of a stage (without its number) for a number of steps."""


@cache
def small() -> tuple[Program, Batches]:
    program = SMALL.compile(2)
    return program, SMALL.batches(program, [SMALL.batch_size] * STEPS)


# ---------------------------------------------------------------------- the order of actions


class SilentSgd(torch.optim.Optimizer):
    """SGD whose writes autograd does not notice; else torch itself refuses some of the faults."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.data.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])


def planted(order: Order, *, silent: bool = True) -> list[str]:
    """What differs after training in the order of actions that `order(stage, num_steps)` gives."""
    program, batches = small()

    def train(actions: Actions | None) -> Outcome:
        def make(**options: Any):
            trainer = program.trainer(**options)
            for stage in trainer._stages if silent else ():
                stage._descent.optimizer = SilentSgd(list(stage.module.parameters()))
            return trainer

        schedule = "sequential" if actions is None else "stream"
        return run(program, batches, schedule, trainer=make, actions=actions)

    faulty = [iter([Action.parse(f"{k}{text}") for text in order(k, STEPS)]) for k in range(2)]
    return differences(train(faulty), train(None))


def plain(stage: int, num_steps: int) -> list[str]:
    """The right order."""
    return [f"{kind}{t}" for t in range(num_steps) for kind in step_kinds("stream", stage, 2)]


def only_in(stage: int, order: Order) -> Order:
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
def test_a_planted_fault_is_found(stage: int, order: Order) -> None:
    found = planted(only_in(stage, order))
    assert f"stage {stage} losses" in found
    assert any(name.startswith(f"stage {stage} module.") for name in found)
    # Nothing flows back: a fault in stage 1 is invisible in stage 0.
    assert any(name.startswith("stage 0") for name in found) == (stage == 0)


@pytest.mark.parametrize("order", [update_after_the_next_forward, backward_after_the_next_forward])
def test_torch_itself_refuses_weights_that_changed_before_backward(
    order: Order,
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
