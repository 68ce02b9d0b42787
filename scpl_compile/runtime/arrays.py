"""Data sets of the user's own arrays: an .npz file, or a function of a .py file.

Whether uint8 values are images (to be scaled, normalised, resized) or plain numbers follows from
the model: images feed a single input of floats.
"""

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scpl_compile.errors import DataError, ScplError, SourceError, context
from scpl_compile.ir import MULTI_LABEL, SINGLE_LABEL, InputSpec
from scpl_compile.runtime.labels import SUPPORTED, as_flags
from scpl_compile.runtime.loading import load_callable
from scpl_compile.runtime.splits import LazyImages, Split, Splits, make_splits

__all__ = ["MOST_UNPACKED", "Inputs", "callable_splits", "check_size", "npz_splits", "reading"]

Inputs = Sequence[InputSpec]
"""What the model takes; empty where that is not known."""

MOST_UNPACKED = 1032
"""Bytes that deflate can make of one."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns a failure to read `path` into a DataError that names it.

    Any failure: of a file that somebody made up, the libraries' readers raise all there is.
    """
    try:
        yield
    except (ScplError, MemoryError):
        raise
    except FileNotFoundError:
        raise DataError(f"the file {path} is missing") from None
    except Exception as error:
        raise DataError(f"{path} is damaged or cannot be read: {error}") from error


def check_size(path: Path, nbytes: int) -> None:
    """Before memory is taken for what a header within `path` claims to be `nbytes`.

    Raises:
        ValueError: the file cannot hold that, not even compressed, or this machine cannot.
    """
    if nbytes > MOST_UNPACKED * path.stat().st_size:
        raise ValueError(f"it claims to hold {nbytes} bytes, which its size does not allow")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if nbytes > memory:
        raise ValueError(f"it holds {nbytes} bytes, this machine has {memory}; take a part of it")


def npz_splits(spec: str, path: Path, inputs: Inputs, task: str = SINGLE_LABEL) -> Splits:
    """x_train, y_train and where they are x_val, y_val, x_test, y_test; or x, y.

    With several inputs the arrays have the names of the model's inputs: ids_train, mask_train.

    Raises:
        DataError: the file is missing, damaged, or holds other arrays.
    """
    with reading(path), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    known = (("train", ""), ("train", "_train"), ("validation", "_val"),
             ("validation", "_validation"), ("test", "_test"))  # fmt: skip
    parts = {part: suffix for part, suffix in known if f"y{suffix}" in names}  # the last one wins
    if "train" not in parts:
        raise DataError(f"{path} has no y_train and no y; its arrays: {', '.join(names)}")
    suffixes = tuple(suffix for _, suffix in known if suffix)
    own = [n for n in names if n.endswith(parts["train"]) and n != f"y{parts['train']}"]
    if not parts["train"]:
        own = [n for n in own if not n.endswith(suffixes)]
    fields = _in_order([n.removesuffix(parts["train"]) for n in own], inputs, path)

    def read(part: str) -> Split:
        keys = [f"{field}{parts[part]}" for field in (*fields, "y")]
        if absent := [key for key in keys if key not in names]:
            raise DataError(f"{path} has no {absent[0]}; its arrays: {', '.join(names)}")
        with reading(path), zipfile.ZipFile(path) as archive:
            arrays = [_read_array(path, archive, f"{key}.npy") for key in keys]
        return _split([*arrays[:-1]], arrays[-1], inputs, task, f"{path} {part}")

    return _of_arrays(spec, read, parts, inputs)


def _read_array(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array, whose header is compared with the size of its file first."""
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in another way than by np.savez_compressed")
    check_size(path, info.file_size)
    with archive.open(info) as file:
        is_first = np.lib.format.read_magic(file) == (1, 0)
        form = np.lib.format
        read = form.read_array_header_1_0 if is_first else form.read_array_header_2_0
        shape, _, dtype = read(file)
        nbytes = prod(shape) * dtype.itemsize
        if not dtype.hasobject and nbytes != info.file_size - file.tell():
            raise ValueError(f"{name} is of {shape} {dtype}, and has other than {nbytes} bytes")
    with archive.open(info) as file:
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        return array


def _in_order(fields: list[str], inputs: Inputs, path: Path) -> list[str]:
    wanted = [item.name for item in inputs]
    if fields and set(fields) == set(wanted):
        return wanted
    if fields and (not wanted or len(fields) == len(wanted) == 1):
        return fields
    example = ", ".join(f"{name}_train" for name in (*(wanted or ["x"]), "y"))
    raise DataError(
        f"{path} holds the inputs {', '.join(fields) or 'none'}; the model takes "
        f"{', '.join(wanted) or 'one'}: name the arrays as its inputs, like {example}"
    )


def callable_splits(
    spec: str, home: str, name: str, inputs: Inputs, task: str = SINGLE_LABEL
) -> Splits:
    """What `name` of the file `home` returns when it is called without arguments.

    {"train": (inputs, labels), "test": …} and where it is "validation"; inputs: a tensor, an
    array, or a tuple of them in the order of the model's inputs.

    Raises:
        DataError: there is no such function, it fails, or it returns something else.
    """
    try:
        function = load_callable(home, name)
    except SourceError as error:
        raise DataError(f"data {error}") from error
    if not callable(function):
        raise DataError(f"data {spec} is of type {type(function).__name__}, not a callable")
    try:
        given = function()
    except Exception as error:
        raise DataError(f"data {spec} failed with {type(error).__name__}: {error}") from error
    parts = ("train", "validation", "test")
    if not isinstance(given, Mapping) or not {"train", "test"} <= set(given) <= set(parts):
        got = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise DataError(
            f'data {spec} gave {got}; it must return {{"train": (inputs, labels), "test": …}} and '
            'may add "validation"'
        )

    def read(part: str) -> Split:
        pair = given[part]
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise DataError(f"data {spec}: {part} must be a pair (inputs, labels)")
        values = pair[0] if isinstance(pair[0], (tuple, list)) else (pair[0],)
        return _split(values, pair[1], inputs, task, f"{spec} {part}")

    return _of_arrays(spec, read, given, inputs)


def _of_arrays(
    spec: str, read: Callable[[str], Split], parts: Mapping[str, Any], inputs: Inputs
) -> Splits:
    train = read("train")
    return make_splits(
        spec,
        "image" if _is_image(train.inputs, inputs) else "tensor",
        train,
        read("validation") if "validation" in parts else None,
        (lambda: read("test")) if "test" in parts else None,
    )


def _split(values: Sequence[Any], labels: Any, inputs: Inputs, task: str, place: str) -> Split:
    tensors = tuple(_tensor(value, f"{place} inputs") for value in values)
    tensors = (_channels_first(tensors[0]),) if _is_image(tensors, inputs) else tensors
    if empty := [tuple(tensor.shape) for tensor in tensors if 0 in tensor.shape[1:]]:
        raise DataError(f"{place} inputs of the shape {empty[0]} have no values")
    targets = _tensor(labels, f"{place} labels")
    with context(place):
        targets = _flags(targets) if task == MULTI_LABEL else _classes(targets)
        return Split(inputs=tensors, labels=targets)


def _classes(labels: Tensor) -> Tensor:
    """int64 (N,)."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        more = f"; one-hot rows become integers by argmax(1), {SUPPORTED}" * (labels.ndim > 1)
        raise DataError(
            f"labels must be integers (N,), not {_name(labels.dtype)} {tuple(labels.shape)}{more}"
        )
    return labels.to(torch.int64)


def _flags(labels: Tensor) -> Tensor:
    """bool (N, classes)."""
    if labels.ndim != 2 or labels.is_complex():
        raise DataError(
            f"labels must be (N, classes) zeros and ones (task multi-label), not "
            f"{_name(labels.dtype)} {tuple(labels.shape)}"
        )
    return as_flags(labels)


def _tensor(value: Any, place: str) -> Tensor:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
    else:
        try:
            array = np.asarray(value)
            is_wide = array.dtype.kind == "u" and array.dtype.itemsize > 1  # torch cannot index it
            dtype = np.dtype(np.int64) if is_wide else array.dtype.newbyteorder("=")
            tensor = torch.from_numpy(array.astype(dtype))  # a copy: writable, contiguous
        except (TypeError, ValueError) as error:
            raise DataError(f"{place} are no array of numbers: {error}") from error
    if tensor.ndim == 0:
        raise DataError(f"{place} are one number, not an array with a row per sample")
    return tensor


def _is_image(values: Sequence[Tensor | LazyImages], inputs: Inputs) -> bool:
    """One uint8 array (N, H, W), (N, C, H, W) or (N, H, W, C) for a model of one float input."""
    if len(values) != 1 or values[0].dtype != torch.uint8:
        return False
    shape = values[0].shape
    is_shaped = len(shape) == 3 or (len(shape) == 4 and (shape[1] in (1, 3) or shape[3] in (1, 3)))
    return is_shaped and (not inputs or (len(inputs) == 1 and "float" in inputs[0].dtype))


def _channels_first(images: Tensor) -> Tensor:
    if images.ndim == 3:
        return images.unsqueeze(1)
    return images if images.shape[1] in (1, 3) else images.permute(0, 3, 1, 2).contiguous()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
