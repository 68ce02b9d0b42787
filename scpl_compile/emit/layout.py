"""Lines of emitted code as `ruff format` lays them out, and text that is safe in a docstring."""

from collections.abc import Sequence

__all__ = [
    "WIDTH",
    "Argument",
    "call_lines",
    "expression_lines",
    "plain",
    "signature_lines",
    "tuple_lines",
]

WIDTH = 100

Argument = str | tuple[str, Sequence[str], str]
"""An argument of a call; (opening, items, closing) of one that may be folded itself."""


def call_lines(head: str, arguments: Sequence[Argument], indent: int) -> list[str]:
    """`head(arguments)`, on one line where it fits."""
    pad = " " * indent
    line = f"{pad}{head}({', '.join(map(_text, arguments))})"
    if len(line) <= WIDTH:
        return [line]
    return [f"{pad}{head}(", *_inside(arguments, indent), f"{pad})"]


def _text(argument: Argument) -> str:
    if isinstance(argument, str):
        return argument
    opening, items, closing = argument
    return f"{opening}{', '.join(items)}{closing}"


def signature_lines(name: str, parameters: Sequence[str], result: str) -> list[str]:
    """The `def` of a method without its body."""
    arguments = ["self", *parameters]
    line = f"    def {name}({', '.join(arguments)}) -> {result}:"
    if len(line) <= WIDTH:
        return [line]
    return [f"    def {name}(", *_inside(arguments, 4), f"    ) -> {result}:"]


def _inside(arguments: Sequence[Argument], indent: int) -> list[str]:
    pad = " " * (indent + 4)
    line = f"{pad}{', '.join(map(_text, arguments))}"
    if len(line) <= WIDTH:
        return [line]
    comma = "," if len(arguments) > 1 else ""
    lines = []
    for argument in arguments:
        line = f"{pad}{_text(argument)}{comma}"
        if isinstance(argument, str) or len(line) <= WIDTH:
            lines.append(line)
        else:
            opening, items, closing = argument
            lines += [f"{pad}{opening}", *(f"{pad}    {item}," for item in items)]
            lines.append(f"{pad}{closing}{comma}")
    return lines


def tuple_lines(head: str, items: Sequence[str], tail: str, indent: int) -> list[str]:
    """`head items tail`, the items as a tuple without parentheses where that fits."""
    pad = " " * indent
    line = f"{pad}{head}{', '.join(items)}{tail}"
    if len(line) <= WIDTH:
        return [line]
    return [f"{pad}{head}(", *(f"{pad}    {item}," for item in items), f"{pad}){tail}"]


def expression_lines(head: str, expression: str, indent: int) -> list[str]:
    """`head expression`, in parentheses where that is too long."""
    pad = " " * indent
    line = f"{pad}{head}{expression}"
    if len(line) <= WIDTH:
        return [line]
    return [f"{pad}{head}(", f"{pad}    {expression}", f"{pad})"]


def plain(text: str, width: int) -> str:
    """`text` for a docstring, at most `width` long: nothing that could end it or be an escape."""
    safe = "".join(c if c.isprintable() and c not in '"\\' else "?" for c in text)
    return safe if len(safe) <= width else f"…{safe[1 - width :]}"
