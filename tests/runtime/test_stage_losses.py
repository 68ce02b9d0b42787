"""The losses of a stage: read once, bounded, and never silently no number."""

import pytest
import torch
from torch import nn

from scpl_compile.errors import TrainingError
from stage_nets import WIDTH, LossStage, batches, module_with_step, run_stage, step_of


def test_losses_are_taken_once_in_the_order_of_steps() -> None:
    stage = step_of(LossStage(1.0, 4.0, 9.0))
    data = {step: batches(1)[0] for step in range(3)}
    run_stage(stage, {0: data[0], 1: data[1]})
    assert stage.take_losses() == [(0, {"a": 1.0, "b": 2.0}), (1, {"a": 4.0, "b": 2.0})]
    run_stage(stage, {2: data[2]})
    assert stage.take_losses() == [(2, {"a": 9.0, "b": 2.0})]
    assert stage.take_losses() == []


def test_losses_that_nobody_takes_are_bounded_and_bad_ones_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("scpl_compile.runtime.stage_step.KEPT_LOSSES", 3)
    stage = step_of(LossStage(*[float(value) for value in range(9)]))
    data = {step: batches(1)[0] for step in range(8)}
    run_stage(stage, data)
    assert [(step, row["a"]) for step, row in stage.take_losses()] == [(5, 5), (6, 6), (7, 7)]
    run_stage(stage, {8: data[0]})
    assert [step for step, _ in stage.take_losses()] == [8]
    bad = step_of(LossStage(1.0, float("nan"), *[1.0] * 6))
    run_stage(bad, data)
    with pytest.raises(TrainingError, match="the loss is not finite since step 1;"):
        bad.take_losses()


def test_losses_of_any_dtype_and_shape_of_one_element() -> None:
    module = nn.Linear(WIDTH, 1)
    module.training_step = lambda x, *, labels: (
        (),
        {"half": module(x).sum().bfloat16() * 0 + 1.5, "wide": x.double().sum().view(1) * 0 + 0.25},
    )
    stage = step_of(module)
    run_stage(stage, {0: batches(1)[0]})
    assert stage.take_losses() == [(0, {"half": 1.5, "wide": 0.25})]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_bad_step_is_named_whatever_follows(bad: float) -> None:
    stage = step_of(LossStage(1.0, bad, 1.0, bad, 1.0))
    run_stage(stage, {step: batches(1)[0] for step in range(7, 12)})
    for ask in (stage.check_finite, stage.take_losses, stage.take_losses):
        with pytest.raises(TrainingError, match="stage 0: the loss is not finite since step 8;"):
            ask()


def test_parameters_of_a_state_can_be_checked_too() -> None:
    """A finite loss with an infinite gradient."""
    module = nn.Linear(WIDTH, 1)
    module.frozen = nn.Parameter(torch.full((2,), -float("inf")), requires_grad=False)
    stage = step_of(module_with_step(module))
    stage.check_finite(stage.state()[0])
    with torch.no_grad():
        module.bias.fill_(float("nan"))
    stage.check_finite()
    with pytest.raises(TrainingError, match="stage 0: parameter 'bias' is not finite"):
        stage.check_finite(stage.state()[0])
