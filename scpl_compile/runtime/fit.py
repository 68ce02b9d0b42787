"""A data set's samples made into what the model takes, and the checks that they can be.

Images are resized, scaled to 0 … 1, given the model's number of channels and normalised with the
mean and standard deviation of the training images. Anything else is taken as it is, or refused.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from scpl_compile.errors import DataError
from scpl_compile.ir import MULTI_LABEL, SINGLE_LABEL, InputSpec
from scpl_compile.runtime.splits import LazyImages, Split, Splits

__all__ = ["ImageFit", "check_images", "check_split", "luminance"]

_LUMINANCE = (0.2989, 0.587, 0.114)
"""Red, green, blue in ITU-R BT.601 luma, rounded as torchvision rounds them."""


def luminance(images: Tensor) -> Tensor:
    """Float (B, C, H, W) as (B, 1, H, W): itself for one channel, weighted for three."""
    if images.shape[1] == 1:
        return images
    weights = images.new_tensor(_LUMINANCE).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageFit:
    """How uint8 images (B, C, h, w) become the model's input.

    shape: (C, H, W) of the model's input, as an image; mean, std: (1, C, 1, 1).
    """

    spec: InputSpec
    source: tuple[int, int, int]
    shape: tuple[int, int, int]
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, splits: Splits, spec: InputSpec) -> "ImageFit":
        """How the images of `splits` become `spec`.

        Raises:
            DataError: they cannot: an integer input, other channels, no image.
        """
        channels, height, width = splits.train.inputs[0].shape[1:]
        source = (channels, height, width)
        images = f"{splits.name} has {_by(source)} images"
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if not dtype.is_floating_point:
            raise DataError(f"{images}; input {spec.name!r} is {spec.dtype}, not floats")
        shape = spec.shape
        if len(shape) != 3 and math.prod(shape) == math.prod(source):
            shape = source  # flattened at the end: an MLP, or rows as a sequence
        if len(shape) != 3 or (channels, shape[0]) not in ((1, 1), (3, 3), (1, 3), (3, 1)):
            raise DataError(
                f"{images}; input {spec.name!r} takes {_by(spec.shape)}, which they become only "
                f"as 1xHxW, 3xHxW or {math.prod(source)} values"
            )
        mean = torch.tensor(splits.facts.mean).view(1, -1, 1, 1)
        std = torch.tensor(splits.facts.std).view(1, -1, 1, 1)
        if (channels, shape[0]) == (3, 1):
            # Exact for the mean; for std where the channels move together, else an upper bound.
            mean, std = luminance(mean), luminance(std)
        return cls(spec=spec, source=source, shape=shape, mean=mean, std=std)

    def resize(self, images: Tensor) -> Tensor:
        """uint8 (B, C, h, w) to uint8 (B, C, H, W): bilinear, antialiased where it shrinks."""
        if images.shape[2:] == self.shape[1:]:
            return images
        # Where it grows, antialiasing changes nothing (a test holds it).
        return F.interpolate(images, size=self.shape[1:], mode="bilinear", antialias=True)

    def finish(self, images: Tensor) -> Tensor:
        """Float (B, C, H, W) in 0 … 1 to normalised (B, *spec.shape) in its dtype; in place."""
        if self.shape[0] == 1:
            images = luminance(images)
        images = images.sub_(self.mean).div_(self.std)
        images = images.expand(-1, self.shape[0], -1, -1)
        fitted: Tensor = images.reshape(-1, *self.spec.shape)
        return fitted.to(getattr(torch, self.spec.dtype)).contiguous()

    def describe(self) -> list[str]:
        """What is done, in phrases; empty where the images are taken as they are."""
        done = []
        (channels, *size), (wanted, *wanted_size) = self.source, self.shape
        if size != wanted_size:
            done.append(f"{_by(size)} images resized to {_by(wanted_size)}")
        if channels < wanted:
            done.append("one channel repeated to 3")
        if channels > wanted:
            done.append("three channels to one (luminance)")
        if self.shape != self.spec.shape:
            done.append(f"{_by(self.source)} images read as {_by(self.spec.shape)}")
        return done


def check_split(
    name: str,
    part: str,
    split: Split,
    inputs: tuple[InputSpec, ...],
    num_classes: int,
    task: str = SINGLE_LABEL,
) -> None:
    """Whether the tensors of `split` are what the model takes, and its labels known to it.

    On the host and before training: on a device it would be an assert without a name.

    Raises:
        DataError: names the input, what it is and what it must be.
    """
    _check_labels(name, part, split.labels, num_classes, task)
    if len(split.inputs) != len(inputs):
        wanted = ", ".join(map(str, inputs))
        raise DataError(
            f"{name}: {part} has {len(split.inputs)} inputs, the model takes {len(inputs)} "
            f"({wanted})"
        )
    for values, spec in zip(split.inputs, inputs, strict=True):
        _check_input(f"{name}: {part} input {spec.name!r}", values, spec)


def check_images(
    name: str,
    part: str,
    split: Split,
    fit: ImageFit,
    num_classes: int,
    task: str = SINGLE_LABEL,
) -> None:
    """The same for images: any size will do, the kind and the channels must be those of train.

    Raises:
        DataError: names the split, what it has and what it must have.
    """
    _check_labels(name, part, split.labels, num_classes, task)
    images = split.inputs[0]
    if images.dtype != torch.uint8 or images.shape[1] != fit.source[0]:
        raise DataError(
            f"{name}: {part} has {images.dtype} {_by(images.shape[1:])}, train has uint8 images "
            f"{_by(fit.source)}"
        )


def _check_labels(name: str, part: str, labels: Tensor, num_classes: int, task: str) -> None:
    if len(labels) == 0:
        raise DataError(f"{name}: {part} has no sample; give it some of its own, or more in all")
    if (labels.ndim > 1) != (task == MULTI_LABEL):
        has = "several labels per sample" if labels.ndim > 1 else "one label per sample"
        raise DataError(f"{name} has {has}; the program was compiled with --task {task}")
    if task == MULTI_LABEL:
        if labels.shape[1] != num_classes:
            raise DataError(
                f"{name}: {part} has {labels.shape[1]} labels (columns), the model gives "
                f"{num_classes} classes; compile with --num-classes {labels.shape[1]}"
            )
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise DataError(
            f"{name}: label {low} at {part} sample {int(labels.argmin())} is out of range; labels "
            "go from 0 to the number of classes - 1"
        )
    if high >= num_classes:
        raise DataError(
            f"{name}: label {high} at {part} sample {int(labels.argmax())} is out of range for "
            f"{num_classes} classes; pass --num-classes {high + 1}"
        )


def _check_input(place: str, values: Tensor | LazyImages, spec: InputSpec) -> None:
    if tuple(values.shape[1:]) != spec.shape:
        raise DataError(
            f"{place} has the shape {_by(values.shape[1:])} per sample, the model takes "
            f"{_by(spec.shape)}"
        )
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if not torch.can_cast(values.dtype, dtype):
        got = str(values.dtype).removeprefix("torch.")
        raise DataError(f"{place} is {got}, the model takes {spec.dtype}; convert the array")
    if spec.high is not None and isinstance(values, Tensor) and values.numel():
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= spec.high:
            bad = low if low < 0 else high
            sample = int((values == bad).flatten(1).any(1).nonzero()[0])
            raise DataError(
                f"{place} has the value {bad} at sample {sample}, the model takes 0 to "
                f"{spec.high - 1}"
            )


def _by(shape: tuple[int, ...] | torch.Size | list[int]) -> str:
    return "x".join(map(str, shape)) or "one number"
