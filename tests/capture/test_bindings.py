"""What a value stands for in a recorded graph, and what is left after a module is taken back."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scpl_compile.capture.bindings import Bindings
from scpl_compile.capture.opening import Frame, Untraceable


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.table = torch.rand(2)
        self.register_buffer("count", torch.zeros(2))


def begun(model: nn.Module) -> tuple[Bindings, Tensor]:
    """The bindings of a recording that has one input."""
    bindings = Bindings(model, [Frame("")], lambda function, value: function(value))
    value = torch.rand(3, 2)
    bindings.bind(value, bindings.graph.placeholder("x"))
    bindings.finish_inputs()
    return bindings, value


def names(bindings: Bindings) -> list[str]:
    return [node.name for node in bindings.graph.nodes]


def test_a_tensor_is_the_node_that_gave_it() -> None:
    model = Model()
    bindings, x = begun(model)
    assert bindings.tensor(x).name == "x"
    assert bindings.argument([x, {"scale": 2.0}, slice(0, x)]) == [
        bindings.tensor(x), {"scale": 2.0}, slice(0, bindings.tensor(x))
    ]  # fmt: skip
    assert bindings.argument(x.device) is bindings.device


@pytest.mark.parametrize("name", ["linear.weight", "table", "count"])
def test_what_the_model_holds_is_read_by_name(name: str) -> None:
    model = Model()
    bindings, _ = begun(model)
    value: Any = model
    for part in name.split("."):
        value = getattr(value, part)
    node = bindings.tensor(value)
    assert (node.op, node.target) == ("get_attr", name)


def test_what_is_neither_is_refused() -> None:
    model = Model()
    bindings, _ = begun(model)
    with pytest.raises(Untraceable, match="neither parameter nor buffer"):
        bindings.argument(torch.rand(2))
    with pytest.raises(Untraceable, match="passes a Model on"):
        bindings.argument(Model())


def test_a_tensor_that_is_given_back_gets_an_object_of_its_own() -> None:
    model = Model()
    bindings, x = begun(model)
    node = bindings.node("call_method", "contiguous", (bindings.tensor(x),), {})
    again = bindings.bind(x, node)
    assert again is not x
    assert (bindings.tensor(x).name, bindings.tensor(again).name) == ("x", "contiguous")


def test_nothing_is_left_of_what_is_rolled_back() -> None:
    model = Model()
    bindings, x = begun(model)
    before, mark = names(bindings), bindings.mark()
    y = x + 1
    bindings.bind(y, bindings.operation(torch.add, bindings.tensor(x), 1))
    bindings.stand_for(x, bindings.operation(torch.neg, bindings.tensor(y)))
    assert bindings.tensor(x).name == "neg"
    bindings.roll_back(mark)
    assert names(bindings) == before
    assert bindings.tensor(x).name == "x"
    with pytest.raises(Untraceable):
        bindings.tensor(y)
