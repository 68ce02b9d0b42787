"""What a call gives when it gives more than one tensor."""

import operator
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest

from scpl_compile.capture.values import Fields, leaves, parts, plain_fields


@dataclass
class Result:
    first: Any
    second: Any = None


@dataclass
class Output(OrderedDict[str, Any]):
    """A mapping that is a dataclass too, as transformers' outputs are."""

    a: Any

    def __post_init__(self) -> None:
        self["a"] = self.a


Pair = namedtuple("Pair", ["a", "b"])


@pytest.mark.parametrize("value", [(1, 2), [1, (2,)], {"a": 1}, Pair(1, 2), 3, None, "text"])
def test_what_is_no_dataclass_stays(value: Any) -> None:
    assert plain_fields(value) is value


def test_a_dataclass_is_its_fields_and_a_type_is_none() -> None:
    assert plain_fields(Result(1, (2,))) == Fields(first=1, second=(2,))
    assert isinstance(plain_fields(Result(1)), Fields)
    assert plain_fields(Result) is Result
    made = Output(1)
    assert plain_fields(made) is made


@pytest.mark.parametrize(
    "value", [(1, 2), [3, 4], {"a": 5, "b": 6}, Pair(7, 8), Result(9, 10), Output(1), ()]
)
def test_every_part_is_read_by_its_function(value: Any) -> None:
    for key, item, read in parts(value):
        assert read(value, key) is item
        assert read is (getattr if isinstance(value, Result) else operator.getitem)
    assert len(list(parts(value))) == (2 if isinstance(value, Result) else len(value))


def test_leaves_are_what_is_inside() -> None:
    value = {"a": (1, [2, Result(3, {"b": 4})]), "c": None, "d": ()}
    assert list(leaves(value)) == [1, 2, 3, 4, None]
    assert list(leaves(5)) == [5]
