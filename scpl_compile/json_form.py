"""The JSON form of frozen dataclasses: written as objects, read back with every type checked."""

import types
import typing
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any, TypeVar

from scpl_compile.errors import ProgramError, context

__all__ = ["LEFT_OUT", "from_json", "to_json"]

T = TypeVar("T")

LEFT_OUT: Mapping[str, bool] = types.MappingProxyType({"left_out": True})
"""Metadata of a field that is not written while it has its default, so that what was written before
there was such a field reads as it did, and has the digest that it had.
"""
_MOST_LEVELS = 50
"""Of values of any kind; what reads them later goes down by recursion."""


def to_json(value: Any) -> Any:
    """`value` as what json.dumps takes: dataclasses become objects, tuples become arrays."""
    if is_dataclass(value) and not isinstance(value, type):
        written = [f for f in fields(value) if not _is_left_out(f, getattr(value, f.name))]
        return {f.name: to_json(getattr(value, f.name)) for f in written}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return value


def _is_left_out(field: Field[Any], value: Any) -> bool:
    return "left_out" in field.metadata and bool(value == field.default)


def from_json(cls: type[T], data: Any, where: str = "") -> T:
    """The value of dataclass `cls` that `to_json` wrote as `data`.

    Raises:
        ProgramError: a field is missing, unknown or of another type; the message has its path.
    """
    if not isinstance(data, Mapping):
        raise ProgramError(f"{where or cls.__name__} must be an object, not {_brief(data)}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - known.keys()):
        raise ProgramError(f"{where or cls.__name__} has the unknown field {unknown[0]!r}")
    needed = {name for name, f in known.items() if "left_out" not in f.metadata}
    if missing := sorted(needed - set(data)):
        raise ProgramError(f"{where or cls.__name__} lacks the field {missing[0]!r}")
    values = {key: _read(hints[key], data[key], f"{where}.{key}".lstrip(".")) for key in data}
    with context(where or cls.__name__):
        return cls(**values)


def _is_deeper(data: Any, levels: int) -> bool:
    items = data.values() if isinstance(data, Mapping) else data if isinstance(data, list) else ()
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in items)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _read(hint: Any, data: Any, where: str) -> Any:
    if hint is Any:
        if _is_deeper(data, _MOST_LEVELS):
            raise ProgramError(f"{where} is nested deeper than {_MOST_LEVELS} levels")
        return data
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _read_union(args, data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise ProgramError(f"{where} must be an array, not {_brief(data)}")
        item_hints = [args[0]] * len(data) if args[-1] is Ellipsis else list(args)
        if len(item_hints) != len(data):
            raise ProgramError(f"{where} must have {len(item_hints)} items, not {len(data)}")
        pairs = enumerate(zip(item_hints, data, strict=True))
        return tuple(_read(item_hint, item, f"{where}[{i}]") for i, (item_hint, item) in pairs)
    if origin is Mapping:
        if not isinstance(data, Mapping):
            raise ProgramError(f"{where} must be an object, not {_brief(data)}")
        return {key: _read(args[1], item, f"{where}.{key}") for key, item in data.items()}
    if is_dataclass(hint):
        return from_json(typing.cast(type[Any], hint), data, where)
    if hint is float and type(data) is int and abs(data) <= 2**53:
        return float(data)
    if type(data) is not hint:
        raise ProgramError(f"{where} must be {hint.__name__}, not {_brief(data)}")
    return data


def _read_union(args: tuple[Any, ...], data: Any, where: str) -> Any:
    """`X | None`, or a union of JSON's scalars."""
    others = [arg for arg in args if arg is not type(None)]
    if data is None and len(others) < len(args):
        return None
    if len(others) == 1:
        return _read(others[0], data, where)
    if type(data) not in others:
        names = " or ".join(arg.__name__ for arg in args)
        raise ProgramError(f"{where} must be {names}, not {_brief(data)}")
    return data
