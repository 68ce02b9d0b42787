"""describe_inputs: example tensors as specs."""

import pytest
import torch
from torch import Tensor, nn

from scpl_compile.errors import SourceError
from scpl_compile.inputs import describe_inputs, forward_parameters
from scpl_compile.ir import InputSpec


class Text(nn.Module):
    """Takes two inputs, one of them with a default."""

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, *rest: Tensor, **more: int
    ) -> Tensor:
        return ids


class Variadic(nn.Module):
    """Names nothing."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0]


IMAGES = torch.randn(5, 3, 8, 8)
IDS, MASK = torch.tensor([[3, 7, 0], [2, 2, 9]]), torch.tensor([[1, 1, 0], [1, 0, 0]])


def test_the_parameters_of_forward_are_the_names() -> None:
    assert forward_parameters(Text()) == ("ids", "mask")
    assert forward_parameters(nn.Linear(2, 2)) == ("input",)
    assert forward_parameters(Variadic()) == ("input",)


def test_one_tensor() -> None:
    specs, batch_size = describe_inputs(nn.Conv2d(3, 4, 3), IMAGES)
    assert specs == (InputSpec(name="input", dtype="float32", shape=(3, 8, 8)),)
    assert batch_size == 5


def test_several_by_position_or_by_name() -> None:
    ids = InputSpec(name="ids", dtype="int64", shape=(3,), high=10)
    mask = InputSpec(name="mask", dtype="int64", shape=(3,), high=2)
    assert describe_inputs(Text(), (IDS, MASK)) == ((ids, mask), 2)
    assert describe_inputs(Text(), {"mask": MASK, "ids": IDS}) == ((mask, ids), 2)
    assert describe_inputs(Text(), [IDS]) == ((ids,), 2)


def test_integers_are_bounded_by_the_largest_and_flags_by_nothing() -> None:
    assert describe_inputs(Text(), torch.zeros(2, 3, dtype=torch.int64))[0][0].high == 2
    (spec,), _ = describe_inputs(Text(), MASK.bool())
    assert spec == InputSpec(name="ids", dtype="bool", shape=(3,))


def test_one_number_per_sample() -> None:
    (spec,), batch_size = describe_inputs(Text(), torch.randn(4))
    assert spec.shape == () and batch_size == 4


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((IDS, MASK, IDS), "forward takes 2 inputs, 3 are given"),
        ({"words": IDS}, "forward takes ids, mask, and no 'words'"),
        ((IDS, MASK[:1]), r"batch sizes differ: \{'ids': 2, 'mask': 1\}; the batch comes first"),
        ((), "no example input"),
        ({}, "no example input"),
        (torch.tensor(3.0), r"input 'ids' is \(\); give a tensor, the batch first"),
        (torch.empty(0, 3), r"input 'ids' is \(0, 3\); give a tensor"),
        ((IDS, 3), "input 'mask' is int; give a tensor"),
        ([[1, 2]], "input 'ids' is list; give a tensor"),
    ],
)
def test_what_cannot_be_described_is_refused(inputs: object, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        describe_inputs(Text(), inputs)  # type: ignore[arg-type]
