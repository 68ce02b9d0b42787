"""Sizes that depend on the batch become nodes, and nothing is concluded about the batch size."""

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from scpl_compile.capture.opening import Untraceable
from scpl_compile.capture.symbols import BatchSymbols, data_symbols, expression_nodes

EXAMPLE = 8


class Symbols:
    """A batch size as a symbol, and what is asked about it."""

    def __init__(self, on_data: Any = lambda question, is_claimed: None) -> None:
        self.asked: list[tuple[str, bool]] = []
        note = lambda question, fixes: self.asked.append((question, fixes))  # noqa: E731
        self.env = BatchSymbols(note, on_data)
        self.mode = mode = FakeTensorMode(shape_env=self.env)
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK, DimDynamic.STATIC])
        self.tensor = mode.from_tensor(torch.empty(EXAMPLE, 3), symbolic_context=context)
        self.batch: Any = self.tensor.shape[0]


def computed(value: Any, symbols: Symbols, batch: int) -> Any:
    """What the nodes for `value` compute at a batch size."""
    graph = Graph()
    size = graph.placeholder("size")
    result = expression_nodes(
        value.node.expr, lambda symbol: size, lambda f, *args: graph.call_function(f, args)
    )
    values: dict[Node, Any] = {size: batch}
    for node in graph.nodes:
        if node.op == "call_function":
            args = [values[a] if isinstance(a, Node) else a for a in node.args]
            values[node] = node.target(*args)
    return values[result] if isinstance(result, Node) else result


EXPRESSIONS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda b: b,
    "times": lambda b: b * 4,
    "sum": lambda b: 2 * b + 3,
    "difference": lambda b: b - 1,
    "negative": lambda b: -b,
    "from a number": lambda b: 100 - 3 * b,
    "floor division": lambda b: b // 2,
    "of a sum": lambda b: (3 * b + 1) // 2,
    "remainder": lambda b: b % 3,
    "square": lambda b: b**2,
    "product": lambda b: b * (b + 1),
    "true division": lambda b: b / 4,
    "reciprocal": lambda b: 1.0 / b,
    "root": lambda b: b**-0.5,
    "float": lambda b: 2.0 * b,
}


@pytest.mark.parametrize("name", EXPRESSIONS)
@pytest.mark.parametrize("batch", [2, 5, 8, 13])
def test_an_expression_is_what_python_computes(name: str, batch: int) -> None:
    function = EXPRESSIONS[name]
    symbols = Symbols()
    found = computed(function(symbols.batch), symbols, batch)
    expected = function(batch)
    assert type(found) is type(expected)
    assert math.isclose(found, expected, rel_tol=1e-12)
    assert symbols.asked == []


def test_another_operation_is_refused() -> None:
    symbols = Symbols()
    value = torch.sym_max(symbols.batch, 11)
    with pytest.raises(Untraceable, match="computes Max"):
        computed(value, symbols, 8)


QUESTIONS: dict[str, tuple[Callable[[Any], Any], Any, str, bool]] = {
    "more": (lambda b: bool(b > 4), True, "batch > 4", False),
    "less": (lambda b: bool(b < 4), False, "batch < 4", False),
    "equal": (lambda b: bool(b == EXAMPLE), True, "Eq(batch, 8)", True),
    "another": (lambda b: bool(b == 9), False, "Eq(batch, 9)", False),
    "not another": (lambda b: bool(b != EXAMPLE), False, "Ne(batch, 8)", True),
    "integer": (lambda b: int(b), EXAMPLE, "batch", True),
    "range": (lambda b: len(range(b)), EXAMPLE, "batch", True),
    "of an expression": (lambda b: bool(b * 2 > 10), True, "2*batch > 10", False),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_is_answered_for_the_example_and_told(name: str) -> None:
    question, answer, text, fixes = QUESTIONS[name]
    symbols = Symbols()
    assert question(symbols.batch) == answer
    assert symbols.asked == [(text, fixes)]


@pytest.mark.parametrize("name", QUESTIONS)
def test_nothing_is_remembered(name: str) -> None:
    """The symbol stays a symbol; torch's own record would put 8 in its place."""
    symbols = Symbols()
    for _ in range(2):
        QUESTIONS[name][0](symbols.batch)
        assert symbols.tensor.shape[0].node.expr.is_Symbol
        assert computed(symbols.tensor.shape[0] * 2, symbols, 5) == 10
    assert len(symbols.asked) == 2
    assert symbols.env.guards == []


@pytest.mark.parametrize(
    "question",
    [lambda b: b > 0, lambda b: b >= 1, lambda b: b != 0, lambda b: b == b, lambda b: b * 2 > b],
)
def test_what_holds_at_every_batch_size_is_no_question(question: Callable[[Any], Any]) -> None:
    symbols = Symbols()
    assert bool(question(symbols.batch))
    assert symbols.asked == []


@pytest.mark.parametrize("compare", [operator.lt, operator.le, operator.gt, operator.ge])
@pytest.mark.parametrize("batch", [3, 4, 5])
def test_comparisons_are_nodes_too(compare: Callable[[Any, Any], Any], batch: int) -> None:
    symbols = Symbols()
    assert computed(compare(symbols.batch * 2, 8), symbols, batch) is compare(batch * 2, 8)
    assert symbols.asked == []


def from_data(symbols: Symbols) -> Any:
    """A number that depends on data."""
    symbols.env.follows_data = True
    with symbols.mode:
        return (symbols.tensor > 0).sum().item()


def test_numbers_that_depend_on_data_raise_unless_they_are_followed() -> None:
    symbols = Symbols()
    with pytest.raises(DataDependentOutputException), symbols.mode:
        symbols.tensor.sum().item()
    with pytest.raises(DynamicOutputShapeException), symbols.mode:
        symbols.tensor.nonzero()
    assert len(data_symbols(from_data(symbols))) == 1
    with symbols.mode:
        assert len(data_symbols(symbols.tensor[symbols.tensor > 0])) == 1
    assert data_symbols(symbols.batch) == data_symbols(3) == set()


@pytest.mark.parametrize("answer", [True, False])
def test_a_question_about_data_is_answered_by_who_follows_it(answer: bool) -> None:
    asked: list[tuple[str, bool]] = []
    symbols = Symbols(lambda question, claimed: asked.append((str(question), claimed)) or answer)
    assert bool(from_data(symbols) <= 5) is answer
    assert asked == [("u0 <= 5", False)]


def test_what_torch_check_asks_is_a_claim() -> None:
    asked: list[tuple[str, bool]] = []
    symbols = Symbols(lambda question, claimed: asked.append((str(question), claimed)))
    torch._check(from_data(symbols) <= 5)
    assert asked == [("u0 <= 5", True)]


@pytest.mark.parametrize("convert", [int, lambda number: len(range(number)), float])
def test_torch_itself_goes_on_with_an_example(convert: Callable[[Any], Any]) -> None:
    assert convert(from_data(Symbols())) == EXAMPLE


def test_operations_are_pythons() -> None:
    symbols = Symbols()
    graph = Graph()
    size = graph.placeholder("size")
    node = expression_nodes(
        (symbols.batch // 2).node.expr, lambda symbol: size, lambda f, *a: graph.call_function(f, a)
    )
    assert isinstance(node, Node)
    assert (node.target, node.args) == (operator.floordiv, (size, 2))
