"""The learning rate of every step, beside torch's own schedulers."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from scpl_compile.errors import MethodError
from scpl_compile.runtime.learning_rate import learning_rate, parse_lr_schedule

# ---------------------------------------------------------------------- constant, cosine


@given(st.floats(1e-6, 10), st.integers(0, 10**6), st.none() | st.integers(1, 10**6))
def test_constant_stays(lr: float, step: int, total_steps: int | None) -> None:
    assert learning_rate(lr, "constant", total_steps)(step) == lr
    assert learning_rate(lr, "cosine", None)(step) == lr


@given(st.floats(1e-6, 10), st.integers(1, 10**6))
def test_the_cosine_falls_from_lr_to_a_hundredth(lr: float, total_steps: int) -> None:
    rate = learning_rate(lr, "cosine", total_steps)
    assert rate(0) == pytest.approx(lr)
    assert rate(total_steps) == pytest.approx(lr / 100)
    assert rate(total_steps + 5) == rate(total_steps)
    middle = total_steps // 2
    expected = lr * (0.01 + 0.99 * (1 + math.cos(math.pi * middle / total_steps)) / 2)
    assert rate(middle) == pytest.approx(expected)


def test_the_cosine_never_rises() -> None:
    rate = learning_rate(1e-3, "cosine", 50)
    rates = [rate(step) for step in range(60)]
    assert rates == sorted(rates, reverse=True)
    assert rate(25) == pytest.approx((1e-3 + 1e-5) / 2)  # half way, half between the ends


def test_the_rate_is_a_function_of_the_step_alone() -> None:
    rate = learning_rate(1e-3, "cosine", 50)
    assert [rate(7), rate(3), rate(7)] == [learning_rate(1e-3, "cosine", 50)(s) for s in (7, 3, 7)]


def test_another_shape_or_no_step_is_refused() -> None:
    with pytest.raises(MethodError, match="lr_schedule 'linear' is not one of constant, cosine"):
        learning_rate(1e-3, "linear", 10)
    with pytest.raises(MethodError, match="total_steps is 0"):
        learning_rate(1e-3, "cosine", 0)


# ---------------------------------------------------------------------- torch's own

Make = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]

SCHEDULES: dict[str, Make] = {
    "StepLR:step_size=3,gamma=0.5": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR:milestones=2/7": lambda o: lr_scheduler.MultiStepLR(o, [2, 7]),
    "MultiStepLR:milestones=4": lambda o: lr_scheduler.MultiStepLR(o, [4]),
    "ExponentialLR:gamma=0.9": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "ConstantLR:total_iters=4": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lr_scheduler.LinearLR,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "CosineAnnealingLR:T_max=5": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts:T_0=3,T_mult=2": lambda o: (
        lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2)
    ),
    "PolynomialLR:power=2": lambda o: lr_scheduler.PolynomialLR(o, 20, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20, cycle_momentum=False),
    "OneCycleLR:max_lr=1,anneal_strategy=linear": lambda o: lr_scheduler.OneCycleLR(
        o, 1.0, 20, cycle_momentum=False, anneal_strategy="linear"
    ),
    "CyclicLR:base_lr=0.1,max_lr=0.3,step_size_up=4,mode=triangular2": lambda o: (
        lr_scheduler.CyclicLR(o, 0.1, 0.3, 4, mode="triangular2", cycle_momentum=False)
    ),
}


def rates_of(make: Make, num_steps: int) -> list[float]:
    """What a training loop with this scheduler trains with."""
    optimizer = torch.optim.SGD([torch.zeros(())], lr=0.1)
    scheduler = make(optimizer)
    rates = []
    for _ in range(num_steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if len(rates) < num_steps:
            scheduler.step()
    return rates


@pytest.mark.parametrize("text", SCHEDULES)
def test_the_rates_are_those_of_torchs_scheduler_in_any_order(text: str) -> None:
    expected = rates_of(SCHEDULES[text], 20)
    for order in (range(20), reversed(range(20)), (7, 3, 19, 3)):
        rate = learning_rate(0.1, text, 20)
        assert all(rate(step) == expected[step] for step in order)


def test_after_its_end_the_last_rate_of_one_cycle_stays() -> None:
    rate = learning_rate(0.1, "OneCycleLR", 20)
    assert rate(500) == rate(19) == rate(20)


def test_many_threads_may_ask() -> None:
    expected = rates_of(SCHEDULES["ExponentialLR:gamma=0.9"], 200)
    rate = learning_rate(0.1, "ExponentialLR:gamma=0.9", None)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(rate, reversed(range(200)))) == expected[::-1]


# ---------------------------------------------------------------------- warmup


@pytest.mark.parametrize("text", ["constant", "cosine", "StepLR:step_size=3"])
def test_the_first_steps_rise_linearly_to_where_the_schedule_begins(text: str) -> None:
    rate, after = learning_rate(0.1, text, 20, warmup=5), learning_rate(0.1, text, 15)
    rises = [rate(step) for step in range(5)]
    assert rises == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1]) and rises[4] == 0.1
    assert [rate(step) for step in range(5, 20)] == [after(step) for step in range(15)]


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(MethodError, match="warmup is 20 of 20 steps; give fewer"):
        learning_rate(0.1, "constant", 20, warmup=20)
    with pytest.raises(MethodError, match="warmup is -1"):
        learning_rate(0.1, "constant", 20, warmup=-1)
    assert learning_rate(0.1, "constant", None, warmup=20)(9) == pytest.approx(0.05)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ReduceLROnPlateau", "'ReduceLROnPlateau' needs a metric"),
        ("LambdaLR", "'LambdaLR' needs a function"),
        ("SequentialLR:milestones=3", "'SequentialLR' needs other schedulers"),
        ("LRScheduler", "'LRScheduler' is not one of constant, cosine, "),
        ("steplr", "'steplr' is not one of constant, .*, StepLR;"),
        ("cosine:eta_min=0", "cosine has no settings"),
        ("StepLR:step_size", "'step_size' is not name=value, as in StepLR:step_size=30"),
        ("StepLR:step_size=3,gamma=half", "gamma is 'half'; give a number"),
    ],
)
def test_what_is_no_schedule_is_named(text: str, told: str) -> None:
    with pytest.raises(MethodError, match=told):
        parse_lr_schedule(text)


@pytest.mark.parametrize(
    ("text", "total_steps"),
    [
        ("StepLR", 20),
        ("StepLR:step=3", 20),
        ("StepLR:step_size=0", 20),
        ("OneCycleLR", None),
        ("OneCycleLR:pct_start=7", 20),
        ("OneCycleLR:anneal_strategy=up", 20),
        ("MultiStepLR", 20),
        ("StepLR:step_size=3,last_epoch=4", 20),
    ],
)
def test_what_torch_refuses_is_told_in_one_sentence(text: str, total_steps: Any) -> None:
    with pytest.raises(MethodError, match=f"lr_schedule {text.partition(':')[0]} refuses "):
        learning_rate(0.1, text, total_steps)


def test_the_momentum_stays() -> None:
    with pytest.raises(MethodError, match="only the rate follows; no cycle_momentum"):
        learning_rate(0.1, "OneCycleLR:cycle_momentum=true", 20)
