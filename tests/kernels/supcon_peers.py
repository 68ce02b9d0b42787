"""What the tests of every implementation share: options, and what must hold as assertions."""

import itertools
from importlib import import_module

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernels.grid import Loss, loss_and_gradient, random_batch, triangle
from scpl_compile.kernels.reference import supcon_reference

__all__ = [
    "CHOICES",
    "OPTIONS",
    "assert_guarded",
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


class Guarded(TorchDispatchMode):
    """Every new tensor is NaN and lies in the middle of a larger one that is NaN."""

    ZONE = 4096

    def __init__(self) -> None:
        super().__init__()
        self.zones: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        made = func.overloadpacket in (aten.empty, aten.new_empty, aten.empty_like)
        if not made or not result.is_floating_point():
            return result
        assert result.is_contiguous()
        sizes = [self.ZONE, result.numel(), self.ZONE]
        around = torch.full((sum(sizes),), torch.nan, dtype=result.dtype, device=result.device)
        before, inside, after = around.split(sizes)
        self.zones += [before, after]
        return inside.view(result.shape)


def assert_guarded(shape: tuple[int, int], options: dict[str, object], device: str) -> None:
    """Triton: what lies around every buffer stays NaN, and no NaN comes out."""
    operator = import_module("scpl_compile.kernels.supcon_triton")
    features, labels = (t.to(device) for t in random_batch(*shape, 4, torch.float32))
    arguments = (options["temperature"], options["divisor"], options["normalize"])
    arguments += (options["reduction"], True)
    with Guarded() as guarded:
        inside = torch.empty(shape, device=device).copy_(features)
        loss, *saved = operator.forward(inside, labels, *arguments)
        grad = operator.backward(torch.ones_like(loss), inside, labels, *saved, *arguments)
    assert len(guarded.zones) > 10
    assert all(zone.isnan().all() for zone in guarded.zones)
    leaf = features.clone().requires_grad_()
    truth = supcon_reference(leaf, labels, **options)
    torch.testing.assert_close(loss, truth.float(), rtol=1e-4, atol=1e-5)
    (true_grad,) = torch.autograd.grad(truth.sum(), leaf)
    atol = 1e-3 * true_grad.abs().max().item()
    torch.testing.assert_close(grad, true_grad, rtol=1e-3, atol=atol)
