"""The data sets that a user can name, each read into `Splits`.

::

    digits              scikit-learn's 1,797 scans of 8x8
    fashion-mnist[:DIR] 70,000 images of 28x28, from Debian's package dataset-fashion-mnist
    imagefolder:DIR     DIR/train/CLASS/*.png, and DIR/validation, DIR/test where they are
    npz:FILE            x_train, y_train and where they are x_val, y_val, x_test, y_test; or x, y
    csv:FILE            columns text, label and split, or text and label: token numbers
    file.py:callable    called without arguments; gives {"train": (inputs, labels), "test": …}
    random:N            N samples of the model's shapes with random labels
"""

import gzip
import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from scpl_compile.errors import DataError
from scpl_compile.ir import MULTI_LABEL, SINGLE_LABEL, InputSpec
from scpl_compile.runtime.arrays import Inputs, callable_splits, check_size, npz_splits, reading
from scpl_compile.runtime.data_facts import read_facts
from scpl_compile.runtime.splits import LazyImages, Split, Splits, make_splits, stratified
from scpl_compile.runtime.text import csv_splits

__all__ = ["Splits", "open_splits"]

_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def open_splits(
    spec: str,
    seed: int = 0,
    *,
    inputs: Inputs = (),
    num_classes: int | None = None,
    task: str = SINGLE_LABEL,
    facts: Path | None = None,
) -> Splits:
    """The data set that `spec` names (the module's docstring lists them).

    seed: of `random:N`; the splits of real data never depend on it.
    inputs: what the model takes; imagefolder and random need it, and npz orders its arrays by it.
    num_classes: of the labels of `random:N` (default 10). task: one label per sample, or labels
    (N, classes): those of npz, csv, a callable and random.
    facts: the file of the run whose model reads the data, where there is one: by it words, labels
    and folders are numbered, and images normalised; but for texts it may be missing.

    Raises:
        DataError: no such data set; a file is missing, damaged, or holds something else.
        ProgramError: the facts are damaged, or needed and missing.
    """
    kind, _, rest = spec.partition(":")
    if kind == "csv" and rest:
        known = None if facts is None else read_facts(facts)
        return csv_splits(spec, Path(rest).expanduser(), inputs, task, known)
    known = None if facts is None or not facts.exists() else read_facts(facts)
    splits = _open(spec, seed, inputs, num_classes, task, known.labels if known else ())
    if splits.kind == "tensor" or known is None or len(known.mean) != len(splits.facts.mean):
        return splits
    return replace(splits, facts=replace(splits.facts, mean=known.mean, std=known.std))


def _open(
    spec: str, seed: int, inputs: Inputs, num_classes: int | None, task: str, labels: Sequence[str]
) -> Splits:
    """All but csv. labels: those by which folders are numbered; none: by their order."""
    kind, _, rest = spec.partition(":")
    home, _, name = spec.rpartition(":")
    if home.endswith(".py"):
        return callable_splits(spec, home, name, inputs, task)
    match kind:
        case "digits" if not rest:
            return _digits()
        case "fashion-mnist":
            return _fashion_mnist(Path(rest).expanduser() if rest else _FASHION_MNIST)
        case "imagefolder" if rest:
            return _image_folder(spec, Path(rest).expanduser(), inputs, labels)
        case "npz" if rest:
            return npz_splits(spec, Path(rest).expanduser(), inputs, task)
        case "random" if rest:
            return _random(spec, rest, seed, inputs, num_classes or 10, task)
    known = ("digits", "fashion-mnist[:DIR]", "imagefolder:DIR", "npz:FILE", "csv:FILE",
             "file.py:callable", "random:N")  # fmt: skip
    close = get_close_matches(spec, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise DataError(f"there is no data set {spec!r}; {hint}known are {', '.join(known)}")


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
    with reading(path):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            magic, *shape = struct.unpack(f">4s{ndim}I", file.read(4 + 4 * ndim))
            check_size(path, math.prod(shape))
            values = bytearray(file.read(math.prod(shape) + 1))  # one more must not be there
        if magic != bytes([0, 0, 8, ndim]) or not 0 < math.prod(shape) == len(values):
            raise ValueError(f"not a whole idx file of {ndim} dimensions")
    return torch.frombuffer(values, dtype=torch.uint8).view(shape)


# ------------------------------------------------------------------ folders, random numbers


def _image_folder(spec: str, folder: Path, inputs: Inputs, labels: Sequence[str]) -> Splits:
    shape = inputs[0].shape if len(inputs) == 1 else ()
    if len(shape) != 3 or shape[0] not in (1, 3):
        takes = ", ".join(map(str, inputs)) or "nothing known"
        raise DataError(f"{spec} needs a model of one input 3xHxW or 1xHxW; it takes {takes}")
    size = (shape[0], shape[1], shape[2])
    train_folder = folder / "train"
    if not train_folder.is_dir():
        raise DataError(f"{train_folder} is missing; images lie in {folder}/train/CLASS/*.png")
    classes = labels or sorted(item.name for item in train_folder.iterdir() if item.is_dir())
    train = _class_folders(train_folder, classes, size)
    absent = set(range(len(classes))) - set(train.labels.tolist())
    if absent and not labels:
        raise DataError(f"{train_folder / classes[min(absent)]} holds no .png or .jpg image")
    parts = [folder / name for name in ("validation", "val") if (folder / name).is_dir()]
    validation = _class_folders(parts[0], classes, size) if parts else None
    test = folder / "test"
    read_test = (lambda: _class_folders(test, classes, size)) if test.is_dir() else None
    splits = make_splits(spec, "image", train, validation, read_test)
    return replace(splits, facts=replace(splits.facts, labels=tuple(classes)))


def _class_folders(folder: Path, classes: Sequence[str], size: tuple[int, int, int]) -> Split:
    paths: list[Path] = []
    labels: list[int] = []
    for item in sorted(item for item in folder.iterdir() if item.is_dir()):
        if item.name not in classes:
            raise DataError(f"{item} is no class that is trained ({', '.join(classes)})")
        found = sorted(path for path in item.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)
        paths += found
        labels += [classes.index(item.name)] * len(found)
    images = LazyImages(paths=tuple(paths), size=size)
    return Split(inputs=(images,), labels=torch.tensor(labels, dtype=torch.int64))


def _random(
    spec: str, count: str, seed: int, inputs: Inputs, num_classes: int, task: str
) -> Splits:
    if not count.isdecimal() or int(count) == 0:
        raise DataError(f"{spec!r} is not random:N with N samples, as in random:1000")
    if not inputs:
        raise DataError(f"{spec} needs the model's inputs to know its shapes")
    is_image = len(inputs) == 1 and "float" in inputs[0].dtype and len(inputs[0].shape) == 3
    is_image = is_image and inputs[0].shape[0] in (1, 3)

    def draw(size: int, stream: int) -> Split:
        generator = torch.Generator().manual_seed(seed * 3 + stream)
        values = tuple(_random_input(item, size, is_image, generator) for item in inputs)
        if task == MULTI_LABEL:  # two of them on average
            labels = torch.rand(size, num_classes, generator=generator) < min(2 / num_classes, 0.5)
        else:
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
    return item.ended(values).to(dtype)
