"""`--config`: keyword arguments of a constructor, as text."""

import re
from math import isfinite

from scpl_compile.errors import SourceError
from scpl_compile.ir import Scalar

__all__ = ["parse_config"]


def parse_config(text: str) -> dict[str, Scalar]:
    """`a=1,b=2.5,c=true,d=text` as {"a": 1, "b": 2.5, "c": True, "d": "text"}.

    Raises:
        SourceError: names the piece that is wrong.
    """
    config: dict[str, Scalar] = {}
    for piece in filter(None, map(str.strip, text.split(","))):
        name, equals, value = (part.strip() for part in piece.partition("="))
        if not equals or not name.isidentifier():
            raise SourceError(f"config {piece!r} is not name=value, as in width=64,norm=true")
        if name in config:
            raise SourceError(f"config {piece!r}: {name} is given twice")
        config[name] = _parse_scalar(value)
    return config


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
