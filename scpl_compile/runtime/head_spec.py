"""What a projection head is made of, and what it costs before it is built. Torch-free.

`HeadSpec` holds the options, `tensor_paths` says how each tensor at a cut goes through the head,
and the counts of parameters and FLOPs below are those of the modules in heads.py, to the unit.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from math import prod
from typing import Any, Self

from scpl_compile.errors import MethodError
from scpl_compile.ir import Scalar

__all__ = [
    "LARGEST",
    "HeadSpec",
    "Shapes",
    "TensorPath",
    "option_error",
    "projection_flops",
    "projection_parameters",
    "tensor_paths",
    "trunk_features",
    "trunk_flops",
    "trunk_parameters",
]

Shapes = Sequence[Sequence[int]]
"""One shape per tensor at the cut, each without its batch dimension."""

HEADS = ("auto", "identity", "linear", "mlp", "mlp-bn", "conv")
LAYOUTS = ("auto", "nchw", "nhwc")
SHRINK = ("max", "avg")
LARGEST = 1_000_000
"""Of any option that is a number: far above what is of use, far below what overflows."""

POOLING = re.compile(r"auto|none|gap|mean|cls|avg:[1-9][0-9]*")


def option_error(option: str, value: Scalar, allowed: str) -> MethodError:
    """The error for an option whose value is not `allowed`."""
    return MethodError(f"option {option} is {value!r}; it must be {allowed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpec:
    """What a head is made of.

    head: identity · linear · mlp (Linear-ReLU-Linear) · mlp-bn (Linear without bias-BN-ReLU-Linear)
        · conv (a 3x3 convolution, BN and ReLU on every feature map, then a Linear) · auto (conv
        where a feature map of 2x2 or more crosses, else mlp).
    hidden: width of the mlp. out: width of the projection.
    pooling: none (flatten the whole map) · avg:N (average pool to at most NxN, then flatten) ·
        gap or mean (over all positions; over the unmasked ones of a sequence where the caller
        gives a mask) · cls (first token) · auto (avg:4 for images, avg:2 for video, mean for
        sequences). A (B, D) feature has nothing to pool.
    layout: nchw (channels first) · nhwc (channels last) · auto (sequences are (B, T, D), all
        others channels first).
    channels: of the convolution; 0 means channel_multiplier times the feature's channels, at most
        channel_limit.
    stride: of the convolution.
    conv_size: a larger map is brought to at most conv_size x conv_size before the convolution, so
        that the head of an early stage costs no more than that of a late one; 0 means never.
    shrink: how: max or avg, over windows. A stage that ends in a convolution whose activation is in
        the next one sends what is not rectified, of which a mean over a window tells little; see
        benchmarks/accuracy.

    Raises:
        MethodError: an option is unknown, of another type, or has a value that is not allowed.
    """

    head: str = "auto"
    hidden: int = 256
    out: int = 64
    pooling: str = "auto"
    layout: str = "auto"
    channels: int = 0
    channel_multiplier: float = 1.0
    channel_limit: int = 96
    stride: int = 2
    conv_size: int = 7
    shrink: str = "max"

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_type(item.name, getattr(self, item.name), item.default)
        if self.head not in HEADS:
            raise option_error("head", self.head, f"one of {', '.join(HEADS)}")
        if not POOLING.fullmatch(self.pooling):
            raise option_error(
                "pooling", self.pooling, "one of auto, none, avg:N (as in avg:4), gap, mean, cls"
            )
        if self.shrink not in SHRINK:
            raise option_error("shrink", self.shrink, f"one of {', '.join(SHRINK)}")
        if self.layout not in LAYOUTS:
            raise option_error("layout", self.layout, f"one of {', '.join(LAYOUTS)}")
        least = {"hidden": int(self.head.startswith("mlp")), "channels": 0, "conv_size": 0}
        for name in ("hidden", "out", "channels", "channel_limit", "stride", "conv_size"):
            if getattr(self, name) < least.get(name, 1):
                raise option_error(name, getattr(self, name), f"{least.get(name, 1)} or more")
        if not self.channel_multiplier > 0:
            raise option_error("channel_multiplier", self.channel_multiplier, "more than 0")

    @classmethod
    def from_options(cls, options: Mapping[str, Scalar]) -> Self:
        """The spec that a flat mapping describes; what is not named keeps its default."""
        known = [item.name for item in fields(cls)]
        for name in options:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}? " if close else ""
                raise MethodError(
                    f"option {name!r} is unknown; {hint}The options are {', '.join(known)}"
                )
        return cls(**dict(options))  # type: ignore[arg-type]

    def resolve(self, in_shapes: Shapes) -> Self:
        """The same spec with what `in_shapes` decides written out: no auto, channels given.

        Where the tensors disagree (their pooling, their channels) the open value stays: each
        tensor still resolves it for itself.
        """
        head = _resolved_head(self, in_shapes)
        paths = tensor_paths(replace(self, head=head), in_shapes)
        pooling = {path.pooling for path in paths if path.spatial}
        channels = {path.conv_channels for path in paths if path.conv_channels}
        return replace(
            self,
            head=head,
            pooling=pooling.pop() if len(pooling) == 1 else self.pooling,
            channels=channels.pop() if len(channels) == 1 else self.channels,
        )

    @property
    def projection(self) -> str:
        """The kind of the projection: the head's own, and linear after a convolution."""
        return "linear" if self.head == "conv" else self.head


def _check_type(name: str, value: Any, default: Any) -> None:
    wanted = type(default)
    if type(value) is not wanted and not (wanted is float and type(value) is int):
        raise option_error(name, value, f"of type {wanted.__name__}, as in {name}={default}")
    if wanted in (int, float) and value > LARGEST:
        raise option_error(name, value, f"{LARGEST} or less")


def _resolved_head(spec: HeadSpec, in_shapes: Shapes) -> str:
    if spec.head != "auto":
        return spec.head
    maps = (min(_geometry(spec, shape)[1]) for shape in in_shapes if len(shape) == 3)
    return "conv" if max(maps, default=1) >= 2 else "mlp"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPath:
    """How one tensor goes through the trunk; sizes without the batch.

    spatial: sizes of the positions (H, W).
    conv_channels: 0 where there is no convolution. shrink: windows of which it sees the largest
    values (by_max), or the means.
    windows: averaged together, one size per spatial dimension (only for avg:N).
    """

    channels_last: bool
    is_sequence: bool
    channels: int
    spatial: tuple[int, ...]
    conv_channels: int
    stride: int
    shrink: tuple[int, ...]
    by_max: bool
    pooling: str
    windows: tuple[int, ...]

    @property
    def conv_spatial(self) -> tuple[int, ...]:
        """Sizes after the convolution (kernel 3, padding 1)."""
        if not self.conv_channels:
            return self.spatial
        pairs = zip(self.spatial, self.shrink, strict=True)
        return tuple((-(-size // window) - 1) // self.stride + 1 for size, window in pairs)

    @property
    def features(self) -> int:
        """Length of the pooled vector."""
        channels = self.conv_channels or self.channels
        if self.pooling in ("mean", "gap", "cls"):
            return channels
        if self.pooling == "none":
            return channels * prod(self.conv_spatial)
        pairs = zip(self.conv_spatial, self.windows, strict=True)
        return channels * prod(-(-size // window) for size, window in pairs)


def _geometry(spec: HeadSpec, shape: Sequence[int]) -> tuple[int, tuple[int, ...], bool]:
    """Channels, sizes of the positions, and whether the channels come last."""
    if not 1 <= len(shape) <= 4:
        raise MethodError(
            f"a head takes features of 2 to 5 dimensions, batch included, not {len(shape) + 1}; "
            "cut elsewhere"
        )
    channels_last = spec.layout == "nhwc" or (spec.layout == "auto" and len(shape) == 2)
    if channels_last:
        return shape[-1], tuple(shape[:-1]), True
    return shape[0], tuple(shape[1:]), False


def _path(spec: HeadSpec, shape: Sequence[int]) -> TensorPath:
    channels, spatial, channels_last = _geometry(spec, shape)
    conv_channels = 0
    if spec.head == "conv" and len(spatial) == 2:
        widened = max(1, int(spec.channel_multiplier * channels))
        conv_channels = spec.channels or min(widened, spec.channel_limit)
    default = {0: "none", 1: "mean", 2: "avg:4", 3: "avg:2"}[len(spatial)]
    pooling = default if spec.pooling == "auto" or not spatial else spec.pooling
    if pooling == "cls" and len(spatial) != 1:
        raise MethodError(
            f"pooling cls takes the first token of a (B, T, D) feature, not of (B, "
            f"{', '.join(map(str, shape))}); use gap or avg:4"
        )
    path = TensorPath(
        channels_last=channels_last,
        is_sequence=len(spatial) == 1,
        channels=channels,
        spatial=spatial,
        conv_channels=conv_channels,
        stride=spec.stride,
        shrink=tuple(-(-size // (spec.conv_size or size)) for size in spatial),
        by_max=spec.shrink == "max",
        pooling=pooling,
        windows=(),
    )
    if not pooling.startswith("avg:"):
        return path
    most = int(pooling.removeprefix("avg:"))
    return replace(path, windows=tuple(-(-size // most) for size in path.conv_spatial))


def tensor_paths(spec: HeadSpec, in_shapes: Shapes) -> list[TensorPath]:
    if not in_shapes:
        raise MethodError("a head needs at least one tensor; none that carries a gradient crosses")
    spec = replace(spec, head=_resolved_head(spec, in_shapes))
    paths = [_path(spec, shape) for shape in in_shapes]
    if spec.head == "conv" and not any(path.conv_channels for path in paths):
        raise MethodError(
            f"head conv needs a feature map (B, C, H, W); here the shapes are "
            f"{', '.join(str(('B', *shape)) for shape in in_shapes)}; use head=mlp"
        )
    return paths


def trunk_features(spec: HeadSpec, in_shapes: Shapes) -> int:
    """Length of the pooled vector."""
    return sum(path.features for path in tensor_paths(spec, in_shapes))


def trunk_parameters(spec: HeadSpec, in_shapes: Shapes) -> int:
    """Elements of the trunk's parameters: 9·C·channels weights and 2·channels of BN per map."""
    paths = tensor_paths(spec, in_shapes)
    return sum(path.conv_channels * (9 * path.channels + 2) for path in paths)


def trunk_flops(spec: HeadSpec, in_shapes: Shapes, batch_size: int) -> int:
    """Forward FLOPs of the trunk's convolutions (a multiply-add is 2; pooling and BN are not
    counted, as in torch.utils.flop_counter).
    """
    paths = tensor_paths(spec, in_shapes)
    per_sample = (p.conv_channels * 9 * p.channels * prod(p.conv_spatial) for p in paths)
    return 2 * batch_size * sum(per_sample)


def projection_parameters(kind: str, in_features: int, *, hidden: int, out: int) -> int:
    """Elements of the parameters of `Projection` with the same arguments."""
    first = {"mlp": in_features + 1, "mlp-bn": in_features + 2}.get(kind)
    if first is not None:
        return hidden * first + (hidden + 1) * out
    return 0 if kind == "identity" else (in_features + 1) * out


def projection_flops(kind: str, in_features: int, *, hidden: int, out: int, batch_size: int) -> int:
    """Forward FLOPs of the linear layers of `Projection` with the same arguments."""
    if kind in ("mlp", "mlp-bn"):
        return 2 * batch_size * hidden * (in_features + out)
    return 0 if kind == "identity" else 2 * batch_size * in_features * out
