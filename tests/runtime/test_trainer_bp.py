"""Backpropagation over stages is plain training, bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scpl_compile.errors import MethodError
from scpl_compile.ir import InputSpec, ModelSource
from scpl_compile.runtime.randomness import seeded
from scpl_compile.runtime.schedules import _compile_again, allowed_schedules, check_schedule
from scpl_compile.runtime.stage import take
from scpl_compile.runtime.trainer import Trainer
from stage_nets import (
    NUM_CLASSES,
    WIDTH,
    batches,
    block_plan,
    differences,
    make_plan,
    make_trainer,
    outcome,
)

pytestmark = pytest.mark.timeout(60)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class SkipNet(nn.Module):
    """Three stages; `skip`, the ids and the mask are read in the first and in the last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.lift = nn.Linear(WIDTH, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Embedding(10, NUM_CLASSES)
        self.out = nn.Linear(WIDTH, NUM_CLASSES)

    def first(self, ids: Tensor, mask: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = (self.embed(ids) * mask.unsqueeze(-1)).mean(1) + self.norm(x)
        return torch.relu(h), self.lift(h)

    def second(self, h: Tensor) -> Tensor:
        return torch.tanh(self.middle(h))

    def third(self, h: Tensor, skip: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.out(h * skip + skip) + (self.bias(ids) * mask.unsqueeze(-1)).mean(1)
        return logits

    def forward(self, ids: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        h, skip = self.first(ids, mask, x)
        return self.third(self.second(h), skip, ids, mask)


SKIP_READS = [
    ("ids", "mask", "x"),
    ("h1", "skip", "ids", "mask"),
    ("h2", "skip", "ids", "mask"),
]
SKIP_INPUTS = (
    InputSpec(name="ids", dtype="int64", shape=(5,), high=10),
    InputSpec(name="mask", dtype="bool", shape=(5,)),
    InputSpec(name="x", dtype="float32", shape=(WIDTH,)),
)


class SkipStage(nn.Module):
    paths: tuple[str, ...] = ()

    def __init__(self, model: SkipNet) -> None:
        super().__init__()
        take(self, model, *self.paths)


class First(SkipStage):
    paths = ("embed", "norm", "lift")

    def forward(self, ids: Tensor, mask: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (*SkipNet.first(self, ids, mask, x), ids, mask)  # type: ignore[arg-type]

    def training_step(self, *inputs: Tensor, labels: Tensor) -> Any:
        return self(*inputs), {}


class Second(SkipStage):
    paths = ("middle",)

    def forward(self, h: Tensor, skip: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return SkipNet.second(self, h), skip, ids, mask  # type: ignore[arg-type]

    def training_step(self, *inputs: Tensor, labels: Tensor) -> Any:
        return self(*inputs), {}


class Third(SkipStage):
    paths = ("bias", "out")

    def forward(self, h: Tensor, skip: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return SkipNet.third(self, h, skip, ids, mask)  # type: ignore[arg-type]

    def training_step(self, *inputs: Tensor, labels: Tensor) -> Any:
        return (), {"cross_entropy": F.cross_entropy(self(*inputs), labels)}


def skip_batches(num_batches: int) -> list[tuple[tuple[Tensor, Tensor, Tensor], Tensor]]:
    found = []
    for x, labels in batches(num_batches):
        ids = (x[:, :5] * 100).abs().long() % 10
        found.append(((ids, x[:, :5] > -1, x), labels))
    return found


def skip_trainer(**options: Any) -> Trainer:
    plan = make_plan(
        SKIP_READS, model=SkipNet(), inputs=SKIP_INPUTS, schedule="bp",
        paths=[First.paths, Second.paths, Third.paths],
    )  # fmt: skip
    with seeded(4):
        model = SkipNet()
    return Trainer(plan, model, [First, Second, Third], lr=1e-2, **options)


def test_bp_over_stages_is_plain_training() -> None:
    """With a tensor that skips a stage, and integers and a mask that cross the cuts."""
    with seeded(4):
        model = SkipNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    with one_thread():
        for inputs, labels in skip_batches(12):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(*inputs), labels)
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
    with skip_trainer() as trainer:
        for inputs, labels in skip_batches(12):
            trainer.step(inputs, labels)
        trained = trainer.state_dict()
        rows = trainer.take_losses()
    assert [row["cross_entropy"] for _, row in rows[2]] == losses
    assert rows[0] == [(step, {}) for step in range(12)]
    expected = model.state_dict()
    assert trained.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(trained[name], expected[name])] == []


def test_inputs_go_by_name() -> None:
    (ids, mask, x), labels = skip_batches(1)[0]
    with skip_trainer() as one, skip_trainer() as two:
        one.step((ids, mask, x), labels)
        two.step({"x": x, "ids": ids, "mask": mask}, labels)
        assert differences(outcome(one), outcome(two)) == []


def test_bp_has_schedules_and_scpl_has_none_of_them() -> None:
    plan = block_plan(2, schedule="bp")
    assert allowed_schedules(plan) == ("bp", "gpipe", "1f1b", "zb", "ddp")
    with pytest.raises(MethodError, match="'1f1b' runs on ranks.*--nproc-per-node 2 train.py"):
        check_schedule(plan, "1f1b", on_ranks=False)
    assert check_schedule(plan, "1f1b", on_ranks=True) == "1f1b"
    assert allowed_schedules(block_plan(2)) == ("stream", "in_step", "sequential")
    again = "compile the model again with method='scpl', num_stages=3"
    with pytest.raises(MethodError, match=f"'stream' does not go with method 'bp'.*{again}"):
        skip_trainer(schedule="stream")
    with pytest.raises(MethodError, match="'bp' does not go with method 'scpl'.*method='bp'"):
        make_trainer(schedule="bp")


def test_a_refused_schedule_of_a_named_model_gives_the_compile_line() -> None:
    source = ModelSource(spec="torchvision:resnet18", config={"num_classes": 10})
    plan = replace(block_plan(2), model="torchvision:resnet18", source=source)
    line = _compile_again(plan, "bp")
    assert "scpl compile torchvision:resnet18 --method bp --input " in line
    assert line.endswith("--stages 2 --config num_classes=10 -o DIR")
