"""The data sets that a user can name, each read into `Splits`.

::

    digits              scikit-learn's 1,797 scans of 8x8
    fashion-mnist[:DIR] 70,000 images of 28x28, from Debian's package dataset-fashion-mnist
    imagefolder:DIR     DIR/train/CLASS/*.png, and DIR/validation, DIR/test where they are
    npz:FILE            x_train, y_train and where they are x_val, y_val, x_test, y_test; or x, y
    file.py:callable    called without arguments; gives {"train": (inputs, labels), "test": …}
    random:N            N samples of the model's shapes with random labels

Whether uint8 values are images (scaled, normalised, resized) or plain numbers follows from the
model: images feed a single input of floats.
"""

import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scpl_compile.errors import DataError, SourceError
from scpl_compile.ir import InputSpec
from scpl_compile.runtime.loading import load_callable
from scpl_compile.runtime.splits import LazyImages, Split, Splits, make_splits, stratified

__all__ = ["Splits", "open_splits"]

Inputs = Sequence[InputSpec]

_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_DAMAGED = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, struct.error)


def open_splits(
    spec: str, seed: int = 0, *, inputs: Inputs = (), num_classes: int | None = None
) -> Splits:
    """The data set that `spec` names (the module's docstring lists them).

    seed: of `random:N`; the splits of real data never depend on it.
    inputs: what the model takes; imagefolder and random need it, and npz orders its arrays by it.
    num_classes: of the labels of `random:N` (default 10).

    Raises:
        DataError: no such data set; a file is missing, damaged, or holds something else.
    """
    kind, _, rest = spec.partition(":")
    home, _, name = spec.rpartition(":")
    if home.endswith(".py"):
        return _from_callable(spec, home, name, inputs)
    match kind:
        case "digits" if not rest:
            return _digits()
        case "fashion-mnist":
            return _fashion_mnist(Path(rest).expanduser() if rest else _FASHION_MNIST)
        case "imagefolder" if rest:
            return _image_folder(spec, Path(rest).expanduser(), inputs)
        case "npz" if rest:
            return _npz(spec, Path(rest).expanduser(), inputs)
        case "random" if rest:
            return _random(spec, rest, seed, inputs, num_classes or 10)
    known = ("digits", "fashion-mnist[:DIR]", "imagefolder:DIR", "npz:FILE", "file.py:callable",
             "random:N")  # fmt: skip
    close = get_close_matches(spec, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise DataError(f"there is no data set {spec!r}; {hint}Known: {', '.join(known)}")


# ------------------------------------------------------------------ packaged data


def _digits() -> Splits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            f"digits needs scikit-learn; pip install 'scpl-compile[demo]' ({error})"
        ) from error
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).reshape(-1, 1, 8, 8)  # 0 … 16
    everything = Split(
        inputs=((pixels * (255 / 16)).round().to(torch.uint8),),
        labels=torch.from_numpy(labels).to(torch.int64),
    )
    train, validation, test = map(everything.subset, stratified(everything.labels, (0.1, 0.2)))
    return make_splits("digits", "image", train, validation, lambda: test, flip_safe=False)


def _fashion_mnist(folder: Path) -> Splits:
    everything = _idx_pair(folder, "train")
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(everything), generator=generator)
    num_validation = len(everything) // 12  # 5,000 of the 60,000
    rows = order.split([len(everything) - num_validation, num_validation])
    train, validation = (everything.subset(part.sort().values) for part in rows)
    return make_splits(
        "fashion-mnist", "image", train, validation, lambda: _idx_pair(folder, "t10k")
    )


def _idx_pair(folder: Path, part: str) -> Split:
    images = _read_idx(folder, f"{part}-images-idx3-ubyte", 3)
    labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise DataError(f"{folder} has {len(images)} {part} images and {len(labels)} labels")
    return Split(inputs=(images.unsqueeze(1),), labels=labels.to(torch.int64))


def _read_idx(folder: Path, name: str, ndim: int) -> Tensor:
    """uint8 of an idx file: 0, 0, 8 (bytes), ndim, the sizes (big-endian), the values."""
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if path is None:
        raise DataError(
            f"{folder / name}.gz is missing; apt-get install dataset-fashion-mnist, or name the "
            "folder: fashion-mnist:DIR"
        )
    with _reading(path):
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        shape = struct.unpack_from(f">{ndim}I", content, 4)
        values = bytearray(content[4 + 4 * ndim :])
        if content[:4] != bytes([0, 0, 8, ndim]) or len(values) != math.prod(shape):
            raise ValueError(f"not a whole idx file of {ndim} dimensions")
    return torch.frombuffer(values, dtype=torch.uint8).view(shape)


# ------------------------------------------------------------------ the user's data


def _image_folder(spec: str, folder: Path, inputs: Inputs) -> Splits:
    shape = inputs[0].shape if len(inputs) == 1 else ()
    if len(shape) != 3 or shape[0] not in (1, 3):
        takes = ", ".join(map(str, inputs)) or "nothing known"
        raise DataError(f"{spec} needs a model of one input 3xHxW or 1xHxW; it takes {takes}")
    size = (shape[0], shape[1], shape[2])
    train_folder = folder / "train"
    if not train_folder.is_dir():
        raise DataError(f"{train_folder} is missing; images lie in {folder}/train/CLASS/*.png")
    classes = sorted(item.name for item in train_folder.iterdir() if item.is_dir())
    train = _class_folders(train_folder, classes, size)
    if absent := set(range(len(classes))) - set(train.labels.tolist()):
        raise DataError(f"{train_folder / classes[min(absent)]} holds no .png or .jpg image")
    parts = [folder / name for name in ("validation", "val") if (folder / name).is_dir()]
    validation = _class_folders(parts[0], classes, size) if parts else None
    test = folder / "test"
    read_test = (lambda: _class_folders(test, classes, size)) if test.is_dir() else None
    return make_splits(spec, "image", train, validation, read_test)


def _class_folders(folder: Path, classes: list[str], size: tuple[int, int, int]) -> Split:
    paths: list[Path] = []
    labels: list[int] = []
    for item in sorted(item for item in folder.iterdir() if item.is_dir()):
        if item.name not in classes:
            raise DataError(f"{item} is no class of the train folder ({', '.join(classes)})")
        found = sorted(path for path in item.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)
        paths += found
        labels += [classes.index(item.name)] * len(found)
    images = LazyImages(paths=tuple(paths), size=size)
    return Split(inputs=(images,), labels=torch.tensor(labels, dtype=torch.int64))


def _npz(spec: str, path: Path, inputs: Inputs) -> Splits:
    with _reading(path), path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("one array, not an archive of arrays as np.savez writes it")
        names = list(archive.files)
    parts = {
        part: suffix
        for part, suffix in (("train", "_train"), ("train", ""), ("validation", "_validation"),
                             ("validation", "_val"), ("test", "_test"))
        if f"y{suffix}" in names
    }  # fmt: skip
    if "train" not in parts:
        raise DataError(f"{path} has no y_train and no y; its arrays: {', '.join(names)}")
    suffixes = ("_train", "_validation", "_val", "_test")
    own = [n for n in names if n.endswith(parts["train"]) and n != f"y{parts['train']}"]
    if not parts["train"]:
        own = [n for n in own if not n.endswith(suffixes)]
    fields = _in_order([n.removesuffix(parts["train"]) for n in own], inputs, path)

    def read(part: str) -> Split:
        keys = [f"{field}{parts[part]}" for field in (*fields, "y")]
        if absent := [key for key in keys if key not in names]:
            raise DataError(f"{path} has no {absent[0]}; its arrays: {', '.join(names)}")
        with _reading(path), path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            arrays = [archive[key] for key in keys]
        return _split([*arrays[:-1]], arrays[-1], inputs, f"{path} {part}")

    return _of_arrays(spec, read, parts, inputs)


def _in_order(fields: list[str], inputs: Inputs, path: Path) -> list[str]:
    wanted = [item.name for item in inputs]
    if set(fields) == set(wanted):
        return wanted
    if fields and (not wanted or len(fields) == len(wanted) == 1):
        return fields
    raise DataError(
        f"{path} holds the inputs {', '.join(fields) or 'none'}; the model takes "
        f"{', '.join(wanted)}: name the arrays {', '.join(f'{name}_train' for name in wanted)}"
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns a failure to read `path` into a DataError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"the file {path} is missing") from None
    except _DAMAGED as error:
        raise DataError(f"{path} is damaged or cannot be read: {error}") from error


def _from_callable(spec: str, home: str, name: str, inputs: Inputs) -> Splits:
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
        return _split(values, pair[1], inputs, f"{spec} {part}")

    return _of_arrays(spec, read, given, inputs)


# ------------------------------------------------------------------ arrays


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


def _split(values: Sequence[Any], labels: Any, inputs: Inputs, place: str) -> Split:
    tensors = tuple(_tensor(value, f"{place} inputs") for value in values)
    tensors = (_channels_first(tensors[0]),) if _is_image(tensors, inputs) else tensors
    targets = _tensor(labels, f"{place} labels")
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets.squeeze(1)
    if targets.ndim != 1 or targets.is_floating_point() or targets.is_complex():
        raise DataError(
            f"{place} labels must be integers (N,), not {_name(targets.dtype)} "
            f"{tuple(targets.shape)}; one-hot rows become integers by argmax(1)"
        )
    try:
        return Split(inputs=tensors, labels=targets.to(torch.int64))
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


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


def _random(spec: str, count: str, seed: int, inputs: Inputs, num_classes: int) -> Splits:
    if not count.isdecimal() or int(count) == 0:
        raise DataError(f"{spec!r} is not random:N with N samples, as in random:1000")
    if not inputs:
        raise DataError(f"{spec} needs the model's inputs to know its shapes")
    is_image = len(inputs) == 1 and "float" in inputs[0].dtype and len(inputs[0].shape) == 3
    is_image = is_image and inputs[0].shape[0] in (1, 3)

    def draw(size: int, stream: int) -> Split:
        generator = torch.Generator().manual_seed(seed * 3 + stream)
        values = tuple(_random_input(item, size, is_image, generator) for item in inputs)
        labels = torch.randint(num_classes, (size,), generator=generator)
        return Split(inputs=values, labels=labels)

    kind: Literal["image", "tensor"] = "image" if is_image else "tensor"
    train = draw(int(count), 0)
    few = math.ceil(int(count) / 5)
    return make_splits(spec, kind, train, draw(few, 1), lambda: draw(few, 2))


def _random_input(item: InputSpec, size: int, is_image: bool, generator: torch.Generator) -> Tensor:
    shape = (size, *item.shape)
    if is_image:
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    dtype: torch.dtype = getattr(torch, item.dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=dtype, generator=generator)
    high = item.high or 2
    values = torch.randint(high, shape, generator=generator)
    if high == 2 and item.shape:
        values[..., 0] = 1  # a mask of nothing but padding would make attention give NaN
    return values.to(dtype)
