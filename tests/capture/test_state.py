"""What capture may change in a model is noticed and put back."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from scpl_compile.capture.state import ModelState, RandomState, host_random_state, preserved


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.tensor([1.0, float("nan"), 3.0]))
        self.number = 1
        self.items = [1, 2]
        self.names = {"a": 1}
        self.generator = torch.Generator()
        self.python = random.Random(1)
        self.numpy = np.random.default_rng(1)
        self.numpy_legacy = np.random.RandomState(1)


CHANGES = {
    "number": lambda m: setattr(m, "number", 2),
    "items": lambda m: m.items.append(3),
    "names": lambda m: m.names.update(a=2),
    "generator": lambda m: torch.rand(1, generator=m.generator),
    "python": lambda m: m.python.random(),
    "numpy": lambda m: m.numpy.random(),
    "numpy_legacy": lambda m: m.numpy_legacy.rand(),
    "new": lambda m: setattr(m, "new", 1),
    "training": lambda m: m.inner.eval(),
    "inner": lambda m: setattr(m, "inner", nn.Identity()),
    "added": lambda m: setattr(m, "added", nn.Identity()),
    "weight": lambda m: setattr(m.inner, "weight", None),
    "table": lambda m: setattr(m, "table", torch.zeros(3)),
    "running_mean": lambda m: m.inner(torch.randn(4, 3)),
    "running_var": lambda m: m.inner.running_var.data.add_(1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named_and_undone(name: str) -> None:
    model = Model()
    before = [dict(module.__dict__) for module in model.modules()]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    state = ModelState.of(model)
    assert state.changed() == ""
    sources = [vars(model)[key] for key in ("python", "numpy", "numpy_legacy")]
    copies = copy.deepcopy(sources)
    CHANGES[name](model)
    assert state.changed().split(".")[-1] == name
    state.restore()
    assert state.changed() == ""
    assert [dict(module.__dict__) for module in model.modules()] == before
    draws = [[source.random() for source in group] for group in (sources, copies)]
    assert draws[0] == draws[1]
    assert model.number == 1 and model.items == [1, 2] and model.names == {"a": 1}
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), values[key].nan_to_num(7.0))


def test_equal_values_are_no_change() -> None:
    model = Model()
    state = ModelState.of(model)
    model.number = int("1")
    model.items[0] = int("1")
    model.table.add_(0)
    assert state.changed() == ""


def test_a_part_sees_only_its_own_changes() -> None:
    model = Model()
    part = ModelState.of(model).part(model.inner)
    model.number = 2
    assert part.changed() == ""
    model.inner.running_mean.add_(1)
    assert part.changed() == "running_mean"


def test_random_states_are_put_back() -> None:
    with preserved(Model()):  # this test leaves no trace either
        state = RandomState.now()
        assert RandomState.now() == state
        for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
            draw()
            assert RandomState.now() != state
            state.restore()
            assert RandomState.now() == state
        first = random.random(), float(np.random.rand()), float(torch.rand(1))
        state.restore()
        assert (random.random(), float(np.random.rand()), float(torch.rand(1))) == first


def test_host_random_state_leaves_out_torch() -> None:
    with preserved(Model()):
        state = host_random_state()
        torch.rand(1)
        assert host_random_state() == state
        np.random.rand()
        assert host_random_state() != state


def test_the_model_is_put_back_when_the_block_fails() -> None:
    model = Model()
    with pytest.raises(ZeroDivisionError), preserved(model):
        model.number = 1 // 0 + 1
    with pytest.raises(KeyError), preserved(model):
        model.number = 5
        raise KeyError
    assert model.number == 1
