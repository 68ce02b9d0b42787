"""The loader: batches of a data set, made for the model.

Batch i of an epoch is a pure function of (seed, epoch, i), its augmentation too. So a run that goes
on after step t makes the batches that it would have made, and needs nothing but t for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from scpl_compile.errors import DataError
from scpl_compile.ir import SINGLE_LABEL, InputSpec
from scpl_compile.runtime.augment import augment as augment_images
from scpl_compile.runtime.augment import num_views
from scpl_compile.runtime.fit import ImageFit, check_images, check_split
from scpl_compile.runtime.prefetch import prefetch
from scpl_compile.runtime.randomness import spread_seed
from scpl_compile.runtime.splits import Split, Splits

__all__ = ["Batch", "Loader"]

_SPLITS = ("train", "validation", "test")
_ORDER, _BATCH = 3, 4  # what a seed is spread for (trainer.py has 1 and 2)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """One batch on the CPU: labels int64 (B,) or bool (B, classes), every input (views · B, …),
    view-major.

    With two views the inputs are [first view of all; second view of all]; the labels stand there
    once, and are repeated where they are needed.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor
    views: int

    def share(self, index: int, count: int) -> "Batch":
        """The part of replica `index` of `count`; all have the same size, a rest is left out."""
        size = len(self.labels) // count
        rows = slice(index * size, (index + 1) * size)
        inputs = tuple(
            values.unflatten(0, (self.views, -1))[:, rows].flatten(0, 1) for values in self.inputs
        )
        return Batch(inputs=inputs, labels=self.labels[rows], views=self.views)


class Loader:
    """Batches of `splits`, fitted to the model's inputs.

    inputs, num_classes: of the model; task: of the plan. augment: "none", "basic" or "strong" (two
    views), of training batches only. seed: of the order and the augmentation. The last batch of an
    epoch is smaller where the batch size does not divide it, unless `drop_last`.
    share: (replica, number of replicas), of training batches. reads: whether the inputs are
    needed; else they are tensors on the meta device, which have shapes alone.

    trains: whether there must be training and validation samples.

    Train and validation are checked here, test when it is first asked for.

    Raises:
        DataError: labels out of range; inputs of another number, shape, dtype or range; an
            augmentation that does not go with the data.
    """

    def __init__(
        self,
        splits: Splits,
        *,
        inputs: tuple[InputSpec, ...],
        num_classes: int,
        task: str = SINGLE_LABEL,
        batch_size: int,
        augment: str = "none",
        seed: int = 0,
        drop_last: bool = False,
        share: tuple[int, int] = (0, 1),
        reads: bool = True,
        trains: bool = True,
    ) -> None:
        self.splits = splits
        self.batch_size = batch_size
        self.augment = augment
        self.seed = seed
        self._inputs = inputs
        self._classes = (num_classes, task)
        self._views = num_views(augment)
        self._share = share
        self._reads = reads
        self._fit = self._fit_images()
        for part in ("train", "validation"):
            if trains or len(getattr(splits, part)):
                self._checked_split(part)
        num_samples = len(splits.train)
        if batch_size < 1:
            raise DataError(f"the batch size is {batch_size}; give at least 1")
        rest = 0 if drop_last or num_samples % batch_size == 0 else 1
        self.num_batches = num_samples // batch_size + rest
        """Batches of one epoch."""
        if self.num_batches == 0 and trains:
            raise DataError(
                f"{splits.name} has {num_samples} training samples, no whole batch of "
                f"{batch_size}; take a smaller batch, or keep the last one"
            )
        self._order = lru_cache(maxsize=2)(self._make_order)

    def _fit_images(self) -> ImageFit | None:
        splits = self.splits
        if splits.kind != "image":
            if self.augment != "none":
                raise DataError(
                    f"augment {self.augment!r} needs images, and {splits.name} has none; pass "
                    "--augment none"
                )
            return None
        if len(self._inputs) != 1:
            names = ", ".join(map(str, self._inputs))
            raise DataError(f"{splits.name} has images alone; the model takes {names}")
        return ImageFit.of(splits, self._inputs[0])

    @property
    def fit_notice(self) -> str | None:
        """One sentence on what is done to the data; None where it is taken as it is."""
        done = self._fit.describe() if self._fit is not None else []
        done += [self.splits.note] if self.splits.note else []
        return f"{self.splits.name}: {', '.join(done)}" if done else None

    # ------------------------------------------------------------------ training

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch `index` of `epoch`: the same whenever, wherever and in whatever order it is made.

        Raises:
            DataError: an image cannot be decoded.
        """
        if not 0 <= index < self.num_batches:
            raise IndexError(f"batch {index} of {self.num_batches}")
        start = index * self.batch_size
        rows = self._order(epoch)[start : start + self.batch_size]
        seed = spread_seed(self.seed, _BATCH, epoch, index)
        made = self._make(self.splits.train, rows, torch.Generator().manual_seed(seed))
        return made if self._share[1] == 1 else made.share(*self._share)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from `start` on, made ahead in a background thread."""
        return prefetch(self.batch(epoch, index) for index in range(start, self.num_batches))

    def _make_order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(spread_seed(self.seed, _ORDER, epoch))
        return torch.randperm(len(self.splits.train), generator=generator)

    # ------------------------------------------------------------------ evaluation

    def evaluation(self, split_name: str) -> Iterator[Batch]:
        """All samples of "train", "validation" or "test", in their order and not augmented.

        Raises:
            DataError: there is no such split, or it does not fit the model.
        """
        split = self._checked_split(split_name)
        chunks = torch.arange(len(split)).split(self.batch_size)
        return prefetch(self._make(split, rows, None) for rows in chunks)

    def _checked_split(self, name: str) -> Split:
        if name not in _SPLITS:
            raise DataError(f"{self.splits.name} has no split {name!r}; train, validation or test")
        split: Split = getattr(self.splits, name)
        if self._fit is None:
            check_split(self.splits.name, name, split, self._inputs, *self._classes)
        else:
            check_images(self.splits.name, name, split, self._fit, *self._classes)
        return split

    def _make(self, split: Split, rows: Tensor, generator: torch.Generator | None) -> Batch:
        labels = split.labels[rows]
        if not self._reads:
            views = self._views if generator is not None else 1
            inputs = tuple(_shape_only(spec, views * len(rows)) for spec in self._inputs)
            return Batch(inputs=inputs, labels=labels, views=views)
        if self._fit is None:
            pairs = zip(split.inputs, self._inputs, strict=True)
            inputs = tuple(values[rows].to(getattr(torch, spec.dtype)) for values, spec in pairs)
            return Batch(inputs=inputs, labels=labels, views=1)
        images = self._fit.resize(split.inputs[0][rows])
        how = self.augment if generator is not None else "none"
        generator = generator or torch.Generator()
        images = augment_images(images, how, generator, mirror=self.splits.flip_safe)
        return Batch(
            inputs=(self._fit.finish(images),), labels=labels, views=len(images) // len(rows)
        )


def _shape_only(spec: InputSpec, num_samples: int) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return torch.empty(num_samples, *spec.shape, dtype=dtype, device="meta")
