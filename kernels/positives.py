"""The positives of every anchor, and sums over them, without a wait for the device.

One label an anchor: sums over classes, O(B·D). Several labels: by the mask of those that overlap, a
block of rows at a time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Classes", "Overlaps", "positives_of"]

BLOCK = 1024  # rows of the mask of overlaps at a time


class Classes(NamedTuple):
    """Anchors by label. Class k's members lie at order[offsets[k] : offsets[k + 1]].

    A class is numbered by the place of its last member in `order`, and the other places are empty
    classes: B classes whatever the labels, so no shape depends on data.
    """

    order: Tensor  # (B,) anchors sorted by label
    offsets: Tensor  # (B,)
    class_of: Tensor  # (B,) class of each anchor
    others: Tensor  # (B,) anchors in the class of each anchor, less itself

    def counts(self, dtype: torch.dtype) -> Tensor:
        """(B,): positives of each anchor."""
        return self.others.to(dtype)

    def sums(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """(B, D): for each anchor, the (weighted) sum of x over its positives, in a fixed order."""
        own = x if weight is None else x * weight[:, None]
        if weight is not None:
            weight = weight[self.order]
        # index_add would be shorter, but a GPU adds in no fixed order there.
        bags = torch.embedding_bag(x, self.order, self.offsets, per_sample_weights=weight)
        return bags[0].index_select(0, self.class_of).sub_(own)


class Overlaps(NamedTuple):
    """Anchors with several labels each; those that share one are positives of each other."""

    labels: Tensor  # (B, L), 0 or 1, of a floating dtype

    def counts(self, dtype: torch.dtype) -> Tensor:
        """(B,): positives of each anchor."""
        return torch.cat([mask.sum(1) for mask in self._masks(dtype)])

    def sums(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """(B, D): for each anchor, the (weighted) sum of x over its positives, in a fixed order."""
        addends = x if weight is None else x * weight[:, None]
        sums = torch.empty_like(x)
        for rows, mask in zip(sums.split(BLOCK), self._masks(x.dtype), strict=True):
            torch.mm(mask, addends, out=rows)
        return sums

    def _masks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The rows of the (B, B) mask of positives, BLOCK at a time."""
        for number, part in enumerate(self.labels.split(BLOCK)):
            shared = part.new_empty(len(part), len(self.labels))
            torch.mm(part, self.labels.t(), out=shared)  # out= because autocast leaves it alone
            mask = shared.gt(0).to(dtype)
            mask.diagonal(number * BLOCK).zero_()
            yield mask


def positives_of(labels: Tensor) -> Classes | Overlaps:
    """Of labels (B,) of an integer dtype, or (B, L) that are bool: which of L labels each has."""
    if labels.dim() == 2:
        return Overlaps(labels.float())
    labels = labels.long().contiguous()
    ordered, order = labels.sort(stable=True)
    first = torch.searchsorted(ordered, labels)
    last = torch.searchsorted(ordered, labels, right=True).sub_(1)
    return Classes(order, first.index_select(0, order), last, last - first)
