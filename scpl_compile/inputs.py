"""Example inputs as specs: what a user passes from Python, without the batch."""

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from scpl_compile.errors import SourceError
from scpl_compile.ir import InputSpec

__all__ = ["describe_inputs", "forward_parameters"]


def forward_parameters(model: nn.Module) -> tuple[str, ...]:
    """The names of what the model's forward takes, in order."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    names = tuple(p.name for p in parameters if p.kind not in variadic)
    return names or ("input",)


def describe_inputs(
    model: nn.Module, inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor]
) -> tuple[tuple[InputSpec, ...], int]:
    """(specs, batch size) of example inputs, batch first.

    Integer inputs are bounded by the largest example: pass examples that use the whole range.

    Raises:
        SourceError: forward has no such parameter; no tensor, or an empty one; batch sizes differ.
    """
    names = forward_parameters(model)
    if isinstance(inputs, Mapping):
        given = dict(inputs)
    else:
        tensors = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        if len(tensors) > len(names):
            raise SourceError(f"forward takes {len(names)} inputs, {len(tensors)} are given")
        given = dict(zip(names, tensors, strict=False))
    if not given:
        raise SourceError("no example input is given")
    for name, value in given.items():
        if name not in names:
            raise SourceError(f"forward takes {', '.join(names)}, and no {name!r}")
        if not isinstance(value, Tensor) or value.numel() == 0 or value.ndim == 0:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise SourceError(f"input {name!r} is {what}; give a tensor, the batch first")
    sizes = {name: value.shape[0] for name, value in given.items()}
    if len(set(sizes.values())) > 1:
        raise SourceError(f"the inputs' batch sizes differ: {sizes}; the batch comes first")
    return tuple(_describe(*item) for item in given.items()), next(iter(sizes.values()))


def _describe(name: str, value: Tensor) -> InputSpec:
    is_bounded = not value.is_floating_point() and value.dtype != torch.bool
    return InputSpec(
        name=name,
        dtype=str(value.dtype).removeprefix("torch."),
        shape=tuple(value.shape[1:]),
        high=max(2, int(value.max()) + 1) if is_bounded else None,
    )
