"""What every data set becomes: train, validation and test, as tensors or as images on disk."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod, sqrt
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scpl_compile.errors import DataError
from scpl_compile.runtime.data_facts import DataFacts

__all__ = [
    "LazyImages",
    "Split",
    "Splits",
    "channel_statistics",
    "check_parts",
    "make_splits",
    "stratified",
    "take_out",
]

SPLIT_SEED = 0
"""Which samples are for validation and test never depends on the seed of a run."""

_SHARES = {"validation": 0.1, "test": 0.2}
_STATISTICS_IMAGES = 1000
"""Images on disk that are decoded for mean and std; of images in memory all are read."""

_AT_A_TIME = 2**20  # pixels
_MOST_PIXELS = 8 * 1032
"""Of a byte of a PNG file: deflate makes 1032 bytes of it, with 8 pixels each; JPEG has fewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyImages:
    """Image files that are decoded when they are indexed.

    `images[rows]` with int64 rows (B,) is uint8 (B, C, H, W), resized to `size` = (C, H, W).
    """

    paths: tuple[Path, ...]
    size: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        return (len(self.paths), *self.size)

    @property
    def dtype(self) -> torch.dtype:
        """uint8."""
        return torch.uint8

    def __getitem__(self, rows: Tensor) -> Tensor:
        images = [_decode(self.paths[row], self.size) for row in rows.tolist()]
        return (
            torch.from_numpy(np.stack(images))
            if images
            else torch.empty((0, *self.size), dtype=self.dtype)
        )

    def subset(self, rows: Tensor) -> "LazyImages":
        """The same images, only `rows` of them, undecoded."""
        return replace(self, paths=tuple(self.paths[row] for row in rows.tolist()))


def _decode(path: Path, size: tuple[int, int, int]) -> np.ndarray:
    channels, height, width = size
    try:
        # Of these formats alone: Pillow knows some that other programs decode, as PostScript.
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            num_pixels = image.width * image.height
            if num_pixels > _MOST_PIXELS * path.stat().st_size:
                raise ValueError(f"{num_pixels} pixels cannot be in a file of its size")
            pixels = image.convert("L" if channels == 1 else "RGB").resize(
                (width, height), Image.Resampling.BILINEAR
            )
    except Exception as error:
        # Of a file that somebody made up, Pillow raises all there is, even MemoryError.
        raise DataError(f"{path} is damaged or no image: {error}") from error
    return np.asarray(pixels).reshape(height, width, channels).transpose(2, 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Samples and their labels: inputs each (N, …) on the CPU, labels int64 (N,), or bool
    (N, classes) where a sample has any number of them.
    """

    inputs: tuple[Tensor | LazyImages, ...]
    labels: Tensor

    def __post_init__(self) -> None:
        for i, values in enumerate(self.inputs):
            if len(values) != len(self.labels):
                raise DataError(f"input {i} has {len(values)} samples and {len(self)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, rows: Tensor) -> "Split":
        """The samples at int64 `rows` (n,)."""
        inputs = tuple(x[rows] if isinstance(x, Tensor) else x.subset(rows) for x in self.inputs)
        return Split(inputs=inputs, labels=self.labels[rows])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Splits:
    """A data set.

    kind: "image" (one input of uint8 (N, C, H, W), C = 1 or 3) or "tensor" (anything else).
    num_classes: one more than the largest training label; columns of labels (N, classes).
    read_test: reads the test split, which training must not need; use `test`.
    flip_safe: whether a mirrored image still has its label (a mirrored digit has not).
    note: what was done to make the splits, or "".
    facts: what a model learns of the training samples beside its weights.
    """

    name: str
    kind: Literal["image", "tensor"]
    num_classes: int
    train: Split
    validation: Split
    read_test: Callable[[], Split]
    flip_safe: bool
    note: str
    facts: DataFacts

    @property
    def test(self) -> Split:
        """The test split; read at the first use."""
        return self.read_test()


def make_splits(
    name: str,
    kind: Literal["image", "tensor"],
    train: Split,
    validation: Split | None = None,
    read_test: Callable[[], Split] | None = None,
    *,
    flip_safe: bool = True,
) -> Splits:
    """A data set from its parts; a missing one is taken out of train, as by `take_out`.

    Raises:
        DataError: train has no sample, or too few to give some away.
    """
    if len(train) == 0:
        raise DataError(f"{name} has no training sample")
    missing = ["validation"] * (validation is None) + ["test"] * (read_test is None)
    parts, note = {"train": train}, ""
    if missing:
        rows, note = take_out(train.labels, missing)
        check_parts(name, len(train), rows)
        parts = {part: train.subset(chosen) for part, chosen in rows.items()}
    mean, std = channel_statistics(parts["train"].inputs[0]) if kind == "image" else ((), ())
    return Splits(
        name=name,
        kind=kind,
        num_classes=train.labels.shape[1] if train.labels.ndim > 1 else int(train.labels.max()) + 1,
        train=parts["train"],
        validation=parts["validation"] if validation is None else validation,
        read_test=cache(read_test or (lambda: parts["test"])),
        flip_safe=flip_safe,
        note=note,
        facts=DataFacts(mean=mean, std=std),
    )


def take_out(labels: Tensor, missing: Sequence[str]) -> tuple[dict[str, Tensor], str]:
    """The rows of train and of each `missing` part, of training samples with these labels, and a
    note of what was done. Validation takes 10 %, test 20 %, stratified and fixed.
    """
    shares = [_SHARES[part] for part in missing]
    rows = dict(zip(("train", *missing), stratified(labels, shares), strict=True))
    taken = " and ".join(f"{100 * _SHARES[part]:.0f} % for {part}" for part in missing)
    return rows, f"{taken} taken out of its training samples" if taken else ""


def check_parts(name: str, num_samples: int, rows: Mapping[str, Tensor]) -> None:
    """Raises DataError where `take_out` could give a part no row of `num_samples`."""
    for part, chosen in rows.items():
        if len(chosen) == 0:
            raise DataError(
                f"{name} has {num_samples} training samples, too few to take a {part} split out "
                f"of; give it a {part} split of its own, or more samples"
            )


def stratified(labels: Tensor, shares: Sequence[float]) -> tuple[Tensor, ...]:
    """(rest, part for each share): rows in ascending order, every class in the same shares; of
    labels (N, classes) rows by chance, and a row with a label that no row of the rest would have
    goes to the rest. So the rest always has every class.

    The same labels always give the same rows.
    """
    if labels.ndim > 1:
        rest, *others = stratified(labels.new_zeros(len(labels)), shares)
        is_needed = (labels & ~labels[rest].any(0)).any(1)
        rest = torch.cat([rest, *(part[is_needed[part]] for part in others)]).sort().values
        return rest, *(part[~is_needed[part]] for part in others)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    by_class = order[labels[order].argsort(stable=True)]
    parts: list[list[Tensor]] = [[] for _ in range(len(shares) + 1)]
    for rows in by_class.split(labels.unique(return_counts=True)[1].tolist()):
        counts = [round(share * len(rows)) for share in shares]
        pieces = rows.split([len(rows) - sum(counts), *counts])
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    return tuple(torch.cat(part).sort().values for part in parts)


def channel_statistics(
    images: Tensor | LazyImages,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel of uint8 images (N, C, H, W), in 0 … 1; a constant has std 1.

    Exact integer sums, so the order of the images does not matter.
    """
    rows = torch.arange(len(images))
    if isinstance(images, LazyImages) and len(images) > _STATISTICS_IMAGES:
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        rows = torch.randperm(len(images), generator=generator)[:_STATISTICS_IMAGES]
    total = torch.zeros(images.shape[1], dtype=torch.int64)
    squares = torch.zeros_like(total)
    count = 0
    for chunk in rows.split(max(1, _AT_A_TIME // prod(images.shape[1:]))):
        pixels = images[chunk].transpose(0, 1).flatten(1).to(torch.int32)
        total += pixels.sum(1)
        squares += pixels.square().sum(1)
        count += pixels.shape[1]
    # In exact integers: count² · variance = count · squares - total²
    pairs = list(zip(total.tolist(), squares.tolist(), strict=True))
    std = tuple(sqrt(count * square - one**2) / (255 * count) for one, square in pairs)
    return tuple(one / (255 * count) for one, _ in pairs), tuple(value or 1.0 for value in std)
