"""Optimizers by name, and the learning rate of every step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from scpl_compile.errors import MethodError
from scpl_compile.runtime.optim import learning_rate, make_optimizer, optimizer_names


def weights(*, trainable: bool = True) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2), requires_grad=trainable)]


# ---------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("name", sorted(optimizer_names()))
def test_every_optimizer_of_torch_is_made_by_its_name(name: str) -> None:
    optimizer = make_optimizer(name, weights(), 0.5, {})
    assert optimizer is not None
    assert type(optimizer).__name__.lower() == name
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_lbfgs_needs_a_closure_and_is_left_out() -> None:
    assert {"adam", "adamw", "sgd"} <= optimizer_names().keys()
    assert not {"lbfgs", "optimizer"} & optimizer_names().keys()


def test_names_are_read_in_any_case_and_options_are_passed_on() -> None:
    optimizer = make_optimizer("SGD", weights(), 0.1, {"momentum": 0.9, "nesterov": True})
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.9 and optimizer.defaults["nesterov"]


def test_frozen_parameters_are_not_trained() -> None:
    frozen, trained = weights(trainable=False), weights()
    assert make_optimizer("adam", frozen, 0.1, {}) is None
    assert make_optimizer("adam", [], 0.1, {}) is None
    optimizer = make_optimizer("adam", frozen + trained, 0.1, {})
    assert optimizer is not None and optimizer.param_groups[0]["params"] == trained


@pytest.mark.parametrize("trainable", [True, False])
def test_an_unknown_name_is_refused_with_the_known_ones(trainable: bool) -> None:
    with pytest.raises(MethodError, match="'adamm' is not one of adadelta, .*, adam, adamax"):
        make_optimizer("adamm", weights(trainable=trainable), 0.1, {})


@pytest.mark.parametrize(
    ("name", "lr", "options"),
    [
        ("adam", -1.0, {}),
        ("adam", 0.1, {"momentum": 0.9}),
        ("sgd", 0.1, {"nesterov": True}),
        ("adam", 0.1, {"eps": "small"}),
        ("adam", 0.1, {"fused": True, "foreach": True}),
    ],
)
def test_what_torch_refuses_is_told_in_one_sentence(
    name: str, lr: float, options: dict[str, bool | float | str]
) -> None:
    with pytest.raises(MethodError, match=f"optimizer {name!r} refuses lr={lr}, .*: "):
        make_optimizer(name, weights(), lr, options)


def test_what_an_optimizer_does_not_train_is_told() -> None:
    bias = [nn.Parameter(torch.ones(2))]
    with pytest.raises(MethodError, match="optimizer 'muon' refuses.*2D"):
        make_optimizer("muon", bias, 0.1, {})


# ---------------------------------------------------------------------- the learning rate


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
