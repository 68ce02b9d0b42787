"""What the tests of every implementation share: options, and the triangle rule as an assertion."""

import itertools

import torch
from torch import Tensor

from benchmarks.kernels.grid import Loss, loss_and_gradient, random_batch, triangle

__all__ = [
    "CHOICES",
    "OPTIONS",
    "assert_symmetric",
    "assert_triangle",
    "loss_and_gradient",
    "random_batch",
]

OPTIONS = {"temperature": 0.1, "divisor": "scpl", "normalize": True, "reduction": "mean"}
CHOICES = [
    {**OPTIONS, "divisor": divisor, "normalize": normalize, "reduction": reduction}
    for divisor, normalize, reduction in itertools.product(
        ["scpl", "khosla"], [True, False], ["mean", "none"]
    )
]


def assert_triangle(loss_fn: Loss, features: Tensor, labels: Tensor, **options: object) -> None:
    """The error against float64 is at most that of torch in the same dtype, and a tolerance."""
    for error, allowed in triangle(loss_fn, features, labels, **options):
        assert error <= allowed


def assert_symmetric(loss_fn: Loss, dtype: torch.dtype, batch: int, reduction: str) -> None:
    """The gradient of features that need no norm is W times them; W is symmetric, 0 where i = j.

    Of orthogonal features, so that W is the gradient times their transpose.
    """
    features = torch.linalg.qr(torch.randn(batch, batch, dtype=torch.float64)).Q
    labels = torch.randint(0, 6, (batch,))
    options = {**OPTIONS, "normalize": False, "reduction": reduction}
    _, grad = loss_and_gradient(loss_fn, features.to(dtype), labels, **options)
    weights = grad.double() @ features.T
    atol = 200 * torch.finfo(dtype).eps * weights.abs().max().item()
    assert weights.abs().max() > 0 and weights.diagonal().abs().max() < atol
    torch.testing.assert_close(weights, weights.T, rtol=0, atol=atol)
