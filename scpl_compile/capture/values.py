"""What a module or a function gives when it gives more than one tensor."""

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

__all__ = [
    "Fields",
    "is_alike",
    "is_constant",
    "leaves",
    "only_nodes",
    "parts",
    "plain_fields",
    "plain_tensors",
]

_CONSTANTS = (bool, int, float, complex, str, type(None), type(...), torch.dtype, torch.layout,
              torch.memory_format)  # fmt: skip


class Fields(dict[str, Any]):
    """The fields of a dataclass by name."""


def plain_fields(value: Any) -> Any:
    """A dataclass that is no mapping as its fields; anything else as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping)):
        return Fields(
            (field.name, getattr(value, field.name)) for field in dataclasses.fields(value)
        )
    return value


def parts(value: Any) -> Iterator[tuple[Any, Any, Callable[..., Any]]]:
    """(key, item, the function that reads it) of what a mapping, sequence or dataclass holds."""
    if isinstance(value, Mapping):  # also transformers' ModelOutput, which is a dataclass too
        yield from ((key, item, operator.getitem) for key, item in value.items())
    elif isinstance(value, (tuple, list)):
        yield from ((index, item, operator.getitem) for index, item in enumerate(value))
    else:
        fields = plain_fields(value)
        if fields is not value:
            yield from ((name, item, getattr) for name, item in fields.items())


def leaves(value: Any) -> Iterator[Any]:
    """What is inside nested mappings, sequences and dataclasses."""
    if isinstance(value, (Mapping, tuple, list)) or plain_fields(value) is not value:
        for _, item, _ in parts(value):
            yield from leaves(item)
    else:
        yield value


def only_nodes(value: Any) -> Any:
    """Nested mappings and sequences with None for what is no node (a cache, a loss that is off)."""
    if isinstance(value, Mapping):
        return {key: only_nodes(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [only_nodes(item) for item in value]
    return value if isinstance(value, Node) else None


def is_constant(value: Any) -> bool:
    """Whether an argument can stand in a graph as it is."""
    return isinstance(value, _CONSTANTS)


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the tensors that are plain attributes of modules, and need no gradient."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and name.isidentifier() and not value.requires_grad:
                yield f"{path}.{name}".lstrip("."), value


def is_alike(one: Tensor, other: Tensor) -> bool:
    """Whether a conversion of one of them to the other's dtype and device does nothing."""
    return (one.dtype, one.device) == (other.dtype, other.device)
