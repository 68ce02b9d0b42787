"""Stages that would have nothing to train on, and stages that write what they have received."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scpl_compile import Program, compile_model
from scpl_compile.errors import PartitionError

BATCH = 6


class Net(nn.Module):
    """(B, 6) → (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.mid = nn.Linear(6, 6)
        self.last = nn.Linear(6, 4)


def compiled(model: nn.Module, **options: Any) -> Program:
    return compile_model(model, "6", batch_size=BATCH, threads_per_stage=1, **options)


# ---------------------------------------------------------------------- in place


class WritesFirst(Net):
    """What the first stage sends, and trains on, is written by the next one at once."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.clamp_(-0.1, 0.1)
        return self.last(torch.relu(self.mid(y)))


@pytest.mark.parametrize("schedule", ["sequential", "in_step", "stream"])
def test_what_the_next_stage_writes_is_not_what_the_local_loss_reads(schedule: str) -> None:
    program = compiled(WritesFirst(), split_at=("first",))
    batches = [(torch.randn(BATCH, 6), torch.arange(BATCH) % 4) for _ in range(20)]
    with program.trainer(schedule=schedule, optimizer="sgd", lr=0.1) as trainer:
        reference = copy.deepcopy(trainer.model)
        head = copy.deepcopy(trainer._stages[0].module.local_loss)
        for x, labels in batches:
            trainer.step(x, labels)
        trainer.drain()
        state = trainer.state_dict()
    steps = torch.optim.SGD([*reference.parameters(), *head.parameters()], lr=0.1)
    for x, labels in batches:
        y = reference.first(x)
        z = y.detach().clone().clamp(-0.1, 0.1)
        logits = reference.last(torch.relu(reference.mid(z)))
        losses = [*head(y, labels=labels).values(), F.cross_entropy(logits, labels)]
        torch.stack(losses).sum().backward()
        steps.step()
        steps.zero_grad()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(state[name], value)


class WritesReceived(Net):
    """The second stage writes what the first has made; the third reads it: `b` trains by that."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x)) * 2
        y.add_(torch.relu(self.mid(y * 1)))
        return self.last(y * 2)


def test_a_stage_trains_on_what_it_writes_into_what_it_received() -> None:
    program = compiled(WritesReceived(), split_at=("mul", "add_"), num_stages=3)
    assert [stage.losses[0].reads for stage in program.plan.stages[:2]] == [("mul",), ("mul",)]
    assert program.verification.is_verified


# ---------------------------------------------------------------------- dead ends


class Observed(nn.Module):
    """Its layer works for a buffer alone; nothing is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 64)
        self.register_buffer("seen", torch.zeros(64))

    def forward(self, x: Tensor) -> None:
        with torch.no_grad():
            self.seen += self.linear(x).mean(0)


class DeadEnd(Net):
    """A layer that nothing needs, `when` the model is otherwise at this place."""

    def __init__(self, dead: nn.Module, when: int) -> None:
        super().__init__()
        self.dead, self.when = dead, when

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, layer in enumerate((self.first, self.mid, self.last)):
            if i == self.when:
                self.dead(y)
            y = layer(torch.relu(y))
        if self.when == 3:
            self.dead(x)
        return y


@pytest.mark.parametrize("when", range(4))
@pytest.mark.parametrize("dead", [lambda: nn.Linear(6, 64), Observed], ids=["linear", "observed"])
def test_what_nothing_needs_makes_no_stage_of_its_own(
    dead: Callable[[], nn.Module], when: int
) -> None:
    program = compiled(DeadEnd(dead(), when), num_stages=3)
    trained = [set(stage.parameters) for stage in program.plan.stages]
    for k, name in enumerate(("first", "mid", "last")):
        assert f"{name}.weight" in trained[k]
    with pytest.raises(PartitionError, match="and on which the output depends"):
        compiled(DeadEnd(dead(), when), num_stages=4)
