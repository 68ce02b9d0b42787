"""Accuracy and cross entropy of the exits, added up over batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scpl_compile.errors import DataError

__all__ = ["Evaluation", "Tally", "evaluation_facts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """accuracy and mean cross entropy of every exit (the last one is the model's own output).

    Where samples left early there is one accuracy and one loss. exit_shares: of the samples, by
    exit; compute: forward FLOPs over those of all samples going through the model alone, None where
    they cannot be counted.
    """

    num_samples: int
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]
    exit_shares: tuple[float, ...] = ()
    compute: float | None = None

    @property
    def accuracy(self) -> float:
        """Share of samples whose label the last exit finds."""
        return self.accuracies[-1]


class Tally:
    """Adds up batches to an Evaluation."""

    def __init__(self) -> None:
        self._num_samples = 0
        self._correct: list[float] = []
        self._losses: list[float] = []
        self._left: list[int] = []
        self.costs: list[float] = []
        """Of a sample that leaves by each exit, where samples leave early."""

    def add(self, exits: Sequence[Tensor], labels: Tensor) -> None:
        """exits: logits (B, C) of each; labels: int64 (B,)."""
        self._correct = self._correct or [0.0] * len(exits)
        self._losses = self._losses or [0.0] * len(exits)
        for i, logits in enumerate(exits):
            target = labels.to(logits.device)
            self._correct[i] += float((logits.argmax(-1) == target).sum())
            self._losses[i] += float(F.cross_entropy(logits.float(), target, reduction="sum"))
        self._num_samples += len(labels)

    def add_exits(self, exits: Tensor, num_exits: int) -> None:
        """exits: (B,), the number of the exit by which each sample has left."""
        counts = torch.bincount(exits, minlength=num_exits).tolist()
        left = self._left or [0] * len(counts)
        self._left = [a + b for a, b in zip(left, counts, strict=True)]

    @property
    def sums(self) -> tuple[float, float, float]:
        """Samples, and of the first exit how many are right and the sum of the cross entropies."""
        return float(self._num_samples), sum(self._correct[:1]), sum(self._losses[:1])

    def result(self) -> Evaluation:
        """What was added. Raises DataError where that is nothing."""
        count = self._num_samples
        if count == 0:
            raise DataError("there is no sample to evaluate on")
        return Evaluation(
            num_samples=count,
            accuracies=tuple(value / count for value in self._correct),
            losses=tuple(value / count for value in self._losses),
            exit_shares=tuple(left / count for left in self._left),
            compute=self._compute() if self._left and self.costs else None,
        )

    def _compute(self) -> float:
        pairs = zip(self._left, self.costs, strict=True)
        return sum(left * cost for left, cost in pairs) / self._num_samples


def evaluation_facts(found: Evaluation) -> dict[str, Any]:
    """accuracy, and where there are several exits the accuracy of each; of samples that left early
    the share of each exit, and of the compute.
    """
    facts: dict[str, Any] = {"accuracy": found.accuracy, "num_samples": found.num_samples}
    if len(found.accuracies) > 1:
        facts["exit_accuracies"] = list(found.accuracies)
    if found.exit_shares:
        facts |= {"exit_shares": list(found.exit_shares), "compute": found.compute}
    return facts
