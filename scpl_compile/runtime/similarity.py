"""Losses on how similar the samples of a batch are to each other, in float32 at least.

S(x) is B x B: the cosine of the vectors of two samples, each less its own mean.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["deinforeg", "similarity", "similarity_to_labels"]

_EPSILON = 1e-8
_VARIANCE_EPSILON = 1e-4  # as in VICReg: the root has a finite gradient where all samples are equal


def similarity(x: Tensor) -> Tensor:
    """S of (B, D): (B, B), from -1 to 1 (Nokland & Eidnes 2019, arXiv 1901.06656, section 2.2)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x - x.mean(1, keepdim=True)
    x = x / (_EPSILON + torch.linalg.vector_norm(x, dim=1, keepdim=True))
    return torch.matmul(x, x.t()).clamp(-1, 1)


def similarity_to_labels(x: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean squared difference of S(x) and S of the labels as one-hot vectors."""
    classes = torch.arange(num_classes, device=labels.device)
    one_hot = (labels[:, None] == classes).to(torch.promote_types(x.dtype, torch.float32))
    return F.mse_loss(similarity(x), similarity(one_hot))


def deinforeg(z: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """DeInfoReg's local loss of (B, D) (arXiv 2506.18193), its three terms with weight 1::

        variance     mean over d of relu(1 - deviation of z_d) / B: no feature collapses
        invariance   the similarities are those of the labels
        covariance   of the vectors of length 1, off the diagonal, squared, summed / D

    One sample has no deviation: its variance term is 0.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    batch, dim = z.shape
    invariance = similarity_to_labels(z, labels, num_classes)
    if batch == 1:
        return invariance
    deviation = (z.var(0) + _VARIANCE_EPSILON).sqrt()
    variance = F.relu(1 - deviation).mean() / batch
    unit = F.normalize(z, dim=1)
    unit = unit - unit.mean(0)
    covariance = torch.matmul(unit.t(), unit) / batch
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return variance + invariance + off_diagonal / dim
