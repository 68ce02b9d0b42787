"""The supervised contrastive loss: the checked public function, its module, and the choice between
implementations."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from scpl_compile.kernels.reference import supcon_reference
from scpl_compile.kernels.supcon_chunked import supcon_chunked

__all__ = ["SupConLoss", "supcon_loss"]

Divisor = Literal["scpl", "khosla"]
Reduction = Literal["mean", "none"]
Implementation = Literal["chunked", "reference"]

FEATURE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def supcon_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.1,
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
        labels: (B,) of any integer dtype and any values, on the device of the features.
        temperature: T, finite and above 0.
        divisor: "scpl": N_i = P_i + 1 and the mean is over all B anchors, as in the released SCPL
            and DASCPL code. "khosla": N_i = P_i and the mean is over the anchors that have a
            positive (0 if there is none): L_out of Khosla et al. 2020 (arXiv 2004.11362), eq. 2.
        normalize: Whether to scale the features to length 1; False where they are already.
        reduction: "mean", or "none" for the losses of the anchors.
        impl: "chunked" (the default: O(B·D) memory, one backward) or "reference" (float64, B x B
            matrices, differentiable any number of times).

    Returns:
        () or (B,) for "none": float64 for float64 features, else float32. The gradient has the
        dtype of the features.

    Raises:
        TypeError: An argument of the wrong dtype or type.
        ValueError: A wrong shape, device, temperature or choice.
    """
    _check_options(temperature, divisor, reduction, impl)
    _check_tensors(features, labels)
    compute = supcon_reference if impl == "reference" else supcon_chunked
    loss = compute(
        features,
        labels,
        temperature=temperature,
        divisor=divisor,
        normalize=normalize,
        reduction=reduction,
    )
    return loss.to(torch.promote_types(features.dtype, torch.float32))


class SupConLoss(nn.Module):
    """`supcon_loss` as a module: its options at construction, (features, labels) at the call."""

    def __init__(
        self,
        *,
        temperature: float = 0.1,
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


def _check_options(temperature: float, divisor: str, reduction: str, impl: str | None) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"temperature must be a float, not a {type(temperature).__name__}")
    if not (math.isfinite(temperature) and temperature > 0):
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
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"labels must be of an integer dtype, not {labels.dtype}")
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"labels must be ({len(features)},), one for each row of features, "
            f"not {tuple(labels.shape)}"
        )
    if labels.device != features.device:
        raise ValueError(
            f"labels are on {labels.device} and features on {features.device}: move the labels"
        )
