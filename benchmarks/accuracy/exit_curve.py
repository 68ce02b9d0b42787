"""Accuracy and compute where samples leave early, by many rules from one look at the samples.

Which exits a rule trusts follows from the logits of all exits alone, so every sample goes through
the whole model once; `Trainer.evaluate(exit_rule=...)`, which computes no more than it must, would
do so again for every rule.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from scpl_compile import Trainer
from scpl_compile.runtime.batch import named_inputs
from scpl_compile.runtime.data import Batch
from scpl_compile.runtime.inference import ExitRule

__all__ = ["exit_curve"]


def exit_curve(
    trainer: Trainer, batches: Iterable[Batch], rules: Sequence[str]
) -> dict[str, tuple[float, float | None]]:
    """For every rule the shares that `Evaluation` tells as accuracy and compute; the latter None
    for models with operators that are not counted.
    """
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    costs: list[float] = []
    for batch in batches:
        if not logits:
            with trainer._inferring() as inference:
                costs = inference.costs(named_inputs(trainer.plan.inputs, batch.inputs))
        logits.append(torch.stack([exit_.cpu() for exit_ in trainer.predict(batch.inputs)]))
        labels.append(batch.labels)
    all_logits, all_labels = torch.cat(logits, 1), torch.cat(labels)
    found: dict[str, tuple[float, float | None]] = {}
    for rule in rules:
        left = _left(ExitRule.of(trainer.plan, rule), all_logits)
        chosen = all_logits[left, torch.arange(len(left))]
        accuracy = (chosen.argmax(-1) == all_labels).double().mean()
        compute = torch.tensor(costs, dtype=torch.float64)[left].mean() if costs else None
        found[rule] = (float(accuracy), None if compute is None else float(compute))
    return found


def _left(rule: ExitRule, logits: Tensor) -> Tensor:
    """(N,) the first exit that is trusted, else the last; logits: (exits, N, C)."""
    said = torch.stack([rule.said(each) for each in logits])
    left = torch.full(logits.shape[1:2], len(logits) - 1)
    for k in reversed(range(len(logits) - 1)):
        left[rule.trusts(logits[k], said[: k + 1])] = k
    return left
