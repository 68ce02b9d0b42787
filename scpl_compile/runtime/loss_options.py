"""The options of a local loss, and what it costs before it is built. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import isfinite
from types import MappingProxyType

from scpl_compile.errors import MethodError
from scpl_compile.ir import Scalar
from scpl_compile.runtime.head_spec import (
    HeadSpec,
    Shapes,
    option_error,
    projection_flops,
    projection_parameters,
    trunk_features,
    trunk_flops,
    trunk_parameters,
)

__all__ = ["PAPER", "LossOptions", "objective_flops", "objective_parameters"]

OBJECTIVES = ("supcon", "deinforeg")
CLASSIFIERS = ("linear", "mlp", "mlp-bn")
DIVISORS = ("scpl", "khosla")
IMPLEMENTATIONS = ("auto", "triton", "chunked", "reference")

PAPER: Mapping[str, Mapping[str, Scalar]] = MappingProxyType(
    {
        "vision": MappingProxyType(
            {"head": "mlp", "hidden": 512, "out": 1024, "pooling": "none", "cross_entropy": 0.0}
        ),
        "text": MappingProxyType({"head": "identity", "pooling": "mean", "cross_entropy": 0.0}),
    }
)
"""SCPL as released: a contrastive loss alone, on the flattened feature map through an MLP of 512
and 1024 (images), or on the mean over the tokens without a projection (text)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions(HeadSpec):
    """What a stage trains on: the options of its head and of the terms of its loss.

    contrast, cross_entropy: weights of the two terms; a term of weight 0 is not built.
    objective: of the projection, the first term: supcon (`scpl_compile.kernels.supcon_loss`) or
        deinforeg (`similarity.deinforeg`).
    temperature, divisor: of supcon.
    impl: which implementation computes that term; auto leaves it to `supcon_loss`.
    classifier: what gives the logits for cross entropy from the pooled vector, beside the
        projection: linear · mlp · mlp-bn, with the head's hidden width.
    detach_classifier: it reads the pooled vector without a gradient, and trains itself alone.

    Raises:
        MethodError: an option is unknown, of another type, or has a value that is not allowed.
    """

    temperature: float = 0.1
    divisor: str = "scpl"
    impl: str = "auto"
    contrast: float = 1.0
    cross_entropy: float = 1.0
    classifier: str = "linear"
    objective: str = "supcon"
    detach_classifier: bool = False

    def __post_init__(self) -> None:
        HeadSpec.__post_init__(self)  # super() does not work in a slotted dataclass
        if not (self.temperature > 0 and isfinite(self.temperature)):
            raise option_error("temperature", self.temperature, "a number above 0, as in 0.1")
        if self.objective not in OBJECTIVES:
            raise option_error("objective", self.objective, f"one of {', '.join(OBJECTIVES)}")
        if self.divisor not in DIVISORS:
            raise option_error("divisor", self.divisor, f"one of {', '.join(DIVISORS)}")
        if self.impl not in IMPLEMENTATIONS:
            raise option_error("impl", self.impl, f"one of {', '.join(IMPLEMENTATIONS)}")
        for name in ("contrast", "cross_entropy"):
            weight = getattr(self, name)
            if not (weight >= 0 and isfinite(weight)):
                raise option_error(name, weight, "a weight of 0 or more")
        if not self.contrast and not self.cross_entropy:
            raise MethodError(
                "options contrast and cross_entropy are both 0; a local loss needs one of them"
            )
        if self.detach_classifier and not self.contrast:
            raise MethodError(
                "option detach_classifier leaves cross entropy no gradient into the stage and "
                "option contrast is 0, so nothing would train it"
            )
        if self.classifier not in CLASSIFIERS:
            raise option_error("classifier", self.classifier, f"one of {', '.join(CLASSIFIERS)}")
        if self.classifier != "linear" and self.hidden < 1:
            raise option_error("hidden", self.hidden, f"1 or more for classifier {self.classifier}")

    def arguments(self, in_shapes: Shapes) -> dict[str, Scalar]:
        """Arguments of `LocalLoss` that build the same for these shapes, all decided and none
        without effect: what a plan records and an emitted program shows.
        """
        resolved = self.resolve(in_shapes)
        is_conv = resolved.head == "conv"
        if not self.contrast and not is_conv:
            resolved = replace(resolved, head="identity")
        names = {"head", "pooling", "contrast", "cross_entropy"}
        if self.layout != "auto":
            names.add("layout")
        if is_conv:
            names |= {"channels", "stride", "conv_size", "shrink"}
            if not resolved.channels:  # the tensors differ in theirs
                names |= {"channel_multiplier", "channel_limit"}
        if self.contrast and self.objective == "supcon":
            names |= {"temperature", "divisor"}
            names |= set() if self.impl == "auto" else {"impl"}
        if self.contrast:
            names |= set() if self.objective == "supcon" else {"objective"}
            names |= set() if resolved.head == "identity" else {"out"}
            names |= {"hidden"} if resolved.head.startswith("mlp") else set()
        if self.cross_entropy and self.detach_classifier:
            names.add("detach_classifier")
        if self.cross_entropy and self.classifier != "linear":
            names |= {"classifier", "hidden"}
        return {f.name: getattr(resolved, f.name) for f in fields(resolved) if f.name in names}


def objective_parameters(options: LossOptions, in_shapes: Shapes, num_classes: int) -> int:
    """Elements of the parameters of the `LocalLoss` with these options."""
    spec = options.resolve(in_shapes)
    width = trunk_features(spec, in_shapes)
    count = trunk_parameters(spec, in_shapes)
    if spec.contrast:
        count += projection_parameters(spec.projection, width, hidden=spec.hidden, out=spec.out)
    if spec.cross_entropy:
        count += projection_parameters(spec.classifier, width, hidden=spec.hidden, out=num_classes)
    return count


def objective_flops(
    options: LossOptions, in_shapes: Shapes, num_classes: int, batch_size: int
) -> int:
    """Forward FLOPs of the `LocalLoss` with these options: convolutions, linear layers, and the
    2·B²·D of the similarities of a batch of B, with deinforeg 2·B²·C of the labels' and 2·B·D² of
    the covariance too (a multiply-add is 2; pooling, BN, softmax are not counted). Backward costs
    twice as much.
    """
    spec = options.resolve(in_shapes)
    width = trunk_features(spec, in_shapes)
    count = trunk_flops(spec, in_shapes, batch_size)
    if spec.contrast:
        count += projection_flops(
            spec.projection, width, hidden=spec.hidden, out=spec.out, batch_size=batch_size
        )
        length = width if spec.projection == "identity" else spec.out
        count += 2 * batch_size**2 * length
        if spec.objective == "deinforeg":
            count += 2 * batch_size**2 * num_classes + 2 * batch_size * length**2
    if spec.cross_entropy:
        count += projection_flops(
            spec.classifier, width, hidden=spec.hidden, out=num_classes, batch_size=batch_size
        )
    return count
