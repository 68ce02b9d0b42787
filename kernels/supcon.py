"""The supervised contrastive loss: the checked public function, its module, and the choice between
implementations."""

import math
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from scpl_compile.kernels.reference import supcon_reference
from scpl_compile.kernels.supcon_chunked import EPSILON, supcon_chunked

__all__ = ["SupConLoss", "forward_with_grad", "supcon_loss"]

Divisor = Literal["scpl", "khosla"]
Reduction = Literal["mean", "none"]
Implementation = Literal["chunked", "reference", "triton"]

TRITON = "scpl_compile.kernels.supcon_triton"
FEATURE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def supcon_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    divisor: Divisor = "scpl",
    normalize: bool = True,
    reduction: Reduction = "mean",
    impl: Implementation | None = None,
) -> Tensor:
    """Supervised contrastive loss of a batch against itself.

    With z = features (divided by max(|features|, 1e-12) when `normalize`), s_ij = z_i·z_j / T and
    P_i the number of other anchors that carry the label of anchor i (its positives)::

        loss_i = -1/N_i  sum_{j positive of i} [ s_ij - ln sum_{k != i} exp(s_ik) ]

    An anchor without a positive has loss 0, and so has a batch of one.

    Args:
        features: (B, D), B and D at least 1; bfloat16, float16, float32 or float64, any strides.
            Autocast or not, what is below float32 is computed in float32.
        labels: (B,) of any integer dtype and any values, on the device of the features; or (B, L)
            bool, which of L labels each anchor has: anchors that share one are positives (not by
            Triton).
        temperature: T, finite and above 0; or a tensor of one element, which is not read by the
            host and gets a gradient (a learnable temperature), on the device of the features.
        divisor: "scpl": N_i = P_i + 1 and the mean is over all B anchors, as in the released SCPL
            and DASCPL code. "khosla": N_i = P_i and the mean is over the anchors that have a
            positive (0 if there is none): L_out of Khosla et al. 2020 (arXiv 2004.11362), eq. 2.
        normalize: Whether to scale the features to length 1; False where they are already.
        reduction: "mean", or "none" for the losses of the anchors.
        impl: "triton" (kernels for NVIDIA and AMD), "chunked" (any device), both with O(B·D)
            memory and one backward, or "reference" (float64, B x B matrices, differentiable any
            number of times). Default: triton on a GPU, but not for float64; else chunked. With
            SCPL_AUTOTUNE=1 in the environment, triton times a few tiles at the first call for a
            size and keeps the fastest until the process ends (last bits may differ from run to run,
            and so where a run was resumed), else a table decides.

    Returns:
        () or (B,) for "none": float64 for float64 features, else float32. The gradient has the
        dtype of the features.

    Raises:
        TypeError: An argument of the wrong dtype or type.
        ValueError: A wrong shape, device, temperature or choice.
        RuntimeError: impl="triton" where Triton or a GPU is missing.
    """
    _check_options(temperature, divisor, reduction, impl)
    _check_tensors(features, labels)
    impl = impl or _default(features, labels)
    compute = _implementation(impl, features, labels)
    dtype = features.dtype
    if isinstance(temperature, Tensor):
        features = _scaled(features, temperature, normalize, impl)
        temperature, normalize = 1.0, False
    loss = compute(
        features,
        labels,
        temperature=temperature,
        divisor=divisor,
        normalize=normalize,
        reduction=reduction,
    )
    return loss.to(torch.promote_types(dtype, torch.float32))


def forward_with_grad(features: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`supcon_loss` and its gradient by the features at once, for a loss that ends its graph.

    Nothing is kept for a backward pass. Further arguments and errors: see `supcon_loss`, with
    reduction "mean".

    Returns:
        The loss (), detached, and the gradient (B, D) in the dtype of the features.
    """
    leaf = features.detach().requires_grad_()
    with torch.enable_grad():
        loss = supcon_loss(leaf, labels, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def _scaled(features: Tensor, temperature: Tensor, normalize: bool, impl: str) -> Tensor:
    """Features whose products are the logits: autograd does the rest for the temperature."""
    wide = torch.float64 if impl == "reference" else torch.float32
    z = features.to(torch.promote_types(features.dtype, wide))
    if normalize:
        z = z / torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min(EPSILON)
    return z * temperature.to(z.dtype).rsqrt()


def _default(features: Tensor, labels: Tensor) -> Implementation:
    suits = features.is_cuda and features.dtype != torch.float64 and labels.dim() == 1
    return "triton" if suits and find_spec("triton") else "chunked"


def _implementation(
    name: Implementation, features: Tensor, labels: Tensor
) -> Callable[..., Tensor]:
    if name == "triton":
        _check_triton(features, labels)
        _load_triton()
        return _supcon_triton
    return supcon_reference if name == "reference" else supcon_chunked


def _check_triton(features: Tensor, labels: Tensor) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if features.dtype == torch.float64:
        raise TypeError("impl='triton' computes in float32, not float64: use impl='chunked'")
    if labels.dim() == 2:
        raise ValueError(
            f"impl='triton' takes one label an anchor, not {tuple(labels.shape)}: use "
            "impl='chunked' for labels that overlap"
        )
    if not find_spec("triton"):
        raise RuntimeError("impl='triton' needs the package triton, which is not installed")
    if not features.is_cuda and not interpreted:
        raise RuntimeError(
            f"impl='triton' needs features on a GPU, not on {features.device}: move them, use "
            "impl='chunked', or set TRITON_INTERPRET=1 to interpret the kernels, slowly"
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _load_triton() -> bool:
    """At first use, so that the package works where Triton is absent; torch.compile runs it."""
    import_module(TRITON)
    return True


def _supcon_triton(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    divisor: str,
    normalize: bool,
    reduction: str,
) -> Tensor:
    keep = features.requires_grad and torch.is_grad_enabled()
    arguments = features, labels, temperature, divisor, normalize, reduction, keep
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.scpl_compile.supcon_triton(*arguments)[0]
        return traced
    loss: Tensor = import_module(TRITON).supcon_triton(*arguments)
    return loss


class SupConLoss(nn.Module):
    """`supcon_loss` as a module: its options at construction, (features, labels) at the call."""

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.1,
        divisor: Divisor = "scpl",
        normalize: bool = True,
        reduction: Reduction = "mean",
        impl: Implementation | None = None,
    ) -> None:
        super().__init__()
        _check_options(temperature, divisor, reduction, impl)
        self.temperature = temperature
        self.divisor: Divisor = divisor
        self.normalize = normalize
        self.reduction: Reduction = reduction
        self.impl: Implementation | None = impl

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return supcon_loss(
            features,
            labels,
            temperature=self.temperature,
            divisor=self.divisor,
            normalize=self.normalize,
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, divisor={self.divisor!r}, "
            f"normalize={self.normalize}, reduction={self.reduction!r}, impl={self.impl!r}"
        )


def _check_options(
    temperature: float | Tensor, divisor: str, reduction: str, impl: str | None
) -> None:
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or not temperature.is_floating_point():
            raise ValueError(
                "a tensor temperature must be of one element and a floating dtype, not "
                f"{tuple(temperature.shape)} of {temperature.dtype}"
            )
    elif isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(
            f"temperature must be a float or a tensor, not a {type(temperature).__name__}"
        )
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and above 0, not {temperature}")
    _check_choice("divisor", divisor, get_args(Divisor))
    _check_choice("reduction", reduction, get_args(Reduction))
    if impl is not None:
        _check_choice("impl", impl, get_args(Implementation))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def _check_tensors(features: Tensor, labels: Tensor) -> None:
    if features.dtype not in FEATURE_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FEATURE_DTYPES)
        raise TypeError(f"features must be one of {names}, not {features.dtype}")
    if features.dim() != 2 or 0 in features.shape:
        raise ValueError(
            f"features must be (B, D) with B and D at least 1, not {tuple(features.shape)}"
        )
    is_integer = not (labels.dtype.is_floating_point or labels.dtype.is_complex)
    if not is_integer or (labels.dtype == torch.bool) != (labels.dim() == 2):
        raise TypeError(
            "labels must be (B,) of an integer dtype or (B, L) of bool, not "
            f"{tuple(labels.shape)} of {labels.dtype}"
        )
    if labels.shape[:1] != features.shape[:1]:
        raise ValueError(
            f"labels must be ({len(features)},), one for each row of features, "
            f"not {tuple(labels.shape)}"
        )
    if labels.device != features.device:
        raise ValueError(
            f"labels are on {labels.device} and features on {features.device}: move the labels"
        )
