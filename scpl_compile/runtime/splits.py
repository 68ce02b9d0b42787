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

__all__ = ["LazyImages", "Split", "Splits", "channel_statistics", "make_splits", "stratified"]

SPLIT_SEED = 0
"""Which samples are for validation and test never depends on the seed of a run."""

_VALIDATION_SHARE, _TEST_SHARE = 0.1, 0.2
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
    mean, std: per channel of the training images in 0 … 1; empty for tensors.
    read_test: reads the test split, which training must not need; use `test`.
    flip_safe: whether a mirrored image still has its label (a mirrored digit has not).
    note: what was done to make the splits, or "".
    """

    name: str
    kind: Literal["image", "tensor"]
    num_classes: int
    train: Split
    validation: Split
    read_test: Callable[[], Split]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip_safe: bool
    note: str

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
    """A data set from its parts; a missing one is taken out of train, stratified and fixed.

    Validation takes 10 % of train, test 20 %.

    Raises:
        DataError: train has no sample, or too few to give some away.
    """
    if len(train) == 0:
        raise DataError(f"{name} has no training sample")
    shares = {"validation": _VALIDATION_SHARE} if validation is None else {}
    if read_test is None:
        shares["test"] = _TEST_SHARE
    parts = _take_out(name, train, shares) if shares else {"train": train}
    mean, std = channel_statistics(parts["train"].inputs[0]) if kind == "image" else ((), ())
    taken = " and ".join(f"{100 * share:.0f} % for {part}" for part, share in shares.items())
    return Splits(
        name=name,
        kind=kind,
        num_classes=train.labels.shape[1] if train.labels.ndim > 1 else int(train.labels.max()) + 1,
        train=parts["train"],
        validation=parts["validation"] if validation is None else validation,
        read_test=cache(read_test or (lambda: parts["test"])),
        mean=mean,
        std=std,
        flip_safe=flip_safe,
        note=f"{taken} taken out of its training samples" if taken else "",
    )


def _take_out(name: str, train: Split, shares: Mapping[str, float]) -> dict[str, Split]:
    rows = stratified(train.labels, tuple(shares.values()))
    parts = {part: train.subset(r) for part, r in zip(("train", *shares), rows, strict=True)}
    for part, split in parts.items():
        if len(split) == 0:
            raise DataError(
                f"{name} has {len(train)} training samples, too few to take a {part} split out of; "
                f"give it a {part} split of its own, or more samples"
            )
    return parts


def stratified(labels: Tensor, shares: Sequence[float]) -> tuple[Tensor, ...]:
    """(rest, part for each share): rows in ascending order, every class in the same shares; of
    labels (N, classes) rows by chance.

    The same labels always give the same rows.
    """
    if labels.ndim > 1:
        labels = labels.new_zeros(len(labels))
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
