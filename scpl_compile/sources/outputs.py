"""Which of a model's outputs are the logits.

A model may give one tensor, or several in tuples, lists, dicts (transformers' ModelOutput is one),
named tuples and dataclasses. A `Structure` is such an output with a TensorMeta in place of every
tensor; an `OutputPath` leads to one of them, and its name is the path with dots: "logits", "0",
"states.2".
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from scpl_compile.errors import SourceError
from scpl_compile.ir import TensorMeta

__all__ = [
    "OutputPath",
    "Structure",
    "check_output",
    "choose_output",
    "output_name",
    "output_structure",
    "output_tensors",
    "pick_output",
]

Structure = TensorMeta | dict[str, Any] | list[Any] | None
"""Nested dicts and lists of TensorMeta; None where an output is no tensor."""

OutputPath = tuple[str | int, ...]
"""Keys and positions, outermost first; empty where the output is one tensor."""

_LISTED = 8


def output_structure(output: Any, described: Callable[[Any], TensorMeta | None]) -> Structure:
    """The structure of `output`; described: of what is inside, None for what is no tensor."""
    items = _items(output)
    if items is None:
        return described(output)
    inner = {key: output_structure(value, described) for key, value in items.items()}
    is_sequence = isinstance(output, (tuple, list)) and not hasattr(output, "_fields")
    return list(inner.values()) if is_sequence else {str(key): item for key, item in inner.items()}


def _items(output: Any) -> dict[Any, Any] | None:
    """What is directly inside a container; None if `output` is none."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return dict(zip(output._fields, output, strict=True))
    if is_dataclass(output) and not isinstance(output, (type, TensorMeta)):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    return None


def output_tensors(outputs: Structure) -> dict[OutputPath, TensorMeta]:
    """Every tensor of a structure by its path, in order."""
    return dict(_walk(outputs, ()))


def _walk(outputs: Structure, path: OutputPath) -> Iterator[tuple[OutputPath, TensorMeta]]:
    if isinstance(outputs, TensorMeta):
        yield path, outputs
        return
    items = _items(outputs)
    for key, item in (items or {}).items():
        yield from _walk(item, (*path, key))


def output_name(path: OutputPath) -> str:
    """As in `--output`."""
    return ".".join(map(str, path))


def pick_output(output: Any, path: OutputPath) -> Any:
    """What lies at `path` of a model's output; a single tensor is its own (other modes of a model
    may give less).
    """
    for key in path:
        if isinstance(output, Tensor):
            break
        items = _items(output)
        assert items is not None, f"{output_name(path)} was found in this structure"
        output = items[key]
    return output


def choose_output(
    outputs: Structure, *, name: str | None = None, num_classes: int | None, batch_size: int
) -> OutputPath:
    """The path of the logits.

    In this order: the one called `name`; the only tensor there is; the one called "logits"; the
    only float tensor of shape (batch_size, C) with C > 1, or with C = num_classes.

    Raises:
        SourceError: there is none, or more than one; lists the outputs.
    """
    tensors = output_tensors(outputs)
    if name is not None:
        return _named(name, tensors)
    if len(tensors) == 1:
        return next(iter(tensors))
    called = [path for path in tensors if path[-1] == "logits"]
    if len(called) == 1:
        return called[0]
    scores = [path for path, meta in tensors.items() if _is_scores(meta, batch_size)]
    fitting = [path for path in scores if tensors[path].shape[1] == num_classes]
    for candidates in (scores, fitting):
        if len(candidates) == 1:
            return candidates[0]
    which = f"{len(scores)} of them could be" if scores else "none of them can be"
    raise SourceError(
        f"the model gives {_listed(tensors)}: {which} the logits, float (batch, classes); "
        + ("name one with --output" if scores else _WRAP)
    )


_WRAP = "name a callable whose model returns one (B, num_classes) tensor: file.py:build"


def _is_scores(meta: TensorMeta, batch_size: int) -> bool:
    is_float = meta.dtype.startswith(("float", "bfloat"))
    shape = meta.shape
    return is_float and len(shape) == 2 and shape[0] == batch_size and shape[1] > 1


def _named(name: str, tensors: Mapping[OutputPath, TensorMeta]) -> OutputPath:
    for path in tensors:
        if path and output_name(path) == name:
            return path
    what = "one tensor without a name" if () in tensors else _listed(tensors)
    remedy = "leave out --output" if () in tensors else "name one of these"
    raise SourceError(f"--output {name}: the model gives {what}; {remedy}")


def _listed(tensors: Mapping[OutputPath, TensorMeta]) -> str:
    facts = [f"{output_name(path)} {meta.shape}" for path, meta in tensors.items()]
    more = [f"{len(facts) - _LISTED} more"] if len(facts) > _LISTED else []
    return ", ".join(facts[:_LISTED] + more) or "no tensor"


def check_output(shape: tuple[int, ...], *, num_classes: int | None, batch_size: int) -> int:
    """The number of classes of a model whose logits at `batch_size` have this shape.

    Raises:
        SourceError: the shape is not (batch_size, num_classes); says what it is and what to do.
    """
    if not shape or shape[0] != batch_size:
        raise SourceError(f"the model gives {shape} for a batch of {batch_size}; {_WRAP}")
    if len(shape) == 1 or shape[1:] == (1,):
        raise SourceError(
            f"the model gives {shape}: one number per sample is a regression; scpl needs classes: "
            "two outputs for a yes or no, or bins"
        )
    if len(shape) == 3:
        raise SourceError(
            f"the model gives {shape}: a prediction per token (a language model?); scpl needs "
            "one label per sample, or several with --task multi-label: pool over the tokens in "
            "forward"
        )
    if len(shape) > 3:
        raise SourceError(
            f"the model gives {shape}: a prediction per pixel or a feature map; scpl needs one "
            "label per sample, or several with --task multi-label: pool and classify in forward"
        )
    if num_classes is not None and shape[1] != num_classes:
        raise SourceError(
            f"the model gives {shape[1]} classes, --num-classes says {num_classes}; pass "
            f"--config num_classes={num_classes} (or the constructor's own name for it)"
        )
    return shape[1]
