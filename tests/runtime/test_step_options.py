"""Autocast and memory format of a stage, beside a plain loop that does the same."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scpl_compile.errors import MethodError
from scpl_compile.kernels import supcon_loss
from scpl_compile.runtime.losses import LocalLoss
from scpl_compile.runtime.optim import make_optimizer
from scpl_compile.runtime.randomness import seeded
from scpl_compile.runtime.stage import cut
from scpl_compile.runtime.step_options import StepOptions
from stage_nets import (
    CPU,
    BlockStage,
    batches,
    block_plan,
    block_stages,
    differences,
    make_trainer,
    run_stage,
    step_of,
    submit_all,
    train,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SIDE = 6


class BpStage(BlockStage):
    """Sends its output with its gradient, and keeps the one that comes back."""

    def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
        y = self(x)
        y.register_hook(lambda gradient: self.__dict__.setdefault("back", []).append(gradient))
        return (y,), {}


class ConvStage(nn.Module):
    """A stage as emitted: images (B, 3, 6, 6), a convolution, both terms of a local loss."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.local_loss = LocalLoss(
            num_classes=4, in_shapes=((8, SIDE, SIDE),), cross_entropy=1.0, hidden=16, out=8
        )
        self.seen: list[tuple[torch.dtype, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        is_last = x.is_contiguous(memory_format=torch.channels_last)
        self.seen.append((y.dtype, is_last))
        return y

    def training_step(self, x: Tensor, *, labels: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        y = self(x)
        return (cut(y),), self.local_loss(y, labels=labels)


def conv_stage() -> ConvStage:
    with seeded(4):
        return ConvStage()


def images(num_batches: int, batch_size: int = 8) -> dict[int, tuple[Tensor, Tensor]]:
    """By step (images, labels); every class occurs."""
    draws = torch.Generator().manual_seed(1)
    return {
        step: (
            torch.randn(batch_size, 3, SIDE, SIDE, generator=draws),
            torch.randperm(batch_size, generator=draws) % 4,
        )
        for step in range(num_batches)
    }


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    """Bit for bit, buffers too."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def trained_by_a_stage(**options: Any) -> tuple[ConvStage, list[Any]]:
    """After 6 steps: the stage, and what it sent and its losses of each step."""
    module = conv_stage()
    stage = step_of(
        module,
        sends=("y",),
        optimizer=make_optimizer("adam", module.parameters(), 1e-2, {}),
        learning_rate=lambda step: 1e-2,
        options=StepOptions(**options),
    )
    run_stage(stage, images(6))
    return module, stage.take_losses()


def trained_by_hand(amp: str, *, channels_last: bool = False) -> tuple[ConvStage, list[Any]]:
    """The same as a person writes it."""
    module, rows = conv_stage(), []
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=amp == "fp16")
    for step, (x, labels) in images(6).items():
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", DTYPES[amp]) if amp != "none" else nullcontext():
            _, losses = module.training_step(x, labels=labels)
        optimizer.zero_grad()
        torch.autograd.backward([scaler.scale(loss) for loss in losses.values()])
        scaler.step(optimizer)
        scaler.update()
        rows.append((step, {name: float(loss.detach()) for name, loss in losses.items()}))
    return module, rows


# ---------------------------------------------------------------------- autocast


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_step_is_what_a_plain_loop_under_autocast_does(amp: str) -> None:
    (module, rows), (expected, expected_rows) = trained_by_a_stage(amp=amp), trained_by_hand(amp)
    assert rows == expected_rows
    assert same_tensors(module, expected)
    assert module.seen == expected.seen
    assert {dtype for dtype, _ in module.seen} == {DTYPES.get(amp, torch.float32)}


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_what_crosses_has_the_dtype_that_autocast_gave_it(amp: str) -> None:
    stage = step_of(conv_stage(), sends=("y",), options=StepOptions(amp=amp))
    stage.receive(0, {"x": images(1)[0][0]}, images(1)[0][1], None)
    stage.forward(0)
    assert stage.outgoing(0)[0]["y"].dtype == DTYPES[amp]
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_the_contrastive_loss_of_rounded_features_is_computed_in_float32(amp: str) -> None:
    """Under autocast the value and the gradient are those outside it, of the same features."""
    features = torch.randn(16, 8).to(DTYPES[amp])
    labels = torch.arange(16) % 4
    found = []
    for how in (StepOptions(amp=amp), StepOptions()):
        leaf = features.clone().requires_grad_()
        with how.autocast(CPU):
            loss = supcon_loss(leaf, labels)
        loss.backward()
        found.append((loss, leaf.grad))
    (loss, gradient), (expected, expected_gradient) = found
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert gradient is not None and gradient.dtype == DTYPES[amp]
    assert torch.equal(gradient, expected_gradient)
    exact = supcon_loss(features.double(), labels, impl="reference")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_cache_of_weights_that_all_threads_share_is_not_used() -> None:
    """A weight used twice is rounded twice, so that no other thread has a say in its gradient."""
    linear = nn.Linear(4, 4)
    with StepOptions(amp="bf16").autocast(CPU):
        one, two = linear(torch.randn(2, 4)), linear(torch.randn(2, 4))
    rounded = [value.grad_fn.next_functions for value in (one, two)]
    assert not {f for f, _ in rounded[0] if f} & {f for f, _ in rounded[1] if f}


def test_fp16_and_gradients_that_cross_name_bf16() -> None:
    with pytest.raises(MethodError, match="amp 'fp16' scales .* take amp 'bf16'"):
        step_of(conv_stage(), detach=False, options=StepOptions(amp="fp16"))
    step_of(conv_stage(), detach=False, options=StepOptions(amp="bf16"))


# ---------------------------------------------------------------------- memory format


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_channels_last_is_what_a_plain_loop_in_it_does(amp: str) -> None:
    module, rows = trained_by_a_stage(amp=amp, channels_last=True)
    expected, expected_rows = trained_by_hand(amp, channels_last=True)
    assert rows == expected_rows and same_tensors(module, expected)
    assert all(is_last for _, is_last in module.seen)
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_convolution_of_one_channel_computes_in_channels_last_too() -> None:
    conv, x = nn.Conv2d(1, 8, 3), torch.randn(4, 1, 6, 6)
    plain = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    how = StepOptions(channels_last=True)
    how.arrange_module(conv)
    found, expected = conv(how.arrange({"x": x})["x"]), plain(x)
    assert found.stride() == expected.stride() == (128, 1, 32, 8)
    assert torch.equal(found, expected)


def test_a_tensor_that_is_no_image_keeps_its_format() -> None:
    how = StepOptions(channels_last=True)
    values = {
        "image": torch.randn(2, 3, 4, 5), "tokens": torch.randn(2, 3, 4),
        "ids": torch.ones(2, 3, 4, 5, dtype=torch.int64), "volume": torch.randn(2, 3, 4, 5, 6),
    }  # fmt: skip
    arranged = how.arrange(values)
    assert arranged["image"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(arranged["image"], values["image"])
    assert all(arranged[name] is values[name] for name in ("tokens", "ids", "volume"))
    assert StepOptions().arrange(values) is values


def test_weights_of_3d_convolutions_stay_and_tied_ones_stay_tied() -> None:
    module = nn.ModuleList([nn.Conv3d(2, 2, 3), nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)])
    module[2].weight = module[1].weight
    before = list(module.parameters())
    StepOptions(channels_last=True).arrange_module(module)
    assert all(a is b for a, b in zip(module.parameters(), before, strict=True))
    assert module[0].weight.is_contiguous()
    assert module[2].weight.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------- what crosses a cut


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_what_crosses_is_rounded_and_read_as_float32(name: str) -> None:
    how, dtype = StepOptions(wire_dtype=name), getattr(torch, name)
    x = torch.randn(50, requires_grad=True)
    narrow = how.narrow(x)
    assert narrow.dtype == dtype and torch.equal(narrow, x.to(dtype))
    assert how.widen(narrow).dtype == torch.float32
    assert torch.equal(how.widen(narrow), x.to(dtype).float())
    narrow.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones(50))
    assert how.narrow(x.double()).dtype == dtype
    for value in (torch.arange(9), torch.tensor([True]), torch.zeros(2, dtype=torch.complex64)):
        assert how.narrow(value) is value and how.widen(value) is value


def test_without_a_wire_dtype_nothing_is_rounded() -> None:
    how = StepOptions()
    for value in (torch.randn(3), torch.randn(3).double(), torch.randn(3).bfloat16()):
        assert how.narrow(value) is value and how.widen(value) is value


class Seen(BlockStage):
    """Keeps what it receives and the gradients that come back."""

    def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
        self.received = [*getattr(self, "received", []), (x.detach().clone(), labels.clone())]
        if x.requires_grad:
            x.register_hook(lambda gradient: self.__dict__.setdefault("back", []).append(gradient))
        return super().training_step(x, labels=labels)


@pytest.mark.parametrize("schedule", ["stream", "in_step", "bp"])
def test_every_engine_rounds_alike(schedule: str) -> None:
    """In the stage before the send, so that schedules agree in every bit."""
    if schedule == "bp":
        plan = block_plan(3, schedule="bp")
        rounded = train(6, 3, plan=plan, wire_dtype="bfloat16")
        assert differences(rounded, train(6, 3, plan=plan)) != []
        return
    expected = train(6, 3, schedule="sequential", wire_dtype="bfloat16")
    assert differences(train(6, 3, schedule=schedule, wire_dtype="bfloat16"), expected) == []
    assert differences(train(6, 3, schedule=schedule), expected) != []


def test_stages_read_rounded_values_and_labels_as_they_were() -> None:
    options = {"stages": block_stages(2, stage1=Seen), "schedule": "sequential"}
    with make_trainer(**options) as plain, make_trainer(**options, wire_dtype="bfloat16") as narrow:
        submit_all(plain, batches(1))
        submit_all(narrow, batches(1))
        plain.drain()
        narrow.drain()
        (x, labels), (rounded, same) = (t._stages[1].module.received[0] for t in (plain, narrow))
    assert torch.equal(rounded, x.bfloat16().float()) and not torch.equal(rounded, x)
    assert torch.equal(labels, same) and same.dtype == torch.int64


def test_gradients_that_cross_are_rounded_too() -> None:
    """The gradient that stage 0 starts from is the one of stage 1, rounded."""
    plan = block_plan(2, schedule="bp")
    stages = block_stages(2, stage1=Seen, stage0=BpStage)
    with make_trainer(plan=plan, stages=stages, wire_dtype="bfloat16") as trainer:
        submit_all(trainer, batches(1))
        trainer.drain()
        (computed,) = trainer._stages[1].module.back
        (arrived,) = trainer._stages[0].module.back
    assert computed.dtype == torch.float32
    assert torch.equal(arrived, computed.bfloat16().float())
    assert not torch.equal(arrived, computed)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"amp": "half"}, "amp 'half' is not one of none, bf16, fp16"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0; give at least 0"),
        ({"clip_norm": float("nan")}, "clip_norm is nan"),
        ({"wire_dtype": "int8"}, "wire_dtype 'int8' is not one of bfloat16, float16, or empty"),
        ({"accumulate": 0}, "accumulate is 0; give at least 1"),
    ],
)
def test_what_cannot_be_is_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises(MethodError, match=told):
        StepOptions(**options)
