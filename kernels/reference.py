"""The supervised contrastive loss as its formula reads: float64, every B x B matrix written out.

The truth that the other implementations are tested against, and differentiable any number of times.
"""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["supcon_reference"]


def supcon_reference(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    divisor: Literal["scpl", "khosla"],
    normalize: bool,
    reduction: Literal["mean", "none"],
) -> Tensor:
    """Supervised contrastive loss; the arguments are those of `supcon.supcon_loss`, unchecked.

    Returns:
        () or (B,), always float64.
    """
    z = features.double()
    if normalize:
        z = z / torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min(1e-12)
    logits = z @ z.T / temperature
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    # The least float, not -inf: a lone anchor then has a gradient of 0, not NaN.
    others = logits.masked_fill(itself, torch.finfo(torch.float64).min)
    log_probability = logits - others.logsumexp(dim=1, keepdim=True)
    if labels.dim() == 2:
        same = (labels.double() @ labels.double().T) > 0
    else:
        same = labels[:, None] == labels
    is_positive = same & ~itself
    num_positives = is_positive.sum(dim=1)
    divisors = num_positives + 1 if divisor == "scpl" else num_positives.clamp_min(1)
    losses = -log_probability.where(is_positive, 0).sum(dim=1) / divisors
    if reduction == "none":
        return losses
    num_anchors = len(labels) if divisor == "scpl" else (num_positives > 0).sum().clamp_min(1)
    return losses.sum() / num_anchors
