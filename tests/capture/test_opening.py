"""Which modules are opened, and what is said where one is not."""

import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from capture_nets import Block, floats
from scpl_compile.capture.opening import (
    Frame,
    Untraceable,
    calls_through,
    check_model,
    is_library_leaf,
    never_opened,
    phrase,
    place,
    root_error,
    single_call,
    why_closed,
)
from scpl_compile.capture.state import ModelState, RandomState
from scpl_compile.errors import CaptureError


def test_modules_of_torch_are_leaves_and_containers_are_not() -> None:
    assert is_library_leaf(nn.Linear(2, 2)) and is_library_leaf(nn.LSTM(2, 2))
    assert not is_library_leaf(Block())
    for container in (nn.Sequential(), nn.ModuleList(), nn.ModuleDict()):
        assert not is_library_leaf(container)
    changed = nn.Linear(2, 2)
    parametrize.register_parametrization(changed, "weight", nn.Identity())
    assert never_opened(changed) == ""


def test_modules_that_are_never_opened() -> None:
    assert never_opened(Block()) == ""
    hooked, changed = Block(), Block()
    hooked.register_forward_hook(lambda module, args, result: None)
    changed.register_parameter("scale", nn.Parameter(torch.ones(1)))
    parametrize.register_parametrization(changed, "scale", nn.Identity())
    assert never_opened(hooked) == "hooks"
    assert never_opened(changed) == "parametrization"
    leaf = nn.Linear(2, 2)
    leaf.register_forward_hook(lambda module, args, result: None)
    assert never_opened(leaf) == ""


def test_why_a_module_is_closed() -> None:
    model = Block()
    state, randomness = ModelState.of(model), RandomState.now()
    assert why_closed(Frame("block"), state, randomness) == ""
    assert why_closed(Frame("block", "no_grad"), state, randomness) == "no_grad"
    random.random()
    assert why_closed(Frame("block"), state, randomness) == "random numbers drawn in Python"
    randomness.restore()
    model.count = 1
    assert why_closed(Frame("block"), state, randomness) == "changes its attribute 'count'"


def test_phrases_are_one_short_line() -> None:
    assert phrase(Untraceable("passes a Path on")) == "passes a Path on"
    assert phrase(ValueError("two\n  lines")) == "ValueError: two lines"
    long = phrase(ValueError("x" * 500))
    assert len(long) < 140 and long.endswith("…")


def test_the_place_of_an_error_is_outside_of_torch() -> None:
    def fails() -> None:
        torch.ones(2) @ torch.ones(3)

    with pytest.raises(RuntimeError) as raised:
        fails()
    assert place(raised.value).startswith("test_opening.py:")
    assert "Block itself cannot be traced at a.py:3 (why)" in str(
        root_error(Block(), "why", "a.py:3")
    )
    assert "itself cannot be traced (why)" in str(root_error(Block(), "why", ""))


class Variable(nn.Module):
    def forward(self, x, *args, scale, shift=0.0, **kwargs):
        return x


def test_inputs_must_fit_forward() -> None:
    check_model(Variable(), (floats(2), floats(2, name="scale")))
    check_model(Variable(), (floats(2), floats(2, name="scale"), floats(2, name="anything")))
    with pytest.raises(CaptureError, match="needs 'scale': describe it with --input"):
        check_model(Variable(), (floats(2),))
    with pytest.raises(CaptureError, match="--input y is not a parameter of Block.forward.*x"):
        check_model(Block(), (floats(2), floats(2, name="y")))


def test_a_single_call() -> None:
    trace = single_call(nn.Linear(2, 2), (floats(2, name="input"),))
    assert [n.op for n in trace.graph.nodes] == ["placeholder", "call_module", "output"]
    assert trace.calls == {}


def test_calls_pass_through_a_handler_until_the_end() -> None:
    seen: list[type[nn.Module]] = []

    def handler(module: nn.Module, call: Any, args: Any, kwargs: Any) -> Any:
        seen.append(type(module))
        return call(module, *args, **kwargs)

    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    original = nn.Module.__call__
    with pytest.raises(ZeroDivisionError), calls_through(handler):
        model(torch.ones(1, 2))
        raise ZeroDivisionError
    assert seen == [nn.Sequential, nn.Linear, nn.ReLU]
    assert nn.Module.__call__ is original
