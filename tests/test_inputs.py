"""Example tensors and text as specs, and specs as random inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from scpl_compile.errors import SourceError
from scpl_compile.inputs import (
    describe_inputs,
    example_inputs,
    forward_parameters,
    parse_inputs,
)
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


# ---------------------------------------------------------------------- text


def test_an_unnamed_input_is_the_parameter_at_its_position():
    assert parse_inputs("3x32x32", ["x"]) == (
        InputSpec(name="x", dtype="float32", shape=(3, 32, 32)),
    )
    assert [spec.name for spec in parse_inputs("4, int64:5<9", ["image", "ids"])] == [
        "image",
        "ids",
    ]


def test_named_inputs_have_dtypes_and_bounds():
    assert parse_inputs("mask:int64:128<2,ids:int64:128<30000", ["ids", "mask"]) == (
        InputSpec(name="mask", dtype="int64", shape=(128,), high=2),
        InputSpec(name="ids", dtype="int64", shape=(128,), high=30000),
    )
    assert parse_inputs("bfloat16:8x4", ["x"])[0].dtype == "bfloat16"
    assert parse_inputs("age:int64:<100", ["age"])[0].shape == ()


NAMES = st.sampled_from(("x", "ids", "mask"))
SIZES = st.lists(st.integers(1, 99), max_size=4).map(tuple)
FLOATS = st.sampled_from(("float32", "bfloat16", "bool"))
INTEGERS = st.sampled_from(("int64", "uint8"))
FLOAT_SPECS = st.builds(InputSpec, name=NAMES, dtype=FLOATS, shape=SIZES)
INTEGER_SPECS = st.builds(
    InputSpec, name=NAMES, dtype=INTEGERS, shape=SIZES, high=st.integers(1, 200)
)
ENDED_SPECS = st.integers(2, 200).flatmap(
    lambda high: st.builds(
        InputSpec,
        name=NAMES,
        dtype=INTEGERS,
        shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
        high=st.just(high),
        last=st.integers(0, high - 1),
    )
)
SPECS = st.one_of(FLOAT_SPECS, INTEGER_SPECS, ENDED_SPECS)


@given(st.lists(SPECS, min_size=1, unique_by=lambda spec: spec.name))
def test_inputs_read_back_what_their_text_says(specs):
    assert parse_inputs(",".join(map(str, specs)), ["ids", "mask", "x"]) == tuple(specs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "input '' is not"),
        ("3x32x", "input '3x32x' is not .*SHAPE.*, as in 3x32x32"),
        ("a:b:c:3", "input 'a:b:c:3' is not"),
        ("x:float31:3", "dtype 'float31' is not one of float32"),
        ("y:3", "forward has no 'y'; it has x, mask"),
        ("3,4,5", "input '5': forward takes 2 inputs, not more"),
        ("mask:3,4", "input '4': mask is given twice"),
        ("3x0", "input '3x0': a size or a bound is 0"),
        ("x:int64:8<0", "a size or a bound is 0"),
        ("x:int64:8", "int64 needs its bound <high, as in"),
        ("x:3<9", "float32 takes no bound <9"),
        ("x:3<9..2", "float32 takes no bound <9"),
        ("x:int64:3<9..9", "rows of numbers below 9 cannot end in 9"),
        ("x:int64:3<1..0", "rows of numbers below 1 cannot end in 0"),
        ("x:int64:<9..2", "rows of numbers below 9 cannot end in 2"),
        ("x:int64:3..2", "is not .*SHAPE"),
    ],
)
def test_a_wrong_input_is_named(text, message):
    with pytest.raises(SourceError, match=message):
        parse_inputs(text, ["x", "mask"])


# ---------------------------------------------------------------------- examples


@given(ENDED_SPECS.filter(lambda spec: spec.dtype == "int64"), st.integers(0, 9))
def test_a_row_ends_in_its_last_number_and_has_it_nowhere_else(spec, seed):
    (values,) = example_inputs((spec,), 3, seed)
    assert (values[..., -1] == spec.last).all()
    assert not (values[..., :-1] == spec.last).any()
    assert 0 <= values.min() and values.max() < spec.high


def test_example_inputs_have_their_shapes_dtypes_and_bounds():
    text = "image:3x8,ids:int64:6<50,low:bfloat16:2,age:int32:<9,flag:bool:3"
    specs = parse_inputs(text, ["image", "ids", "low", "age", "flag"])
    image, ids, low, age, flag = example_inputs(specs, batch_size=64)
    assert (image.shape, image.dtype) == ((64, 3, 8), torch.float32)
    assert abs(image.mean()) < 0.2 and abs(image.std() - 1) < 0.2
    assert (ids.shape, ids.dtype) == ((64, 6), torch.int64)
    assert ids.min() >= 0 and ids.max() < 50 and len(ids.unique()) > 30
    assert (low.shape, low.dtype) == ((64, 2), torch.bfloat16)
    assert (age.shape, age.dtype) == ((64,), torch.int32)
    assert (flag.shape, flag.dtype) == ((64, 3), torch.bool)


@pytest.mark.parametrize("text", ["int64:5<2", "bool:5", "bool:5x5"])
def test_no_row_of_a_mask_is_empty(text):
    (mask,) = example_inputs(parse_inputs(text, ["mask"]), batch_size=32)
    assert mask[..., 0].all()
    assert not mask.all()


def test_the_seed_decides_the_example():
    specs = parse_inputs("3,int64:4<100", ["x", "ids"])
    state = torch.get_rng_state()
    first, again, other = (example_inputs(specs, 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
