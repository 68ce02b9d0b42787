"""`momentum=0.9,nesterov=true`: keyword arguments as text."""

import re
from math import isfinite

from scpl_compile.ir import Scalar

__all__ = ["Setting", "parse_scalars", "parse_settings"]

Setting = Scalar | tuple[float, ...]
"""The value of an argument of an optimizer or a scheduler."""


def parse_scalars(text: str) -> dict[str, Scalar]:
    """`a=1,b=2.5,c=true,d=text` as {"a": 1, "b": 2.5, "c": True, "d": "text"}.

    Raises:
        ValueError: names the piece that is wrong.
    """
    found: dict[str, Scalar] = {}
    for piece in filter(None, map(str.strip, text.split(","))):
        name, equals, value = (part.strip() for part in piece.partition("="))
        if not equals or not name.isidentifier():
            raise ValueError(f"{piece!r} is not name=value")
        if name in found:
            raise ValueError(f"{piece!r}: {name} is given twice")
        found[name] = _parse_scalar(value)
    return found


def parse_settings(text: str) -> dict[str, Setting]:
    """The same, and numbers between slashes as a tuple: `betas=0.9/0.98,milestones=30/80`.

    Raises:
        ValueError: names the piece that is wrong.
    """
    return {name: _with_tuple(value) for name, value in parse_scalars(text).items()}


def _with_tuple(value: Scalar) -> Setting:
    if not isinstance(value, str) or "/" not in value:
        return value
    parts = [_parse_scalar(part.strip()) for part in value.split("/")]
    numbers = tuple(part for part in parts if type(part) in (int, float))
    return numbers if len(numbers) == len(parts) else value  # type: ignore[return-value]


def _parse_scalar(text: str) -> Scalar:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return text
    return number if isfinite(number) and "_" not in text else text
