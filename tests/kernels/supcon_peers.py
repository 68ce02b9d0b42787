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


def assert_symmetric(
    loss_fn: Loss, dtype: torch.dtype, batch: int, reduction: str, normalize: bool
) -> None:
    """The gradient is W times the features, and W is symmetric; its diagonal is 0, or what the
    derivative of the normalisation leaves. Features that are nearly orthogonal give it back.
    """
    noise = torch.randn(batch, batch, dtype=torch.float64) / batch**0.5
    features = torch.nn.functional.normalize(torch.linalg.qr(noise).Q + 0.4 * noise, dim=1)
    labels = torch.randint(0, 6, (batch,))
    options = {**OPTIONS, "normalize": normalize, "reduction": reduction}
    _, grad = loss_and_gradient(loss_fn, features.to(dtype), labels, **options)
    weights = torch.linalg.solve(features, grad.double(), left=False)
    atol = 500 * torch.finfo(dtype).eps * weights.abs().max().item()
    if not normalize:
        assert weights.diagonal().abs().max() < atol
    weights.fill_diagonal_(0)
    assert weights.abs().max() > 100 * atol
    torch.testing.assert_close(weights, weights.T, rtol=0, atol=atol)
