"""Containers of tensors are read where they are made; parameters are read where they are used."""

from operator import getitem, iadd

import pytest
import torch
from torch import Tensor, nn

from capture_nets import floats, ids, node_of, same_result
from scpl_compile.capture import capture


class Chained(nn.Module):
    """Two LSTMs, the second starts from the state of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.one = nn.LSTM(6, 5, batch_first=True)
        self.two = nn.LSTM(5, 5, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x, state = self.one(self.table(ids))
        x = x.tanh()
        x, state = self.two(x, state)
        return x.mean(1) + state[0][-1]


def test_a_state_that_is_passed_on_crosses_as_tensors() -> None:
    model = Chained()
    captured = capture(model, (ids(7, 20),))
    two = node_of(captured, "two")
    assert [n.name for n in two.args[1]] == [n.name for n in two.all_input_nodes[1:]]
    assert [n.meta["tensor"].shape for n in two.all_input_nodes] == [
        (8, 7, 5),
        (1, 8, 5),
        (1, 8, 5),
    ]
    same_result(model, [captured], torch.randint(0, 20, (3, 7)))


def test_fields_are_read_right_after_their_container_is_made() -> None:
    captured = capture(Chained(), (ids(7, 20),))
    names = [n.target for n in captured.compute_nodes]
    one, two = names.index("one"), names.index("two")
    assert names[one + 1 : names.index("tanh")] == [getitem] * 4
    assert names[two + 1 : two + 4] == [getitem] * 3


def test_containers_of_opaque_modules() -> None:
    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            y = self.linear(x)
            return {"out": y, "pair": (y * 2, None, [y * 3])}

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gives = Gives()

        def forward(self, x):
            found = self.gives(x)
            y = torch.relu(x)
            return found["out"] + y + found["pair"][2][0], found["pair"]

    model = Takes()
    captured = capture(model, (floats(4),))
    names = [n.target for n in captured.compute_nodes]
    assert names[0] == "gives"
    assert all(target is getitem for target in names[1 : names.index(torch.relu)])
    assert len(captured.outputs) == 3
    same_result(model, [captured], torch.randn(3, 4))


def test_every_user_of_a_parameter_reads_its_own() -> None:
    class Reuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x):
            scale = self.scale
            return (x * scale).tanh() * scale

    model = Reuses()
    captured = capture(model, (floats(4),))
    reads = captured.graph.find_nodes(op="get_attr")
    assert [len(read.users) for read in reads] == [1, 1]
    assert all(read.next in read.users for read in reads)
    same_result(model, [captured], torch.randn(3, 4))


def test_attributes_that_nothing_uses_are_not_read() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            batch, channels = x.shape
            assert self.weight.shape[0] == channels
            return x

    assert capture(Asks(), (floats(4),)).compute_nodes == ()


class Writes(nn.Module):
    """A model whose forward is a given function of (a linear layer, x)."""

    def __init__(self, function) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self._function = function

    def forward(self, x):
        return self._function(self.linear, x)


def two_writes(linear, x):
    y = linear(x)
    y += x
    y *= 2.0
    return y.relu_().view(-1, 2, 2)


def read_again(linear, x):
    y = z = linear(x)
    y += x
    return y + z


def view_read_again(linear, x):
    y = linear(x)
    part = y[:, :2]
    y += x
    return part


def of_an_input(linear, x):
    x += 1.0
    return linear(x)


def other_dtype(linear, x):
    y = linear(x).bfloat16()
    y += x
    return y


@pytest.mark.parametrize(
    ("function", "writes"),
    [
        (two_writes, ["relu_"]),
        (read_again, [iadd]),
        (view_read_again, [iadd]),
        (of_an_input, [iadd]),
        (other_dtype, [iadd]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_write_that_nobody_else_sees_becomes_a_new_tensor(function, writes) -> None:
    model = Writes(function)
    captured = capture(model, (floats(4),))
    found = [n.target for n in captured.compute_nodes if n.meta["mutates"]]
    assert found == writes
    same_result(model, [captured], torch.randn(3, 4))


def test_what_follows_a_removed_write_is_based_on_the_new_tensor() -> None:
    captured = capture(Writes(two_writes), (floats(4),))
    bases = {n.name: n.meta["base"] for n in captured.compute_nodes}
    assert bases == {
        "linear": "linear",
        "iadd": "iadd",
        "imul": "imul",
        "relu_": "imul",
        "view": "imul",
    }
