"""A node of the graph as a line of Python: the text, and that it computes what the node does."""

import ast
import enum
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from scpl_compile.capture import Switch
from scpl_compile.emit.expressions import (
    attribute,
    constant,
    function,
    statement,
    variable_names,
)
from scpl_compile.emit.imports import Imports
from scpl_compile.errors import EmitError
from scpl_compile.runtime.loading import load_module


def name_of(node: fx.Node) -> str:
    return node.name


def text_of(value: Any) -> str:
    return constant(value, Imports(), name_of)


def line(target: Any, *args: Any, op: str = "call_function", prefix: str = "y = ") -> str:
    """The statement of one node; None in `args` stands for the variable x."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.create_node(op, target, tuple(x if a is None else a for a in args), {})
    (text,) = statement(node, Imports(), name_of, prefix=prefix, indent=0)
    return text


def emitted(graph: fx.Graph, folder: Path) -> Callable[..., Any]:
    """The code that is emitted for a graph, as a function of a file."""
    imports = Imports()
    nodes = [n for n in graph.nodes if n.op != "output"]
    for node in nodes:
        if node.op == "call_function" and function(node.target, Imports()).isidentifier():
            function(node.target, imports)
    names = variable_names(nodes, imports.names)

    def variable(node: fx.Node) -> str:
        return names[str(node.target) if node.op == "placeholder" else node.name]

    lines = []
    for node in nodes:
        if node.op != "placeholder":
            prefix = f"{variable(node)} = "
            lines += statement(node, imports, variable, prefix=prefix, indent=4)
    inputs = ", ".join(variable(n) for n in nodes if n.op == "placeholder")
    result = constant(graph.output_node().args[0], imports, variable)
    body = [f"def run({inputs}):", *lines, f"    return {result}"]
    path = folder / "emitted.py"
    path.write_text("\n".join([*imports.lines(), "", "", *body]) + "\n")
    return load_module(path).run


def same(traced: Callable[..., Any], folder: Path, *inputs: Any) -> None:
    """Assert that the emitted code gives the same bits."""
    copies = [i.clone() if isinstance(i, Tensor) else i for i in inputs]
    expected = traced(*inputs)
    found = emitted(fx.Tracer().trace(traced), folder)(*copies)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ---------------------------------------------------------------------- operators

FLOATS = (operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv,
          operator.mod, operator.pow, operator.matmul, operator.eq, operator.ne, operator.lt,
          operator.le, operator.gt, operator.ge)  # fmt: skip
INTEGERS = (operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift)
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


@pytest.mark.parametrize("op", FLOATS, ids=lambda op: op.__name__)
def test_operators_of_floats(op: Callable[..., Any], tmp_path: Path) -> None:
    x, y = torch.rand(3, 3) + 0.5, torch.rand(3, 3) + 0.5
    same(lambda a, b: op(a, b), tmp_path, x, y)


@pytest.mark.parametrize("op", INTEGERS, ids=lambda op: op.__name__)
def test_operators_of_integers(op: Callable[..., Any], tmp_path: Path) -> None:
    x, y = torch.randint(8, (3, 3)), torch.randint(1, 4, (3, 3))
    same(lambda a, b: op(a, b), tmp_path, x, y)


@pytest.mark.parametrize("op", IN_PLACE, ids=lambda op: op.__name__)
def test_operators_in_place_stay_in_place(op: Callable[..., Any], tmp_path: Path) -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output(graph.call_function(op, (x, y)))
    one, other = torch.rand(3), torch.rand(3)
    kept = one.clone()
    result = emitted(graph, tmp_path)(one, other)
    assert result is one
    torch.testing.assert_close(one, op(kept, other), rtol=0, atol=0)


def test_prefix_operators(tmp_path: Path) -> None:
    same(lambda x: (-x, ~(x > 0)), tmp_path, torch.randn(4))
    assert line(operator.not_, None) == "y = not x"


def test_a_negative_base_keeps_its_sign(tmp_path: Path) -> None:
    assert line(operator.pow, -2, None) == "y = (-2) ** x"
    assert line(operator.pow, None, -2) == "y = x ** -2"
    same(lambda x: (-2) ** x + x**-1, tmp_path, torch.tensor([1.0, 2.0]))


def test_operators_in_text() -> None:
    assert line(operator.add, None, 1) == "y = x + 1"
    assert line(operator.sub, 1.5, None) == "y = 1.5 - x"
    assert line(getattr, None, "shape") == "y = x.shape"
    assert line(operator.getitem, None, 0, prefix="") == "x[0]"


def test_comparing_with_none_is_a_call() -> None:
    """`x == None` and `x == True` are what linters take for a mistake."""
    assert line(operator.eq, None, True) == "y = operator.eq(x, True)"
    assert line(operator.ne, None, False) == "y = operator.ne(x, False)"
    assert line(operator.eq, None, 0) == "y = x == 0"


def test_getattr_with_a_default_or_an_odd_name_is_a_call() -> None:
    assert line(getattr, None, "width", 3) == 'y = getattr(x, "width", 3)'
    assert line(getattr, None, "class") == 'y = getattr(x, "class")'
    assert line(getattr, None, "a b") == 'y = getattr(x, "a b")'


# ---------------------------------------------------------------------- subscripts

SUBSCRIPTS = {
    "item": lambda x: x[1],
    "negative": lambda x: x[-1],
    "tuple": lambda x: x[0, 1],
    "slice": lambda x: x[1:],
    "to the end": lambda x: x[:-1],
    "stepped": lambda x: x[::2],
    "all bounds": lambda x: x[0:3:2],
    "mixed": lambda x: x[:, 1, None, 2:],
    "ellipsis": lambda x: x[..., 0],
    "ellipsis alone": lambda x: x[...],
    "empty": lambda x: x[()],
    "none": lambda x: x[None],
    "list": lambda x: x[[0, 2]],
    "list in a tuple": lambda x: x[:, [0, 2]],
    "tuple in a tuple": lambda x: x[((0, 2),)],
    "two tuples": lambda x: x[(0, 1), (1, 2)],
    "bool": lambda x: x[True],
    "one slice in a tuple": lambda x: x[(slice(None, 2),)],
    "mask": lambda x: x[x > 0],
    "tensor": lambda x: x[x.argsort(0)[0, 0] % 2],
    "bound of a variable": lambda x: x[: x.shape[0] - 1],
    "bounds of variables": lambda x: x[x.size(0) - 2 : x.size(0), 1 : x.size(1)],
}


@pytest.mark.parametrize("form", SUBSCRIPTS)
def test_subscripts(form: str, tmp_path: Path) -> None:
    same(SUBSCRIPTS[form], tmp_path, torch.randn(3, 4, 5))


def test_subscripts_in_text() -> None:
    assert line(operator.getitem, None, (slice(None), 0)) == "y = x[:, 0]"
    assert line(operator.getitem, None, slice(1, -1)) == "y = x[1:-1]"
    assert line(operator.getitem, None, (Ellipsis, None)) == "y = x[..., None]"
    assert line(operator.getitem, None, ((0, 1),)) == "y = x[(0, 1),]"
    assert line(operator.getitem, None, "logits") == 'y = x["logits"]'


def test_a_bound_that_is_an_expression_has_air_as_formatters_give_it() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(operator.getitem, (x, slice(None, x)))
    (text,) = statement(node, Imports(), lambda n: "x.shape[0]", prefix="", indent=0)
    assert text == "x.shape[0][: x.shape[0]]"


# ---------------------------------------------------------------------- constants


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (True, "True"),
        (-3, "-3"),
        (2**80, str(2**80)),
        (0.1, "0.1"),
        (1e-12, "1e-12"),
        (-0.0, "-0.0"),
        (math.inf, 'float("inf")'),
        (-math.inf, 'float("-inf")'),
        (math.nan, 'float("nan")'),
        (1 + 2j, "complex(1.0, 2.0)"),
        (complex(0, math.inf), 'complex(0.0, float("inf"))'),
        ("nearest", '"nearest"'),
        ("it's", '"it\'s"'),
        ('say "x"', "'say \"x\"'"),
        ("a\\b\n", '"a\\\\b\\n"'),
        ((), "()"),
        ((1,), "(1,)"),
        ((1, 2.5), "(1, 2.5)"),
        ([1, [2]], "[1, [2]]"),
        ({"a": 1, 2: None}, '{"a": 1, 2: None}'),
        (slice(None, 3), "slice(None, 3, None)"),
        (range(2, 8, 3), "range(2, 8, 3)"),
        (..., "..."),
        (torch.float32, "torch.float32"),
        (torch.channels_last, "torch.channels_last"),
        (torch.strided, "torch.strided"),
        (torch.device("cuda", 1), 'torch.device("cuda:1")'),
        (np.float64(0.5), "0.5"),
        (np.float64("-inf"), 'float("-inf")'),
        (torch.Size([2, 3]), "(2, 3)"),
    ],
    ids=repr,
)  # fmt: skip
def test_constants(value: Any, text: str) -> None:
    assert text_of(value) == text


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)  # fmt: skip


@given(PLAIN)
def test_constants_read_back_to_themselves(value: Any) -> None:
    assert ast.literal_eval(text_of(value)) == value


@given(st.text())
def test_no_string_gets_out_of_its_quotes(value: str) -> None:
    (expression,) = ast.parse(text_of(value)).body
    assert isinstance(expression, ast.Expr) and isinstance(expression.value, ast.Constant)
    assert expression.value.value == value


class Color(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize("value", [object(), Color.RED, b"raw", {1}, torch.ones(1)], ids=repr)
def test_what_has_no_text_form_is_an_error_with_a_remedy(value: Any) -> None:
    with pytest.raises(EmitError, match=r"has no text form.*submodule"):
        text_of(value)


def test_torch_is_imported_for_its_constants() -> None:
    imports = Imports()
    constant((torch.float64, [torch.device("cpu")]), imports, name_of)
    assert "import torch" in imports.lines()


@pytest.mark.parametrize(
    ("training", "evaluation", "text"),
    [
        (True, False, "self.training"),
        (False, True, "(not self.training)"),
        (0.1, 0.0, "(0.1 if self.training else 0.0)"),
        ("a", None, '("a" if self.training else None)'),
        (1, 0, "(1 if self.training else 0)"),  # 1 == True, and is not it
    ],
)
def test_a_constant_that_depends_on_the_mode(training: Any, evaluation: Any, text: str) -> None:
    assert text_of(Switch(training=training, evaluation=evaluation)) == text


# ---------------------------------------------------------------------- functions


def table(x: Tensor) -> Tensor:
    """Many functions of torch, in every place where torch keeps them."""
    y = F.relu(x) + F.gelu(x) + F.softmax(x, dim=-1) + F.hardtanh(x, -0.5, 0.5)
    y = torch.cat([y, torch.sin(x)], dim=1) + torch.stack([x, x], 2).flatten(1)
    y = y + torch.linalg.norm(x, dim=1, keepdim=True) + torch.special.expit(y)
    y = y + torch.fft.fft(x, dim=1).real.repeat(1, 2) + torch.einsum("bi,bj->b", x, x)[:, None]
    y = F.layer_norm(y, (8,)) + F.interpolate(y[:, None], scale_factor=1.0)[:, 0]
    y = torch.where(y > 0, y, -y).masked_fill(y < -1, float("-inf")).nan_to_num(0.0, 1.0, -1.0)
    y = F.max_pool1d(y[:, None], 2)[:, 0] + F.adaptive_avg_pool1d(y[:, None], 4)[:, 0]
    y = torch.add(y, 1.0) + torch.nn.functional.pad(y, (1, 0))[:, 1:]
    return F.scaled_dot_product_attention(y[None], y[None], y[None]) + torch.clamp(y, min=0)


def test_functions_of_torch(tmp_path: Path) -> None:
    same(table, tmp_path, torch.randn(3, 4))


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (F.relu, "F.relu"),
        (torch.relu, "torch.relu"),
        (F.max_pool2d, "F.max_pool2d"),
        (F.gelu, "F.gelu"),
        (torch.flatten, "torch.flatten"),
        (torch.linalg.norm, "torch.linalg.norm"),
        (torch.fft.rfft, "torch.fft.rfft"),
        (torch.special.erf, "torch.special.erf"),
        (torch.special.entr, "torch.special.entr"),
        (torch.Tensor.expand, "Tensor.expand"),
        (operator.itemgetter, "operator.itemgetter"),
        (math.sqrt, "sqrt"),
        (len, "len"),
        (torch.nn.utils.rnn.pack_padded_sequence, "pack_padded_sequence"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_names_of_functions(target: Any, text: str) -> None:
    assert function(target, Imports()) == text


def local(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    "target",
    [lambda x: x, torch.nn.Linear(2, 2).forward, torch.ops.aten.add.Tensor, local.__get__(1)],
    ids=["lambda", "method", "overload", "bound"],
)
def test_a_function_without_a_name_is_an_error(target: Any) -> None:
    with pytest.raises(EmitError, match=r"cannot be imported by name.*submodule"):
        function(target, Imports())


def test_a_function_of_a_file_is_an_error_for_a_new_process_would_not_find_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "net.py").write_text("def helper(x):\n    return x\n")
    module = load_module(tmp_path / "net.py")
    with pytest.raises(EmitError, match=r"'helper' of scpl_file_net.* cannot be imported"):
        function(module.helper, Imports())


def test_a_function_whose_name_now_means_another_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = math.cos
    monkeypatch.setattr(math, "cos", math.sin)
    with pytest.raises(EmitError, match=r"'cos' of math cannot be imported"):
        function(original, Imports())


def root(x: Tensor) -> Tensor:
    """Its nodes are named like the functions that they call."""
    return sqrt_of(torch.exp(x)) + sqrt_of(x.abs())


def sqrt_of(x: Tensor) -> Tensor:
    return x.sqrt()


fx.wrap("sqrt_of")


def test_a_variable_does_not_hide_the_function_that_made_it(tmp_path: Path) -> None:
    same(root, tmp_path, torch.randn(3))


@pytest.mark.parametrize("name", ["a b", "class", "x=__import__('os')"])
def test_names_of_arguments_and_methods_are_identifiers(name: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_function(torch.relu, (x,), {name: 1})
    with pytest.raises(EmitError, match="is no name of a argument|is no name of an argument"):
        statement(call, Imports(), name_of, prefix="", indent=0)
    with pytest.raises(EmitError, match="is no name of a method"):
        line(name, None, op="call_method")


# ---------------------------------------------------------------------- statements


def test_modules_methods_and_prefixes() -> None:
    assert line("layer1.0.conv", None, op="call_module") == "y = self.layer1[0].conv(x)"
    assert line("", None, op="call_module", prefix="return ") == "return self.model(x)"
    assert line("view", None, 2, -1, op="call_method", prefix="") == "x.view(2, -1)"


def test_long_calls_and_expressions_are_folded() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x" * 60)
    call = graph.call_function(torch.cat, ([x, x],), {"dim": 1})
    assert statement(call, Imports(), name_of, prefix="y = ", indent=8) == [
        "        y = torch.cat(",
        "            [",
        f"                {x.name},",
        f"                {x.name},",
        "            ],",
        "            dim=1,",
        "        )",
    ]
    add = graph.call_function(operator.add, (x, x))
    assert statement(add, Imports(), name_of, prefix="return ", indent=8) == [
        "        return (",
        f"            {x.name} + {x.name}",
        "        )",
    ]


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("conv", "self.conv"),
        ("layer1.0", "self.layer1[0]"),
        ("0", "self[0]"),
        ("blocks.10.mlp", "self.blocks[10].mlp"),
        ("a-b.c", 'self.get_submodule("a-b").c'),
        ("class.x", 'self.get_submodule("class").x'),
        ("01", 'self.get_submodule("01")'),
        ("²", 'self.get_submodule("²")'),
        ("ﬁ", 'self.get_submodule("ﬁ")'),  # Python would read it as fi
        ("__x", 'self.get_submodule("__x")'),  # Python would read it as _Stage0__x
        ("_x", "self._x"),
        ('x");import os;("', "self.get_submodule('x\");import os;(\"')"),
    ],
)
def test_paths_of_modules(path: str, text: str) -> None:
    assert attribute(path, is_module=True) == text


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("weight", "self.weight"),
        ("layer.0.weight", "self.layer[0].weight"),
        ("scales.0", "self.scales[0]"),
        ("a-b", 'getattr(self, "a-b")'),
        ("x.a-b", 'getattr(self.x, "a-b")'),
        ("a-b.weight", 'self.get_submodule("a-b").weight'),
    ],
)
def test_paths_of_parameters_and_buffers(path: str, text: str) -> None:
    assert attribute(path, is_module=False) == text


@given(st.lists(st.text(min_size=1).filter(lambda t: "." not in t), min_size=1, max_size=3))
def test_whatever_a_module_is_called_the_text_is_one_expression(parts: list[str]) -> None:
    (expression,) = ast.parse(attribute(".".join(parts), is_module=True)).body
    assert isinstance(expression, ast.Expr)
    names = {n.id for n in ast.walk(expression) if isinstance(n, ast.Name)}
    assert names == {"self"}


def test_variables_hide_nothing() -> None:
    graph = fx.Graph()
    inputs = ("self", "labels", "input", "input_1", "print", "lambda", "losses", "cut", "l", "x")
    nodes = [graph.placeholder(name) for name in inputs]
    names = variable_names(nodes, Imports().names)
    assert list(names) == list(inputs)
    assert names == {
        "self": "self_", "labels": "labels_", "input": "input_", "input_1": "input_1",
        "print": "print_", "lambda": "lambda_", "losses": "losses_", "cut": "cut_", "l": "l_",
        "x": "x",
    }  # fmt: skip


def test_variables_differ() -> None:
    graph = fx.Graph()
    graph.placeholder("sum")
    graph.placeholder("sum_")
    graph.create_node("call_method", "sum_", (), {}, name="sum__")
    names = variable_names(graph.nodes, frozenset())
    assert len(set(names.values())) == 3
