"""A node of the graph as the line of Python that a person would have written for it."""

import builtins
import importlib
import keyword
import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from scpl_compile.errors import EmitError

__all__ = ["Imports", "attribute_path", "call_text", "constant", "statement", "variable_names"]

_INFIX: Mapping[Any, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/",
    operator.floordiv: "//", operator.mod: "%", operator.pow: "**", operator.matmul: "@",
    operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=",
    operator.gt: ">", operator.ge: ">=", operator.and_: "&", operator.or_: "|",
    operator.xor: "^", operator.lshift: "<<", operator.rshift: ">>",
}  # fmt: skip
_PREFIX: Mapping[Any, str] = {operator.neg: "-", operator.invert: "~", operator.not_: "not "}

_RESERVED = {"self", "labels", "losses", "torch", "F", "nn", "Tensor", "operator", "cut", "take"}
_WIDTH = 100


class Imports:
    """The import lines that the emitted expressions need, gathered as they are written."""

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self.names: set[tuple[str, str]] = set()

    def module(self, name: str) -> str:
        """`name` as an imported module; torch.nn.functional is F."""
        self.modules.add(name)
        return "F" if name == "torch.nn.functional" else name

    def name(self, module: str, name: str) -> str:
        """`name` as imported from `module`."""
        self.names.add((module, name))
        return name

    def lines(self) -> list[str]:
        """The lines in isort's order: the standard library, an empty line, everything else."""
        return [*self._group(is_standard=True), "", *self._group(is_standard=False)]

    def _group(self, *, is_standard: bool) -> list[str]:
        def belongs(module: str) -> bool:
            return (module.split(".")[0] in sys.stdlib_module_names) == is_standard

        plain = [
            "import torch.nn.functional as F" if name == "torch.nn.functional" else f"import {name}"
            for name in sorted(filter(belongs, self.modules))
        ]
        grouped: dict[str, list[str]] = {}
        for module, name in sorted(self.names):
            if belongs(module):
                grouped.setdefault(module, []).append(name)
        return plain + [_import_line(module, names) for module, names in grouped.items()]


def _import_line(module: str, names: list[str]) -> str:
    ordered = sorted(names, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    line = f"from {module} import {', '.join(ordered)}"
    if len(line) <= _WIDTH:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in ordered) + ")"


def variable_names(nodes: Iterable[fx.Node]) -> dict[str, str]:
    """The variable of every node: its own name, unless that would hide another name."""
    used: set[str] = set(_RESERVED)
    names = {}
    for node in nodes:
        text = str(node.target) if node.op == "placeholder" else node.name
        name = re.sub(r"\W", "_", text)
        while name in used or keyword.iskeyword(name) or hasattr(builtins, name):
            name += "_"
        used.add(name)
        names[node.name] = name
    return names


def attribute_path(path: str) -> str:
    """ "layer2.1.conv" as `layer2[1].conv`; names that are no identifiers go to get_submodule.

    Nothing from a model is pasted into code unless it is an identifier or a number.
    """
    text = ""
    for part in path.split("."):
        if part.isdigit():
            text += f"[{int(part)}]"
        elif part.isidentifier() and not keyword.iskeyword(part):
            text += f".{part}"
        else:
            text += f".get_submodule({part!r})"
    return text


def constant(value: Any, imports: Imports, variable: Callable[[fx.Node], str]) -> str:
    """An argument of a node as source.

    Raises:
        EmitError: the value has no text form (an object of the model's own).
    """

    def inner(item: Any) -> str:
        return constant(item, imports, variable)

    match value:
        case fx.Node():
            return variable(value)
        case None | bool() | int() | str() | complex():
            return _quoted(value)
        case float():
            return repr(value) if math.isfinite(value) else f'float("{value}")'
        case slice():
            return f"slice({inner(value.start)}, {inner(value.stop)}, {inner(value.step)})"
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


def _quoted(value: Any) -> str:
    """Like repr, with double quotes, as formatters write it."""
    text = repr(value)
    if isinstance(value, str) and text.startswith("'") and '"' not in text:
        return f'"{text[1:-1]}"'
    return text


def _index(value: Any, imports: Imports, variable: Callable[[fx.Node], str]) -> str:
    if isinstance(value, tuple) and value:
        text = ", ".join(_index(item, imports, variable) for item in value)
        return text + "," if len(value) == 1 else text
    if isinstance(value, slice):
        bounds = [value.start, value.stop] + ([] if value.step is None else [value.step])
        return ":".join("" if b is None else constant(b, imports, variable) for b in bounds)
    return constant(value, imports, variable)


def statement(
    node: fx.Node,
    imports: Imports,
    variable: Callable[[fx.Node], str],
    *,
    indent: int,
    target: str,
) -> list[str]:
    """The lines that run `node`: `target = expression`, or the expression where nobody reads it.

    variable: how a node is read.

    Raises:
        EmitError: a function cannot be imported by name.
    """
    arguments = [constant(a, imports, variable) for a in node.args]
    keywords = [f"{k}={constant(v, imports, variable)}" for k, v in node.kwargs.items()]
    target = f"{target} = " if node.users else ""
    if node.op == "call_module":
        head = f"self{attribute_path(str(node.target))}" if node.target else "self.model"
    elif node.op == "call_method":
        head = f"{arguments.pop(0)}.{node.target}"
    else:
        special = _operator_text(node, imports, variable)
        if special is not None:
            return [" " * indent + target + special]
        head = _function(node.target, imports)
    return call_text(f"{target}{head}", [*arguments, *keywords], indent)


def call_text(head: str, arguments: list[str], indent: int) -> list[str]:
    """`head(arguments)` on one line where it fits, else folded as ruff format folds it."""
    pad = " " * indent
    line = f"{pad}{head}({', '.join(arguments)})"
    if len(line) <= _WIDTH:
        return [line]
    inner = f"{pad}    {', '.join(arguments)}"
    if len(inner) <= _WIDTH:
        return [f"{pad}{head}(", inner, f"{pad})"]
    return [f"{pad}{head}(", *(f"{pad}    {argument}," for argument in arguments), f"{pad})"]


def _operator_text(
    node: fx.Node, imports: Imports, variable: Callable[[fx.Node], str]
) -> str | None:
    target, args = node.target, node.args
    if node.kwargs:
        return None
    if target is operator.getitem:
        return f"{constant(args[0], imports, variable)}[{_index(args[1], imports, variable)}]"
    if target is getattr and isinstance(args[1], str) and args[1].isidentifier():
        return f"{constant(args[0], imports, variable)}.{args[1]}"
    if target in _INFIX:
        left, right = (constant(a, imports, variable) for a in args)
        return f"{left} {_INFIX[target]} {right}"
    if target in _PREFIX:
        return f"{_PREFIX[target]}{constant(args[0], imports, variable)}"
    return None


def _function(target: Any, imports: Imports) -> str:
    name = getattr(target, "__name__", "")
    for module in (F, torch):
        if getattr(module, name, None) is target:
            return f"{imports.module(module.__name__)}.{name}"
    if getattr(builtins, name, None) is target:
        return str(name)
    if getattr(torch.Tensor, name, None) is target:
        return f"{imports.name('torch', 'Tensor')}.{name}"
    if getattr(operator, name, None) is target:
        return f"{imports.module('operator')}.{name}"
    module_name = getattr(target, "__module__", None) or ""
    if name.isidentifier() and all(part.isidentifier() for part in module_name.split(".")):
        module = importlib.import_module(module_name)
        if getattr(module, name, None) is target:
            return imports.name(module_name, name)
    raise EmitError(
        f"function {target!r} cannot be imported by name; "
        "move the code that calls it into a submodule"
    )
