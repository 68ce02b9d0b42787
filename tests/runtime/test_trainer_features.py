"""Precision, memory format, clipping, accumulation, decay and schedules in a trainer of stages."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scpl_compile.errors import MethodError
from scpl_compile.ir import InputSpec
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime.randomness import seeded
from scpl_compile.runtime.stage import cut, take
from scpl_compile.runtime.trainer import StageClass, Trainer
from stage_nets import NUM_CLASSES, differences, make_plan, make_trainer, outcome

NUM_STAGES, BATCH_SIZE, CHANNELS, SIDE = 3, 6, 3, 5


class ConvNet(nn.Module):
    """Three blocks on images, each of which uses its convolution twice, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock() for _ in range(NUM_STAGES))
        self.out = nn.Linear(CHANNELS, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.out(x.mean((2, 3)))
        return logits


class ConvBlock(nn.Module):
    """The same weight twice: its gradient is a sum over both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(torch.relu(self.norm(self.conv(torch.tanh(self.conv(x))))))
        return y


class ConvStage(nn.Module):
    """Block `index`; all but the last have a classifier of their own."""

    def __init__(self, model: ConvNet, index: int) -> None:
        super().__init__()
        self.index, self.is_last = index, index == NUM_STAGES - 1
        take(self, model, f"blocks.{index}", *(["out"] if self.is_last else []))
        if not self.is_last:
            self.head = nn.Linear(CHANNELS, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks[self.index](x)
        return self.out(y.mean((2, 3))) if self.is_last else y

    def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
        y = self(x)
        if self.is_last:
            return (), {"cross_entropy": F.cross_entropy(y, labels)}
        return (cut(y),), {"local": F.cross_entropy(self.head(y.mean((2, 3))), labels)}


class OpenStage(ConvStage):
    """For backpropagation: what is sent keeps its gradient, and only the last one has a loss."""

    def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
        y = self(x)
        if self.is_last:
            return (), {"cross_entropy": F.cross_entropy(y, labels)}
        return (y,), {}


def image_batches(num_batches: int) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(8)
    return [
        (
            torch.randn(BATCH_SIZE, CHANNELS, SIDE, SIDE, generator=draws),
            torch.randperm(BATCH_SIZE, generator=draws) % NUM_CLASSES,
        )
        for _ in range(num_batches)
    ]


def conv_trainer(kind: type[ConvStage] = ConvStage, **options: Any) -> Trainer:
    image = InputSpec(name="x", dtype="float32", shape=(CHANNELS, SIDE, SIDE))
    schedule = options.pop("schedule", "stream")
    plan = make_plan(
        [("x",), ("h1",), ("h2",)], inputs=(image,), schedule="bp" if schedule == "bp" else "stream"
    )
    with seeded(5):
        model = ConvNet()
    stages: list[StageClass] = [partial(kind, index=k) for k in range(NUM_STAGES)]  # type: ignore[list-item]
    return Trainer(plan, model, stages, schedule=schedule, **{"lr": 1e-2, **options})


def trained(num_steps: int = 12, **options: Any) -> dict[str, object]:
    with conv_trainer(**options) as trainer:
        for x, labels in image_batches(num_steps):
            trainer.step(x, labels)
        return outcome(trainer)


FEATURES: dict[str, dict[str, Any]] = {
    "bf16": {"amp": "bf16"},
    "fp16": {"amp": "fp16"},
    "channels_last": {"channels_last": True},
    "channels_last bf16": {"channels_last": True, "amp": "bf16"},
    "clip": {"clip_norm": 0.05},
    "accumulate": {"accumulate": 4},
    "accumulate fp16 clip": {"accumulate": 3, "amp": "fp16", "clip_norm": 0.1},
    "options": {"optimizer": "sgd", "optimizer_options": "momentum=0.9,nesterov=true"},
    "decay": {"optimizer": "adamw", "weight_decay": 0.1},
    "one cycle": {"lr_schedule": "OneCycleLR:max_lr=0.1", "total_steps": 12},
    "warmup": {"lr_schedule": "StepLR:step_size=4", "total_steps": 12, "warmup": 3},
}
features = pytest.mark.parametrize("options", FEATURES.values(), ids=list(FEATURES))


@features
def test_stages_at_once_compute_what_one_after_another_does(options: dict[str, Any]) -> None:
    stream = trained(**options)
    assert differences(stream, trained(schedule="sequential", **options)) == []
    assert differences(stream, trained()) != []


@features
def test_a_resumed_training_is_the_uninterrupted_one(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """The checkpoint lies between two updates of those that accumulate."""
    data = image_batches(12)
    with conv_trainer(**options) as trainer:
        for x, labels in data[:7]:
            trainer.step(x, labels)
        trainer.save(tmp_path)
        trainer.wait_saved()
        trainer.take_losses()
        for x, labels in data[7:]:
            trainer.step(x, labels)
        whole = outcome(trainer)
    with conv_trainer(**{**options, "seed": 9}) as trainer:
        trainer.load(checkpoint.step_directory(tmp_path, 7))
        for x, labels in data[7:]:
            trainer.step(x, labels)
        assert differences(outcome(trainer), whole) == []


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_evaluation_runs_under_autocast_too(amp: str) -> None:
    x, labels = image_batches(1)[0]
    with conv_trainer(amp=amp, channels_last=True) as trainer:
        found = trainer.predict(x)[-1]
        evaluation = trainer.evaluate([(x, labels)])
        model = trainer.model.eval()
        dtype = torch.bfloat16 if amp == "bf16" else torch.float16
        with torch.no_grad(), torch.autocast("cpu", dtype):
            expected = model(x.to(memory_format=torch.channels_last))
    assert found.dtype == dtype and torch.equal(found, expected)
    loss = F.cross_entropy(expected.float(), labels)
    assert evaluation.losses[-1] == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize(
    "options", [{"amp": "bf16"}, {"channels_last": True}, {"clip_norm": 0.1}, {"accumulate": 3}]
)
def test_backpropagation_over_stages_is_a_plain_loop(options: dict[str, Any]) -> None:
    """Clipping is per stage; else it is the model's own training, gradients across the cuts."""
    with conv_trainer(OpenStage, schedule="bp", optimizer="sgd", seed=0, **options) as trainer:
        for block in trainer.model.modules():
            if isinstance(block, nn.Dropout):
                block.p = 0.0
        for x, labels in image_batches(6):
            trainer.step(x, labels)
        found = trainer.state_dict()
    with seeded(5):
        model = ConvNet()
    for block in model.blocks:
        block.dropout.p = 0.0
    expected = by_hand(model, **options)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def by_hand(
    model: ConvNet, amp: str = "none", channels_last: bool = False, clip_norm: float = 0.0,
    accumulate: int = 1,
) -> ConvNet:  # fmt: skip
    """Six steps of SGD on the whole model."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=form)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    parts = [[*block.parameters()] for block in model.blocks]
    parts[-1] += model.out.parameters()
    for step, (x, labels) in enumerate(image_batches(6)):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16", cache_enabled=False):
            loss = F.cross_entropy(model(x.contiguous(memory_format=form)), labels)
        (loss / accumulate).backward()
        if (step + 1) % accumulate == 0:
            for part in parts if clip_norm else ():
                nn.utils.clip_grad_norm_(part, clip_norm)
            optimizer.step()
            optimizer.zero_grad()
    return model


def test_fp16_and_backpropagation_name_the_remedy() -> None:
    with pytest.raises(MethodError, match="gradients cross between the stages; take amp 'bf16'"):
        conv_trainer(OpenStage, schedule="bp", amp="fp16")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"amp": "half"}, "amp 'half'"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"optimizer_options": "momentum"}, "optimizer option 'momentum' is not name=value"),
        ({"lr_schedule": "ReduceLROnPlateau"}, "needs a metric"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises(MethodError, match=told):
        make_trainer(**options)
