"""What the tests of every implementation share: inputs, the eager formula, the triangle rule."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from scpl_compile.kernels.reference import supcon_reference

OPTIONS = {"temperature": 0.1, "divisor": "scpl", "normalize": True, "reduction": "mean"}
CHOICES = [
    {**OPTIONS, "divisor": divisor, "normalize": normalize, "reduction": reduction}
    for divisor, normalize, reduction in itertools.product(
        ["scpl", "khosla"], [True, False], ["mean", "none"]
    )
]


def random_batch(
    batch: int, dim: int, classes: int, dtype: torch.dtype = torch.float64, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator()
    generator.manual_seed(torch.randint(2**40, ()).item() if seed is None else seed)
    features = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    return features.to(dtype), torch.randint(0, classes, (batch,), generator=generator)


def loss_and_gradient(
    loss_fn: Callable[..., Tensor], features: Tensor, labels: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of its sum with weights 1, 2, 3, 1, 2, 3 and so on."""
    leaf = features.detach().requires_grad_()
    loss = loss_fn(leaf, labels, **options)
    weights = torch.arange(loss.numel(), device=loss.device) % 3 + 1
    (grad,) = torch.autograd.grad((loss * weights.view(loss.shape)).sum(), leaf)
    return loss.detach(), grad


def eager_formula(features: Tensor, labels: Tensor, **options: object) -> Tensor:
    """The loss as one writes it in torch, every step in the dtype of the features."""
    z = torch.nn.functional.normalize(features, dim=1) if options["normalize"] else features
    logits = z @ z.T / options["temperature"]
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    lowest = torch.finfo(logits.dtype).min  # not -inf: a batch of one has a gradient then
    log_probability = logits - logits.masked_fill(itself, lowest).logsumexp(1, keepdim=True)
    is_positive = (labels[:, None] == labels) & ~itself
    count = is_positive.sum(1)
    divisors = count + 1 if options["divisor"] == "scpl" else count.clamp_min(1)
    losses = -log_probability.where(is_positive, 0).sum(1) / divisors
    if options["reduction"] == "none":
        return losses
    anchors = len(labels) if options["divisor"] == "scpl" else (count > 0).sum().clamp_min(1)
    return losses.sum() / anchors


def assert_triangle(
    loss_fn: Callable[..., Tensor],
    features: Tensor,
    labels: Tensor,
    *,
    roundings: int = 1,
    **options: object,
) -> None:
    """The error against float64 is at most that of torch in the same dtype, and a tolerance.

    The tolerance: `roundings` of the dtype of the features and float32 rounding of the logits, of
    the largest element; and that rounding itself, where terms as large as a logit cancel.
    """
    truth = loss_and_gradient(supcon_reference, features.double(), labels, **options)
    eager = loss_and_gradient(eager_formula, features, labels, **options)
    ours = loss_and_gradient(loss_fn, features, labels, **options)
    bound = 1.0 if options["normalize"] else features.double().square().sum(1).max().item()
    logit = bound / options["temperature"]
    slack = roundings * torch.finfo(features.dtype).eps + 2e-7 * (1 + logit)
    for exact, torch_value, value in zip(truth, eager, ours, strict=True):
        error = (torch_value.double() - exact).abs().max().nan_to_num(0)
        allowed = error + slack * exact.abs().max() + 2e-7 * (1 + logit)
        ours_error = (value.double() - exact).abs().max()
        assert ours_error <= allowed, (ours_error, error, allowed)
