"""Accuracy and cross entropy of the exits, added up over batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scpl_compile.errors import DataError

__all__ = ["Evaluation", "Tally", "accuracy_text", "evaluation_facts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """accuracy and mean cross entropy of every exit (the last one is the model's own output).

    Of task multi-label the accuracies are of the single labels (there where the probability is
    above 1/2), the cross entropy is binary, and exact_matches are the shares of samples whose
    labels are all right; else these are empty.

    Where samples left early there is one accuracy and one loss. exit_shares: of the samples, by
    exit; compute: forward FLOPs over those of all samples going through the model alone, None where
    they cannot be counted.
    """

    num_samples: int
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]
    exit_shares: tuple[float, ...] = ()
    compute: float | None = None
    exact_matches: tuple[float, ...] = ()

    @property
    def accuracy(self) -> float:
        """Share of samples whose label, or of labels that, the last exit finds."""
        return self.accuracies[-1]


def evaluation_facts(found: Evaluation) -> dict[str, Any]:
    """accuracy, and where there are several exits the accuracy of each; of task multi-label, where
    it is that of the labels, exact_match; of samples that left early the share of each exit, and of
    the compute.
    """
    facts: dict[str, Any] = {"accuracy": found.accuracy, "num_samples": found.num_samples}
    if found.exact_matches:
        facts["exact_match"] = found.exact_matches[-1]
    if len(found.accuracies) > 1:
        facts["exit_accuracies"] = list(found.accuracies)
    if found.exit_shares:
        facts |= {"exit_shares": list(found.exit_shares), "compute": found.compute}
    return facts


def accuracy_text(facts: Mapping[str, Any]) -> str:
    """ "99.44 %", of `evaluation_facts`; of task multi-label, what it is the share of."""
    text = f"{100 * facts['accuracy']:.2f} %"
    if "exact_match" not in facts:
        return text
    return f"{text} of the labels ({100 * facts['exact_match']:.2f} % exact matches)"


class Tally:
    """Adds up batches to an Evaluation."""

    def __init__(self) -> None:
        self._num_samples = 0
        self._correct: list[float] = []
        self._losses: list[float] = []
        self._exact: list[float] = []
        self._is_multi_label = False
        self._left: list[int] = []
        self.costs: list[float] = []
        """Of a sample that leaves by each exit, where samples leave early."""

    def add(self, exits: Sequence[Tensor], labels: Tensor) -> None:
        """exits: logits (B, C) of each; labels: int64 (B,), or bool (B, C)."""
        self._correct = self._correct or [0.0] * len(exits)
        self._losses = self._losses or [0.0] * len(exits)
        self._exact = self._exact or [0.0] * len(exits)
        self._is_multi_label = labels.dtype == torch.bool
        score = _score_labels if self._is_multi_label else _score
        for i, logits in enumerate(exits):
            correct, exact, loss = score(logits.float(), labels.to(logits.device))
            self._correct[i] += correct
            self._exact[i] += exact
            self._losses[i] += loss
        self._num_samples += len(labels)

    def add_exits(self, exits: Tensor, num_exits: int) -> None:
        """exits: (B,), the number of the exit by which each sample has left."""
        counts = torch.bincount(exits, minlength=num_exits).tolist()
        left = self._left or [0] * len(counts)
        self._left = [a + b for a, b in zip(left, counts, strict=True)]

    @property
    def sums(self) -> tuple[float, float, float, float]:
        """Samples, and of the first exit how many are right, exactly right, and the sum of the
        cross entropies.
        """
        correct, exact, loss = (sum(x[:1]) for x in (self._correct, self._exact, self._losses))
        return float(self._num_samples), correct, exact, loss

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
            exact_matches=tuple(n / count for n in self._exact) if self._is_multi_label else (),
        )

    def _compute(self) -> float:
        pairs = zip(self._left, self.costs, strict=True)
        return sum(left * cost for left, cost in pairs) / self._num_samples


def _score(logits: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Sums over the samples: right ones, twice, and cross entropies."""
    correct = float((logits.argmax(-1) == labels).sum())
    return correct, correct, float(F.cross_entropy(logits, labels, reduction="sum"))


def _score_labels(logits: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Sums over the samples: the share of labels that are right, whether all are, and the mean
    binary cross entropy.
    """
    is_right = (logits > 0) == labels
    entropy = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum")
    num_labels = labels.shape[1]
    return (
        float(is_right.sum()) / num_labels,
        float(is_right.all(1).sum()),
        float(entropy) / num_labels,
    )
