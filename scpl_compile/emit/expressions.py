"""A node of the graph as the line of Python that a person would have written for it.

Nothing from a model is pasted into code unless it is an identifier, a number or a quoted string.
"""

import builtins
import keyword
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Set
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from scpl_compile.capture import Switch
from scpl_compile.emit.imports import Imports
from scpl_compile.emit.layout import Argument, call_lines, expression_lines
from scpl_compile.errors import EmitError
from scpl_compile.methods.flow import value_name

__all__ = ["argument", "attribute", "constant", "function", "statement", "variable_names"]

Variable = Callable[[fx.Node], str]
"""How a node is read."""

_INFIX: Mapping[Any, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/",
    operator.floordiv: "//", operator.mod: "%", operator.pow: "**", operator.matmul: "@",
    operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=",
    operator.gt: ">", operator.ge: ">=", operator.and_: "&", operator.or_: "|",
    operator.xor: "^", operator.lshift: "<<", operator.rshift: ">>",
}  # fmt: skip
_PREFIX: Mapping[Any, str] = {operator.neg: "-", operator.invert: "~", operator.not_: "not "}
_TORCH = (F, torch, torch.linalg, torch.fft, torch.special)

_RESERVED = frozenset({"self", "labels", "losses", "sent", "l", "O", "I"})
"""Names of the methods' own, and those that linters refuse."""


def variable_names(nodes: Iterable[fx.Node], hidden: Set[str]) -> dict[str, str]:
    """The variable of every value, by the value's name: the same, unless that would hide another.

    hidden: the names that the file imports or defines.
    """
    used = set(_RESERVED | hidden)
    names = {}
    for node in nodes:
        name = re.sub(r"\W", "_", value_name(node))
        while name in used or keyword.iskeyword(name) or hasattr(builtins, name):
            name += "_"
        used.add(name)
        names[value_name(node)] = name
    return names


def _is_name(text: str) -> bool:
    """Whether `.text` reads the attribute of that name.

    (Python normalises other alphabets, and mangles a leading __ in a class.)
    """
    is_plain = text.isascii() and text.isidentifier() and not keyword.iskeyword(text)
    return is_plain and (not text.startswith("__") or text.endswith("__"))


def attribute(path: str, *, is_module: bool) -> str:
    """What lies at `path` of the model: "layer2.1.conv" is `self.layer2[1].conv`."""
    text = "self"
    parts = path.split(".")
    for i, part in enumerate(parts):
        if re.fullmatch("0|[1-9][0-9]*", part):
            text += f"[{part}]"
        elif _is_name(part):
            text += f".{part}"
        elif is_module or i < len(parts) - 1:
            text += f".get_submodule({_quoted(part)})"
        else:
            text = f"getattr({text}, {_quoted(part)})"
    return text


# ---------------------------------------------------------------------- arguments


def constant(value: Any, imports: Imports, variable: Variable) -> str:
    """An argument of a node as source.

    Raises:
        EmitError: the value has no text form (an object of the model's own).
    """

    def inner(item: Any) -> str:
        return constant(item, imports, variable)

    match value:
        case Enum():
            pass
        case fx.Node():
            return variable(value)
        case Switch():
            return _switch(value, inner)
        case None | bool():
            return repr(value)
        case int() | float() | complex():
            return _number(value)
        case str():
            return _quoted(value)
        case slice() | range():
            kind = type(value).__name__
            return f"{kind}({inner(value.start)}, {inner(value.stop)}, {inner(value.step)})"
        case tuple():
            items = ", ".join(map(inner, value))
            return f"({items},)" if len(value) == 1 else f"({items})"
        case list():
            return f"[{', '.join(map(inner, value))}]"
        case dict():
            return "{" + ", ".join(f"{inner(k)}: {inner(v)}" for k, v in value.items()) + "}"
        case torch.dtype() | torch.memory_format() | torch.layout():
            imports.module("torch")
            return str(value)
        case torch.device():
            imports.module("torch")
            return f"torch.device({_quoted(str(value))})"
    if value is Ellipsis:
        return "..."
    raise EmitError(
        f"the argument {value!r} ({type(value).__name__}) has no text form; "
        "move the code that uses it into a submodule"
    )


def argument(value: Any, imports: Imports, variable: Variable, prefix: str = "") -> Argument:
    """An argument of a call as source, after `prefix` (`name=`); containers may be folded."""
    if isinstance(value, (list, tuple)) and len(value) > 1:
        opening, closing = "[]" if isinstance(value, list) else "()"
        items = [constant(item, imports, variable) for item in value]
        return (f"{prefix}{opening}", items, closing)
    if isinstance(value, dict) and value:
        pairs = [constant({key: item}, imports, variable)[1:-1] for key, item in value.items()]
        return (f"{prefix}{{", pairs, "}")
    return f"{prefix}{constant(value, imports, variable)}"


def _switch(value: Switch, inner: Callable[[Any], str]) -> str:
    if value.training is True and value.evaluation is False:
        return "self.training"
    if value.training is False and value.evaluation is True:
        return "(not self.training)"
    return f"({inner(value.training)} if self.training else {inner(value.evaluation)})"


def _number(value: complex) -> str:
    """Subclasses too (numpy.float64), as the plain number."""
    if isinstance(value, int):
        return repr(int(value))
    if isinstance(value, float):
        return repr(float(value)) if math.isfinite(value) else f'float("{float(value)}")'
    return f"complex({_number(value.real)}, {_number(value.imag)})"


def _quoted(value: str) -> str:
    """Like repr, with double quotes, as formatters write it."""
    text = repr(str(value))
    return f'"{text[1:-1]}"' if text.startswith("'") and '"' not in text else text


def _index(value: Any, imports: Imports, variable: Variable) -> str:
    """What stands between the brackets of a subscript."""
    if isinstance(value, tuple) and value:
        text = ", ".join(_index_item(item, imports, variable) for item in value)
        return f"{text}," if len(value) == 1 else text
    return _index_item(value, imports, variable)


def _index_item(value: Any, imports: Imports, variable: Variable) -> str:
    if not isinstance(value, slice):
        return constant(value, imports, variable)
    bounds = [value.start, value.stop] + ([] if value.step is None else [value.step])
    texts = ["" if bound is None else constant(bound, imports, variable) for bound in bounds]
    if all(re.fullmatch(r"-?\w*", text) for text in texts):
        return ":".join(texts)
    return " : ".join(texts).strip()


# ---------------------------------------------------------------------- statements


def statement(
    node: fx.Node, imports: Imports, variable: Variable, *, prefix: str, indent: int
) -> list[str]:
    """The lines that run `node`: prefix ("x = ", "return ", "") and the expression.

    Raises:
        EmitError: a function cannot be imported by name; an argument has no text form.
    """
    arguments = [argument(value, imports, variable) for value in node.args]
    for key in node.kwargs:
        _check_name(key, "argument")
    keywords = [argument(v, imports, variable, f"{k}=") for k, v in node.kwargs.items()]
    if node.op == "call_module":
        path = str(node.target)
        head = attribute(path, is_module=True) if path else "self.model"
    elif node.op == "call_method":
        _check_name(str(node.target), "method")
        head = f"{arguments.pop(0)}.{node.target}"
    elif node.target is operator.setitem and not prefix:
        index = _index(node.args[1], imports, variable)
        place = f"{constant(node.args[0], imports, variable)}[{index}] = "
        return expression_lines(place, constant(node.args[2], imports, variable), indent)
    else:
        special = _operator_text(node, imports, variable)
        if special is not None:
            return expression_lines(prefix, special, indent)
        head = function(node.target, imports)
    return call_lines(f"{prefix}{head}", [*arguments, *keywords], indent)


def _check_name(name: str, kind: str) -> None:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise EmitError(f"{name!r} is no name of a {kind}; move that code into a submodule")


def _operator_text(node: fx.Node, imports: Imports, variable: Variable) -> str | None:
    """`a + b`, `a[0]`, `a.shape`; None where the node is written as a call."""
    target, args = node.target, node.args
    if node.kwargs:
        return None
    texts = [constant(argument, imports, variable) for argument in args]
    if target is operator.getitem:
        return f"{texts[0]}[{_index(args[1], imports, variable)}]"
    if target is getattr and len(args) == 2 and _is_name(str(args[1])):
        return f"{texts[0]}.{args[1]}"
    if target in (operator.eq, operator.ne) and not {"None", "True", "False"}.isdisjoint(texts):
        return None  # `x == None` reads like a mistake
    if target in _INFIX:
        left, right = texts
        if target is operator.pow and left.startswith("-"):
            left = f"({left})"
        return f"{left} {_INFIX[target]} {right}"
    if target in _PREFIX:
        return f"{_PREFIX[target]}{texts[0]}"
    return None


def function(target: Any, imports: Imports) -> str:
    """A function by the name under which the emitted file finds it.

    Raises:
        EmitError: a new process could not import it by name.
    """
    name = str(getattr(target, "__name__", ""))
    for module in _TORCH:
        short = name.removeprefix(f"{module.__name__.split('.')[-1]}_")
        if getattr(module, short, None) is target:
            return f"{imports.module(module.__name__)}.{short}"
    if getattr(builtins, name, None) is target:
        return name
    if getattr(torch.Tensor, name, None) is target:
        return f"{imports.name('torch', 'Tensor')}.{name}"
    if getattr(operator, name, None) is target:
        return f"{imports.module('operator')}.{name}"
    return imports.function(target)
