"""From the tensors at a cut to one vector per sample: auxiliary convolution, pooling, projection.

::

    feature (B, C, H, W) ─▶ [3x3 conv, BN, ReLU] ─▶ pool ─┐
    feature (B, T, D)    ─────────────────────────▶ pool ─┴▶ concatenate ─▶ projection ─▶ (B, out)
                         └──────────────── Trunk ─────────────────────┘   └ Projection ┘

A head belongs to its stage, is trained with it, and is thrown away at inference (SCPL, section
"projection head"). Its options and its cost are in head_spec.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scpl_compile.errors import MethodError
from scpl_compile.runtime.head_spec import HeadSpec, Shapes, TensorPath, tensor_paths

__all__ = ["Projection", "Trunk", "in_dtype_of"]


def _batch_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> Tensor:
    """`norm(x)`, which torch refuses in training for one value per channel (a last batch of 1).

    A single value has no variance: normalise it with the running statistics, which stay as is.
    """
    if x.numel() == x.shape[1]:
        mean, var = norm.running_mean, norm.running_var
        return F.batch_norm(x, mean, var, norm.weight, norm.bias, eps=norm.eps)
    normalised: Tensor = norm(x)
    return normalised


def in_dtype_of(x: Tensor, layer: nn.Module) -> Tensor:
    """`x` in the dtype of the layer's weight, unless autocast chooses one itself."""
    if torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(layer.weight.dtype)  # type: ignore[arg-type]


class _MapConv(nn.Module):
    """The auxiliary convolution: 3x3, BN, ReLU."""

    def __init__(self, path: TensorPath) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            path.channels, path.conv_channels, 3, stride=path.stride, padding=1, bias=False
        )
        self.norm = nn.BatchNorm2d(path.conv_channels)
        self._shrink = path.shrink
        self._by_max = path.by_max

    def forward(self, x: Tensor) -> Tensor:
        x = _maximum(x, self._shrink) if self._by_max else _average(x, self._shrink)
        return F.relu(_batch_norm(self.norm, self.conv(in_dtype_of(x, self.conv))))


class Trunk(nn.Module):
    """Pools every tensor at a cut, after an auxiliary convolution where asked, and concatenates.

    spec: the head's options; only those of convolution, pooling and layout count here.
    in_shapes: of the tensors, without their batch dimension.
    batch_dims: of the tensors; 0 for all where left out. A tensor with another one (LSTM state
        (layers, B, H)) is pooled as (B, layers, H), and a mask never applies to it.

    Raises:
        MethodError: a shape does not fit the spec.
    """

    def __init__(
        self, spec: HeadSpec, in_shapes: Shapes, *, batch_dims: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self._paths = tensor_paths(spec, in_shapes)
        self._batch_dims = tuple(batch_dims) or (0,) * len(self._paths)
        if len(self._batch_dims) != len(self._paths):
            raise MethodError(
                f"{len(self._paths)} shapes come with {len(self._batch_dims)} batch_dims"
            )
        self.convs = nn.ModuleList(
            _MapConv(path) if path.conv_channels else nn.Identity() for path in self._paths
        )
        self.out_features = sum(path.features for path in self._paths)

    def forward(self, *features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, out_features) of the features, in their dtype.

        mask: (B, T), bool or integer, not 0 for the tokens of a sequence that count.
        """
        plan = zip(features, self._paths, self._batch_dims, self.convs, strict=True)
        vectors = []
        for x, path, batch_dim, conv in plan:
            x = x.movedim(batch_dim, 0)
            if path.channels_last:
                x = x.movedim(-1, 1)  # (B, C, …) from here on
            is_masked = mask is not None and path.is_sequence and batch_dim == 0
            vectors.append(_pool(conv(x), path, mask if is_masked else None))
        return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=1)


def _pool(x: Tensor, path: TensorPath, mask: Tensor | None) -> Tensor:
    """(B, C, …) to (B, path.features)."""
    if path.pooling in ("mean", "gap"):
        return x.flatten(2).mean(2) if mask is None else _masked_mean(x, mask)
    if path.pooling == "cls":
        return x[:, :, 0]
    return _average(x, path.windows).flatten(1)


def _average(x: Tensor, windows: tuple[int, ...]) -> Tensor:
    """Means over windows that lie side by side; the last one of a dimension may be smaller.

    Not adaptive_avg_pool: where its windows overlap, its backward on CUDA adds in no fixed order
    (torch.use_deterministic_algorithms lists it), and equal runs would differ in the last bits.
    """
    if all(window == 1 for window in windows):
        return x
    if len(windows) == 1:
        return F.avg_pool1d(x, windows, ceil_mode=True)
    if len(windows) == 2:
        return F.avg_pool2d(x, windows, ceil_mode=True)
    # avg_pool3d is on that list as well: height and width first, then time.
    _, channels, frames = x.shape[:3]
    x = _average(x.flatten(1, 2), windows[1:]).unflatten(1, (channels, frames))
    return _average(x.flatten(3), (windows[0], 1))


def _maximum(x: Tensor, windows: tuple[int, ...]) -> Tensor:
    """The largest values of (B, C, H, W) over such windows, of which no two overlap."""
    if all(window == 1 for window in windows):
        return x
    return F.max_pool2d(x, windows, ceil_mode=True)


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, C, T) over the tokens whose mask is not 0; 0 for a row without any."""
    if mask.is_floating_point() or mask.shape != (x.shape[0], x.shape[2]):
        raise MethodError(
            f"the mask is {mask.dtype} {tuple(mask.shape)}; pooling needs bool or integer "
            f"{(x.shape[0], x.shape[2])}, not 0 where a token counts"
        )
    is_padding = mask == 0
    # Not a product with the mask: padding may hold NaN.
    total = x.masked_fill(is_padding.unsqueeze(1), 0).sum(2, dtype=_wide(x))
    count = (~is_padding).sum(1, keepdim=True).clamp(min=1)
    return (total / count).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class Projection(nn.Module):
    """(B, in_features) to (B, out): identity, linear, mlp or mlp-bn."""

    def __init__(self, kind: str, in_features: int, *, hidden: int, out: int) -> None:
        super().__init__()
        has_hidden = kind in ("mlp", "mlp-bn")
        has_norm = kind == "mlp-bn"
        width = hidden if has_hidden else in_features
        self.hidden = nn.Linear(in_features, hidden, bias=not has_norm) if has_hidden else None
        self.norm = nn.BatchNorm1d(hidden) if has_norm else None
        self.out = None if kind == "identity" else nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_features) in any floating dtype."""
        if self.hidden is not None:
            x = self.hidden(in_dtype_of(x, self.hidden))
            x = F.relu(x if self.norm is None else _batch_norm(self.norm, x))
        return x if self.out is None else self.out(in_dtype_of(x, self.out))
