"""Running a model twice from one start, and comparing what the two runs gave."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from scpl_compile.errors import ProgramError, VerifyError
from scpl_compile.runtime.stage import StopGradient
from scpl_compile.verify.compare import (
    RTOL,
    compare_gradients,
    copies,
    difference,
    running,
    same_start,
    stops_open,
    taken_gradients,
    undisturbed,
    weighted,
)

SIDES = ("the stages", "the model")

# ---------------------------------------------------------------------- differences


def test_a_difference_is_relative_to_the_largest_element() -> None:
    truth = torch.tensor([1.0, -200.0, 0.0])
    assert difference(truth, truth) == 0.0
    assert difference(truth + torch.tensor([0.0, 0.0, 0.2]), truth) == pytest.approx(1e-3)
    assert difference(torch.empty(0, 3), torch.empty(0, 3)) == 0.0


@pytest.mark.parametrize(
    "actual",
    [torch.ones(3, 1), torch.ones(3, dtype=torch.float64), torch.tensor([1.0, 1.0, float("nan")])],
    ids=["shape", "dtype", "nan"],
)
def test_another_shape_dtype_or_nan_is_infinitely_different(actual: Tensor) -> None:
    assert difference(actual, torch.ones(3)) == float("inf")


def test_equal_infinities_are_no_difference() -> None:
    inf = float("inf")
    bounds = torch.tensor([-inf, 100.0, inf])
    assert difference(bounds, bounds) == 0.0
    assert difference(torch.tensor(inf), torch.tensor(inf)) == 0.0
    assert difference(torch.tensor([-inf, 101.0, inf]), bounds) == pytest.approx(0.01)
    assert difference(torch.tensor([-inf, 100.0, 1e9]), bounds) == inf
    assert difference(-bounds, bounds) == inf


def test_zeros_differ_from_anything_else() -> None:
    assert difference(torch.full((2,), 1e-6), torch.zeros(2)) > RTOL
    assert difference(torch.tensor([True, False]), torch.tensor([True, True])) == 1.0


# ---------------------------------------------------------------------- gradients


def prints(parameter: nn.Parameter, gradient: Tensor) -> dict[str, tuple[float, ...]]:
    with taken_gradients({"w": parameter}) as found:
        (parameter * gradient).sum().backward()
    return found


@given(st.integers(min_value=0, max_value=2**31), st.floats(min_value=1e-2, max_value=1.0))
def test_a_fingerprint_shows_a_change_of_any_element(seed: int, size: float) -> None:
    draws = torch.Generator().manual_seed(seed)
    parameter, gradient = nn.Parameter(torch.zeros(40)), torch.randn(40, generator=draws)
    expected = prints(parameter, gradient)
    assert compare_gradients(prints(parameter, gradient.clone()), expected, SIDES) == 0.0
    changed = gradient.clone()
    changed[int(torch.randint(40, (1,), generator=draws))] += size * float(gradient.norm())
    with pytest.raises(VerifyError, match="the gradient of 'w' differs by"):
        compare_gradients(prints(parameter, changed), expected, SIDES)


def test_the_order_of_elements_matters() -> None:
    parameter, gradient = nn.Parameter(torch.zeros(6)), torch.arange(6.0)
    with pytest.raises(VerifyError):
        compare_gradients(prints(parameter, gradient.flip(0)), prints(parameter, gradient), SIDES)


def test_the_order_of_large_parts_matters_too() -> None:
    parameter, gradient = nn.Parameter(torch.zeros(4, 2**16)), torch.arange(4.0)[:, None]
    with pytest.raises(VerifyError):
        compare_gradients(prints(parameter, gradient.flip(0)), prints(parameter, gradient), SIDES)


def test_a_gradient_on_one_side_is_named() -> None:
    found = {"a": (1.0, 0.0, 0.0), "b": (1.0, 0.0, 0.0)}
    with pytest.raises(VerifyError, match="'b' gets a gradient only in the model"):
        compare_gradients({"a": found["a"]}, found, SIDES)
    with pytest.raises(VerifyError, match="'b' gets a gradient only in the stages"):
        compare_gradients(found, {"a": found["a"]}, SIDES)


def test_a_gradient_that_is_not_finite_is_told_as_that_and_where() -> None:
    nan, one = (math.nan, 0.0, 0.0), (1.0, 0.0, 0.0)
    with pytest.raises(VerifyError, match="the gradient of 'a' is not finite in the stages"):
        compare_gradients({"a": nan}, {"a": one}, SIDES)
    with pytest.raises(VerifyError, match="the gradient of 'a' is not finite in the model"):
        compare_gradients({"a": nan}, {"a": nan}, SIDES)


def test_gradients_are_taken_and_not_kept() -> None:
    model = nn.Linear(3, 2)
    with taken_gradients(dict(model.named_parameters())) as found:
        model(torch.ones(1, 3)).sum().backward()
    assert set(found) == {"weight", "bias"}
    assert found["bias"][0] == pytest.approx(2**0.5)
    assert all(parameter.grad is None for parameter in model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    assert model.bias.grad is not None  # the hooks are gone


def test_every_element_has_its_own_weight() -> None:
    value = torch.zeros(50, requires_grad=True)
    weighted(value).backward()
    assert len(set(value.grad.tolist())) == 50


# ---------------------------------------------------------------------- runs


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_runs_begin_with_the_same_state_and_leave_none() -> None:
    model = nn.BatchNorm1d(3)
    state = torch.get_rng_state()
    with same_start(model):
        first = (draws(), model(torch.randn(4, 3)), model.running_mean.clone())
    with same_start(model):
        assert model.num_batches_tracked == 0
        second = (draws(), model(torch.randn(4, 3)), model.running_mean.clone())
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(model.running_mean, torch.zeros(3))


def test_no_parameter_is_constant_inside_and_all_are_as_before_outside() -> None:
    model = nn.ParameterList(
        [torch.zeros(5), torch.ones(5), torch.full((5,), -1e-6), torch.randn(5), torch.zeros(())]
    )
    model.append(nn.Parameter(torch.ones(5, dtype=torch.int8), requires_grad=False))
    model.append(nn.Parameter(torch.empty(0)))
    before = [parameter.clone() for parameter in model]
    with undisturbed(model):
        zeros, ones, tiny, drawn, scalar, integers, _ = model
        for varied in (zeros, ones, tiny):
            assert len(set(varied.tolist())) == 5
        assert 0 <= zeros.min() and zeros.max() <= 0.1
        assert 1 <= ones.min() and ones.max() <= 1.1
        assert -1.1e-6 <= tiny.min() and tiny.max() <= -1e-6
        assert scalar > 0
        assert torch.equal(drawn, before[3]) and torch.equal(integers, before[5])
    assert all(map(torch.equal, model, before))


def test_gradients_are_put_back_also_after_an_error() -> None:
    model = nn.Linear(2, 2)
    model.weight.grad = kept = torch.ones(2, 2)
    with pytest.raises(RuntimeError):
        with undisturbed(model):
            assert model.weight.grad is None
            model(torch.ones(1, 2)).sum().backward()
            raise RuntimeError
    assert model.weight.grad is kept
    assert model.bias.grad is None


def test_stops_are_open_only_inside() -> None:
    stage = nn.Sequential(nn.Linear(2, 2), StopGradient())
    x = torch.ones(1, 2)
    assert not stage(x).requires_grad
    with stops_open([stage]):
        assert stage(x).requires_grad
    assert not stage(x).requires_grad


def test_copies_are_leaves_of_their_own() -> None:
    source = torch.ones(2, requires_grad=True) * 2
    plain, tracked = copies([torch.ones(2), source])
    assert not plain.requires_grad
    assert tracked.is_leaf and tracked.requires_grad and tracked is not source


def test_a_failure_of_the_code_that_runs_is_told_in_one_line() -> None:
    with pytest.raises(VerifyError, match="^stage 1 fails: ValueError: two lines$"):
        with running("stage 1"):
            raise ValueError("two\n  lines")
    with pytest.raises(ProgramError, match="^as it is$"):
        with running("stage 1"):
            raise ProgramError("as it is")
    with pytest.raises(KeyboardInterrupt):
        with running("stage 1"):
            raise KeyboardInterrupt
