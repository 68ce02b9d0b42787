"""Calling a constructor that a user named, with errors that say what to change."""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

from scpl_compile.errors import SourceError
from scpl_compile.ir import Scalar

__all__ = ["Notice", "build", "closest", "with_num_classes"]

Notice = Callable[[str], None]
"""What takes one line for the user."""


def build(spec: str, constructor: Any, config: Mapping[str, Any]) -> nn.Module:
    """The model that `constructor` gives for the keyword arguments `config`.

    Raises:
        SourceError: it is not callable, fails, or gives something else.
    """
    if not callable(constructor):
        raise SourceError(
            f"{spec} is of type {type(constructor).__name__}; it must be an nn.Module or a "
            "callable that returns one"
        )
    try:
        model = constructor(**config)
    except Exception as error:
        hint = "; its arguments come from --config" if isinstance(error, TypeError) else ""
        text = " ".join(str(error).split())
        raise SourceError(f"{spec} failed with {type(error).__name__}: {text}{hint}") from error
    if not isinstance(model, nn.Module):
        raise SourceError(f"{spec} returned {type(model).__name__}, not an nn.Module")
    return model


def closest(name: str, known: Iterable[str], example: str) -> str:
    """ "did you mean resnet18 or resnet10t?", or `example` where nothing is like `name`."""
    close = get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(close)}?" if close else example


def with_num_classes(
    spec: str, config: Mapping[str, Scalar], num_classes: int | None, key: str = "num_classes"
) -> dict[str, Scalar]:
    """`config` with the number of classes under the constructor's own name for it.

    Raises:
        SourceError: `config` says another number.
    """
    arguments = dict(config)
    if num_classes is not None and arguments.setdefault(key, num_classes) != num_classes:
        raise SourceError(
            f"{spec}: --num-classes says {num_classes}, --config says {key}={arguments[key]}; give "
            "one of them"
        )
    return arguments
