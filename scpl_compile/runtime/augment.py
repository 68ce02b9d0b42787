"""Image augmentation: random crop, mirror, and colour, as SCPL was released (paper.md 1.6).

Every number is drawn from the generator that the caller gives, so a batch can be made again; the
process's default generators, from which the stages draw, are not touched.

The colour changes are those of torchvision.transforms.v2.functional (a test compares them), written
for a whole batch: torchvision takes one strength per call, and its calls per image and change take
three times as long (23 ms per 128 images of 32x32 on one core), most of it holding Python's lock,
without which no stage can launch anything.
"""

import numpy as np
import torch
from torch import Tensor

from scpl_compile.errors import DataError
from scpl_compile.runtime.fit import luminance

__all__ = ["AUGMENTS", "augment", "crop_and_mirror", "jitter", "num_views"]

AUGMENTS = ("none", "basic", "strong")

_PADDING = 8  # crop from an image padded by 1/8 of its size on every side: 4 at 32
_STRENGTHS = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
_AT_A_TIME = 2**19  # values
_JITTER_CHANCE, _GRAY_CHANCE = 0.8, 0.2


def num_views(how: str) -> int:
    """How many views of every image `augment` gives.

    Raises:
        DataError: `how` is none of AUGMENTS.
    """
    if how not in AUGMENTS:
        raise DataError(f"augment {how!r} is not one of {', '.join(AUGMENTS)}")
    return 2 if how == "strong" else 1


def augment(images: Tensor, how: str, generator: torch.Generator, *, mirror: bool) -> Tensor:
    """uint8 (B, C, H, W), C = 1 or 3, to float32 (views · B, C, H, W) in 0 … 1, view-major.

    how: "none"; "basic": crop and mirror; "strong": two views, the basic one and one with colour
    changes on top. mirror: False where a mirrored image no longer has its label.
    """
    if how == "none":
        return _to_float(images)
    weak = _to_float(crop_and_mirror(images, generator, mirror=mirror))
    if how == "basic":
        return weak
    strong = _to_float(crop_and_mirror(images, generator, mirror=mirror))
    return torch.cat([weak, jitter(strong, generator)])


def _to_float(images: Tensor) -> Tensor:
    return images.to(torch.float32).div_(255)


def crop_and_mirror(images: Tensor, generator: torch.Generator, *, mirror: bool) -> Tensor:
    """Each image (B, C, H, W) cut at random from itself in a black frame, every other mirrored."""
    num, _, height, width = images.shape
    pad_y, pad_x = height // _PADDING, width // _PADDING
    tops = torch.randint(2 * pad_y + 1, (num,), generator=generator).tolist()
    lefts = torch.randint(2 * pad_x + 1, (num,), generator=generator).tolist()
    mirrored = (torch.rand(num, generator=generator) < (0.5 if mirror else 0.0)).tolist()
    framed = np.pad(images.numpy(), ((0, 0), (0, 0), (pad_y, pad_y), (pad_x, pad_x)))
    cropped = np.empty(tuple(images.shape), framed.dtype)
    # Slices of numpy: ten times faster here than one gather by index tensors.
    for i, (top, left, turn) in enumerate(zip(tops, lefts, mirrored, strict=True)):
        window = framed[i, :, top : top + height, left : left + width]
        cropped[i] = window[:, :, ::-1] if turn else window
    return torch.from_numpy(cropped)


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Float (B, C, H, W) in 0 … 1: four in five change in colour, one in five becomes grey.

    Brightness, contrast, saturation and hue change in an order of their own for every image.
    """
    num = len(images)
    strengths = torch.tensor(_STRENGTHS)
    factors = (2 * torch.rand(num, 4, generator=generator) - 1) * strengths
    order = torch.rand(num, 4, generator=generator).argsort(1)
    is_changed = torch.rand(num, generator=generator) < _JITTER_CHANCE
    is_gray = torch.rand(num, generator=generator) < _GRAY_CHANCE
    result = images.clone()
    # A few images at a time: temporaries that fit the cache are twice as fast at 224x224.
    for few in torch.arange(num).split(max(1, _AT_A_TIME // images[0].numel())):
        for turn in order[few].unbind(1):
            for number, change in enumerate((_brightness, _contrast, _saturation, _hue)):
                if len(rows := few[is_changed[few] & (turn == number)]):
                    factor = factors[rows, number].view(-1, 1, 1, 1)
                    result[rows] = change(result[rows], factor)
    result[is_gray] = luminance(result[is_gray]).expand(-1, images.shape[1], -1, -1)
    return result


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """From `other` (factor -1) over `images` (0) to as far beyond (1), within 0 … 1."""
    return (images + factor * (images - other)).clamp_(0, 1)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, torch.zeros_like(images), factor)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    # In float64, so that the sum's order (it follows the number of threads) is not seen.
    gray = luminance(images).mean((1, 2, 3), keepdim=True, dtype=torch.float64)
    return _blend(images, gray.to(images.dtype), factor)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, luminance(images), factor)


def _hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by `turn` of the full circle: RGB to hue, saturation, value and back."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    safe = chroma.clamp_min(torch.finfo(images.dtype).tiny)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )  # of six
    shifted = sector + 6 * turn
    # A channel is full (value) over two sectors, empty (value - chroma) over two, and on the way
    # between them in the other two.
    distances = [(shifted + offset).remainder(6) for offset in (5, 3, 1)]  # red, green, blue
    return torch.cat(
        [value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in distances], dim=1
    )
