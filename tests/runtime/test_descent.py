"""Clipping, accumulation, scaling and decay of one stage, beside a plain loop."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scpl_compile.errors import TrainingError
from scpl_compile.runtime.optim import make_optimizer
from scpl_compile.runtime.randomness import seeded
from scpl_compile.runtime.stage_step import StageStep
from scpl_compile.runtime.step_options import StepOptions
from stage_nets import differences, run_stage, state_of, step_of

Data = dict[int, tuple[Tensor, Tensor]]


class TwoLosses(nn.Module):
    """(B, 5) to two losses that share weights; `blow_up` multiplies the first in these steps."""

    def __init__(self, blow_up: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.blow_up, self.calls = blow_up, 0

    def training_step(self, x: Tensor, *, labels: Tensor) -> tuple[Any, dict[str, Tensor]]:
        hidden = self.norm(torch.tanh(self.first(x)))
        factor = 1e38 if self.calls in self.blow_up else 1.0
        self.calls += 1
        ce = nn.functional.cross_entropy(self.second(hidden).float(), labels)
        return (), {"square": hidden.float().square().mean() * factor, "ce": ce}


def two_losses(**options: Any) -> TwoLosses:
    with seeded(3):
        return TwoLosses(**options)


def data(num_steps: int, first: int = 0) -> Data:
    draws = torch.Generator().manual_seed(2)
    made = [
        (torch.randn(4, 5, generator=draws), torch.arange(4) % 3) for _ in range(first + num_steps)
    ]
    return {step: made[step] for step in range(first, first + num_steps)}


def stage_of(
    module: nn.Module, optimizer: str = "adam", weight_decay: float = 0.0, **options: Any
) -> StageStep:
    return step_of(
        module,
        optimizer=make_optimizer(optimizer, module.parameters(), 1.0, {}, weight_decay),
        learning_rate=lambda step: 0.1 / (step + 1),
        draws=False,
        options=StepOptions(**options),
    )


def by_hand(
    num_steps: int, *, optimizer: torch.optim.Optimizer, module: TwoLosses, clip: float = 0.0,
    accumulate: int = 1,
) -> TwoLosses:  # fmt: skip
    """A plain loop."""
    for step, (x, labels) in data(num_steps).items():
        _, losses = module.training_step(x, labels=labels)
        torch.autograd.backward([loss / accumulate for loss in losses.values()])
        if (step + 1) % accumulate == 0:
            if clip:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (step + 1)
            optimizer.step()
            optimizer.zero_grad()
    return module


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, value), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(value, expected), name


# ---------------------------------------------------------------------- clipping


@pytest.mark.parametrize("clip", [0.01, 0.5, 100.0])
def test_gradients_of_all_losses_are_clipped_together(clip: float) -> None:
    module, expected = two_losses(), two_losses()
    run_stage(stage_of(module, "sgd", clip_norm=clip), data(5))
    sgd = torch.optim.SGD(expected.parameters(), lr=1.0)
    assert_same(module, by_hand(5, optimizer=sgd, module=expected, clip=clip))


def test_a_clipped_step_is_as_long_as_was_asked() -> None:
    module = two_losses()
    before = nn.utils.parameters_to_vector(module.parameters()).detach()
    run_stage(stage_of(module, "sgd", clip_norm=0.01), data(1))
    after = nn.utils.parameters_to_vector(module.parameters()).detach()
    assert float((after - before).norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


# ---------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("accumulate", [2, 3])
def test_the_optimizer_steps_after_every_nth_step_by_the_mean(accumulate: int) -> None:
    module, expected = two_losses(), two_losses()
    run_stage(stage_of(module, accumulate=accumulate, clip_norm=0.5), data(8))
    adam = torch.optim.Adam(expected.parameters(), lr=1.0)
    by_hand(8, optimizer=adam, module=expected, clip=0.5, accumulate=accumulate)
    assert_same(module, expected)


def test_n_batches_are_one_batch_of_n_times_as_many() -> None:
    module, whole = two_losses(), two_losses()
    batches = data(4)
    run_stage(stage_of(module, "sgd", accumulate=4), batches)
    x, labels = (torch.cat(part) for part in zip(*batches.values(), strict=True))
    run_stage(stage_of(whole, "sgd"), {3: (x, labels)})
    for one, other in zip(module.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"amp": "fp16"}, {"clip_norm": 0.1}])
@pytest.mark.parametrize("last", [3, 4, 5])
def test_a_state_between_two_updates_goes_on_bit_for_bit(
    options: dict[str, Any], last: int
) -> None:
    one = stage_of(two_losses(), accumulate=3, **options)
    run_stage(one, data(last))
    tensors, values = copy.deepcopy(one.state())
    waiting = {name for name in tensors if name.startswith("gradient.")}
    assert len(waiting) == (0 if last == 3 else 6)
    other = stage_of(TwoLosses(), accumulate=3, **options)
    run_stage(other, data(2))  # any past
    other.load_state(tensors, json.loads(json.dumps(values)))
    for stage in (one, other):
        run_stage(stage, data(5, first=last))
    assert differences(state_of([one]), state_of([other])) == []


def test_gradients_come_back_in_the_format_of_their_parameter() -> None:
    module = nn.Conv2d(3, 4, 3)
    module.training_step = lambda x, *, labels: ((), {"sum": module(x).square().sum()})  # type: ignore[assignment]
    stage = stage_of(module, accumulate=2, channels_last=True)
    run_stage(stage, {0: (torch.randn(2, 3, 5, 5), torch.arange(2))})
    found = module.weight.grad
    assert found is not None
    stage.load_state(*stage.state())
    assert module.weight.grad is not None and module.weight.grad is not found
    assert module.weight.grad.stride() == found.stride() and torch.equal(module.weight.grad, found)


# ---------------------------------------------------------------------- scaling


def test_a_step_with_infinite_gradients_is_left_out_and_no_failure() -> None:
    """The loss is finite, its gradient times 65536 is not; the scale falls to a half."""
    module, expected = two_losses(blow_up=(1,)), two_losses()
    stage = stage_of(module, amp="fp16")
    run_stage(stage, data(2))
    run_stage(stage_of(expected, amp="fp16"), data(1))
    assert_same(module, expected)
    tensors, values = stage.state()
    stage.check_finite(tensors)
    assert len(stage.take_losses()) == 2
    assert values["scaler"]["scale"] == 2.0**15


def test_the_scale_goes_on_after_a_resume() -> None:
    one = stage_of(two_losses(blow_up=(0, 1)), amp="fp16")
    run_stage(one, data(2))
    other = stage_of(two_losses(), amp="fp16")
    other.load_state(*one.state())
    assert other.state()[1]["scaler"]["scale"] == 2.0**14


def test_a_stage_without_gradients_has_nothing_to_scale() -> None:
    module = nn.Linear(5, 2)
    module.training_step = lambda x, *, labels: ((), {"constant": x.sum() * 0})  # type: ignore[assignment]
    stage = stage_of(module, amp="fp16")
    run_stage(stage, data(2))
    assert stage.take_losses() == [(0, {"constant": 0.0}), (1, {"constant": 0.0})]


def test_the_state_of_another_precision_is_refused() -> None:
    scaled, plain = stage_of(two_losses(), amp="fp16"), stage_of(two_losses(), amp="bf16")
    with pytest.raises(TrainingError, match="stage 0: .*of a run with amp fp16, this one is witho"):
        plain.load_state(*scaled.state())
    with pytest.raises(TrainingError, match="stage 0: .*of a run without amp fp16, this one is wi"):
        scaled.load_state(*plain.state())


# ---------------------------------------------------------------------- decay


def test_two_groups_train_and_resume_like_a_loop_with_two_groups() -> None:
    module, expected = two_losses(), two_losses()
    one = stage_of(module, "adamw", weight_decay=0.3)
    run_stage(one, data(4))
    tensors, values = copy.deepcopy(one.state())
    run_stage(one, data(3, first=4))
    matrices = [p for p in expected.parameters() if p.ndim > 1]
    others = [p for p in expected.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    )
    assert_same(module, by_hand(7, optimizer=adamw, module=expected))
    other = stage_of(TwoLosses(), "adamw", weight_decay=0.3)
    other.load_state(tensors, values)
    run_stage(other, data(3, first=4))
    assert differences(state_of([one]), state_of([other])) == []


def test_the_state_of_one_group_loads_into_two() -> None:
    """Its entries go by the place of the parameter, not by its place in the groups."""
    one = stage_of(two_losses(), "adamw")
    run_stage(one, data(2))
    other = stage_of(TwoLosses(), "adamw", weight_decay=0.3)
    other.load_state(*one.state())
    assert differences(state_of([one]), state_of([other])) == []
