"""The arguments of a call of a module, as a person would write them."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["without_defaults"]

_CONSTANTS = (bool, int, float, str, type(None))


def without_defaults(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments without those that say what the defaults of forward say.

    A library passes every option on (`layer(x, mask, past_key_values=None, use_cache=False)`);
    nobody would write that.
    """
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):  # forward is written in C
        return args, dict(kwargs)
    defaults = {p.name: p.default for p in parameters}
    left = {
        name: value
        for name, value in kwargs.items()
        if name not in defaults or not _is_same_constant(value, defaults[name])
    }
    named = [p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    count = len(args)
    if count <= len(named):
        while count and _is_same_constant(args[count - 1], named[count - 1].default):
            count -= 1
    return args[:count], left


def _is_same_constant(value: Any, default: Any) -> bool:
    return isinstance(value, _CONSTANTS) and type(value) is type(default) and value == default
