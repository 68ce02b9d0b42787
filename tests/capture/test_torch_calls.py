"""A call of a torch function, as the interception sees it, is written as the user wrote it."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from scpl_compile.capture.torch_calls import property_name, torch_call, writes_first_argument


class Calls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def call_of(code: Callable[..., Any], *given: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    with Calls() as calls:
        code(*given)
    return calls.seen[0]


X, Y = torch.tensor([3.0, 5.0]), torch.tensor([2.0, 4.0])
INT, OTHER = torch.tensor([3, 5]), torch.tensor([2, 1])
A = torch.eye(2)

OPERATORS = [
    (operator.add, X, Y), (operator.add, X, 2.0), (operator.add, 2.0, X), (operator.sub, X, Y),
    (operator.sub, 1, X), (operator.mul, X, Y), (operator.mul, 3, X), (operator.truediv, X, Y),
    (operator.truediv, 1, X), (operator.floordiv, X, 2), (operator.floordiv, 7, X),
    (operator.mod, X, 2), (operator.mod, 7, X), (operator.pow, X, 2), (operator.pow, 2, X),
    (operator.matmul, A, X), (operator.eq, X, Y), (operator.ne, X, 3), (operator.lt, X, Y),
    (operator.le, 3, X), (operator.gt, X, 3), (operator.ge, X, Y), (operator.and_, INT, OTHER),
    (operator.or_, INT, OTHER), (operator.xor, INT, 1), (operator.and_, 1, INT),
    (operator.lshift, INT, OTHER),
    (operator.rshift, INT, 1), (operator.iadd, X, Y), (operator.isub, X, 1), (operator.imul, X, Y),
    (operator.itruediv, X, 2), (operator.ifloordiv, X, 2), (operator.imod, X, 2),
    (operator.ipow, X, 2), (operator.iand, INT, OTHER), (operator.ior, INT, OTHER),
    (operator.ixor, INT, OTHER),
    (operator.ilshift, INT, 1), (operator.irshift, INT, 1),
]  # fmt: skip


def copies(values: Any) -> list[Any]:
    return [v.clone() if isinstance(v, Tensor) else v for v in values]


@pytest.mark.parametrize(
    ("function", "left", "right"),
    OPERATORS,
    ids=[f"{f.__name__}{n}" for n, (f, _, _) in enumerate(OPERATORS)],
)
def test_an_operator_gives_the_same_again(function: Any, left: Any, right: Any) -> None:
    """Also where torch sees a method with swapped operands, and written memory."""
    given = copies((left, right))
    kind, target, args, kwargs = torch_call(*call_of(function, *copies(given)))
    args = tuple(copies(args)) if kind != "call_method" else args
    left_again, right_again = copies((left, right))
    expected = function(left_again, right_again)
    # The arguments that torch saw were written by the first call: give fresh ones in their order.
    order = [left, right] if _is_same_order(function, left, right) else [right, left]
    fresh = copies(order)
    found = (
        target(*fresh, **kwargs)
        if kind == "call_function"
        else getattr(fresh[0], target)(*fresh[1:], **kwargs)
    )
    assert torch.equal(found, expected)
    assert (found is fresh[0]) == (expected is left_again)


def _is_same_order(function: Any, left: Any, right: Any) -> bool:
    a, b = copies((left, right))
    func, args, kwargs = call_of(function, a, b)
    first = torch_call(func, args, kwargs)[2][0]
    return first is a or (not isinstance(first, Tensor) and first == a)


def written(code: Callable[..., Any], *given: Any) -> tuple[str, Any]:
    kind, target, _, _ = torch_call(*call_of(code, *given))
    return kind, target


def test_what_the_user_wrote() -> None:
    assert written(lambda x: x + 1, X) == ("call_function", operator.add)
    assert written(lambda x: 1 - x, X) == ("call_function", torch.rsub) or written(
        lambda x: 1 - x, X
    ) == ("call_function", operator.sub)
    assert written(lambda x: -x, X) == ("call_function", operator.neg)
    assert written(lambda x: ~x, INT) == ("call_function", operator.invert)
    assert written(lambda x: x[0], X) == ("call_function", operator.getitem)
    assert written(lambda x: x.view(2, 1), X) == ("call_method", "view")
    assert written(lambda x: x.add(1, alpha=2), X) == ("call_method", "add")
    assert written(lambda x: torch.relu(x), X) == ("call_function", torch.relu)
    assert written(lambda x: F.softmax(x, -1), X) == ("call_function", F.softmax)


def test_an_item_is_assigned_by_a_function() -> None:
    x = X.clone()

    def assign(x: Tensor) -> None:
        x[0] = 7.0

    kind, target, args, kwargs = torch_call(*call_of(assign, x))
    assert (kind, target, kwargs) == ("call_function", operator.setitem, {})
    assert args[0] is x and args[1:] == (0, 7.0)


def test_properties_have_names() -> None:
    assert property_name(call_of(lambda x: x.T, A)[0]) == "T"
    assert property_name(call_of(lambda x: x.data, A)[0]) == "data"
    assert property_name(torch.relu) == ""

    def assign(x: Tensor) -> None:
        x.data = x

    assert property_name(call_of(assign, A.clone())[0]) == "data"


@pytest.mark.parametrize(
    ("target", "is_write"),
    [
        ("add_", True), ("add", False), ("__setitem__", True), ("__getitem__", False),
        ("zero_", True), ("__init__", False), (operator.iadd, True), (operator.add, False),
        (operator.setitem, True), (torch.relu_, True), (torch.relu, False), (Tensor.add_, True),
        (Tensor.__iadd__, True), (Tensor.__ipow__, True), (operator.ipow, True),
        (F.relu_, True), (operator.ior, True), (operator.inv, False), (operator.index, False),
    ],
)  # fmt: skip
def test_what_writes_its_first_argument_is_known_by_name(target: Any, is_write: bool) -> None:
    assert writes_first_argument(target) is is_write
