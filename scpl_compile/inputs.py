"""Inputs as specs, and specs as inputs.

::

    "3x32x32"   "ids:int64:128<30000,mask:int64:128<2"  ─ parse_inputs ──┐
    example tensors from Python  ─ describe_inputs ──────────────────────┴▶ InputSpec ─▶ tensors
"""

import inspect
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from scpl_compile.errors import SourceError
from scpl_compile.ir import InputSpec

__all__ = ["describe_inputs", "example_inputs", "forward_parameters", "parse_inputs"]

_FLOATS = ("float32", "float64", "float16", "bfloat16")
_INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
_DTYPES = (*_FLOATS, *_INTEGERS, "bool")
_INPUT_EXAMPLES = "as in 3x32x32 or ids:int64:128<30000,mask:int64:128<2"


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


def parse_inputs(text: str, forward_parameter_names: Sequence[str]) -> tuple[InputSpec, ...]:
    """Inputs from `[name:][dtype:]SHAPE[<high[..last]]`, separated by commas, batch left out.

    A piece without a name is the parameter of forward at the same position; without a dtype it
    is float32. Integers need `<high`, one more than the largest; with `..last` every row ends in
    that number, which stands nowhere else in it.

    Raises:
        SourceError: names the piece that is wrong.
    """
    specs: list[InputSpec] = []
    for position, piece in enumerate(text.split(",")):
        spec = _parse_input(piece.strip(), position, forward_parameter_names)
        if spec.name in (other.name for other in specs):
            raise SourceError(f"input {piece!r}: {spec.name} is given twice")
        specs.append(spec)
    return tuple(specs)


def _parse_input(piece: str, position: int, names: Sequence[str]) -> InputSpec:
    *front, rest = piece.split(":")
    name = front.pop(0) if front and front[0] not in _DTYPES else ""
    dtype = front.pop(0) if front else "float32"
    match = re.fullmatch(r"((?:[0-9]+(?:x[0-9]+)*)?)(?:<([0-9]+)(?:\.\.([0-9]+))?)?", rest)
    if front or not match or not piece:
        raise SourceError(
            f"input {piece!r} is not [name:][dtype:]SHAPE[<high[..last]], {_INPUT_EXAMPLES}"
        )
    if dtype not in _DTYPES:
        raise SourceError(f"input {piece!r}: dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    if not name:
        if position >= len(names):
            raise SourceError(f"input {piece!r}: forward takes {len(names)} inputs, not more")
        name = names[position]
    if name not in names:
        raise SourceError(f"input {piece!r}: forward has no {name!r}; it has {', '.join(names)}")
    shape = tuple(map(int, match[1].split("x"))) if match[1] else ()
    high, last = (int(text) if text else None for text in match.group(2, 3))
    if 0 in shape or high == 0:
        raise SourceError(f"input {piece!r}: a size or a bound is 0, {_INPUT_EXAMPLES}")
    if (dtype in _INTEGERS) != (high is not None):
        need = "needs its bound <high" if high is None else f"takes no bound <{high}"
        raise SourceError(f"input {piece!r}: {dtype} {need}, {_INPUT_EXAMPLES}")
    if last is not None and (not shape or high is None or last >= high or high < 2):
        raise SourceError(
            f"input {piece!r}: rows of numbers below {high} cannot end in {last}, {_INPUT_EXAMPLES}"
        )
    return InputSpec(name=name, dtype=dtype, shape=shape, high=high, last=last)


def example_inputs(
    specs: Sequence[InputSpec], batch_size: int, seed: int = 0
) -> tuple[Tensor, ...]:
    """Random inputs (B, *shape), equal for equal seeds: normal floats, integers below `high`.

    In a mask (bool, or integers below 2) the first position is 1, so that no row is all padding.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(_example(spec, batch_size, generator) for spec in specs)


def _example(spec: InputSpec, batch_size: int, generator: torch.Generator) -> Tensor:
    shape = (batch_size, *spec.shape)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if spec.dtype in _FLOATS:
        return torch.randn(shape, generator=generator).to(dtype)
    high = 2 if spec.high is None else spec.high
    values = torch.randint(high, shape, generator=generator)
    if high == 2 and spec.shape:
        values[..., 0] = 1
    return spec.ended(values).to(dtype)
