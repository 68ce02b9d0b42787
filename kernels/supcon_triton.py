"""The supervised contrastive loss on a GPU: which kernels, with which tiles, in which order.

::

    prologue ─▶ forward ─▶ finalise ─▶ loss      rows:   backward ────────────┐
       x     R, positives     a, c               stored: product, from kept E ┴▶ project ─▶ gradient

forward: over the upper triangle of E where positives are class sums, x_i stays on chip and the
workspace is no more than O(B·D); else by rows.
rows: x_i and the gradient of a row block stay on chip and E is computed again: D up to 256.
stored: for B up to 2 D the forward keeps E, B² elements and so O(B·D) of them. Else, where D is too
large for rows, the backward makes E again, some rows at a time. Five launches, B up to 2 D.

The operator runs on the device of its arguments, or anywhere under TRITON_INTERPRET=1. Importing
this module registers it; `supcon` does so at first use, for it works where Triton is absent.
"""

import math

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scpl_compile.kernels import triton_kernels, triton_rows, triton_triangle
from scpl_compile.kernels.autotune import Tuner
from scpl_compile.kernels.operators import differentiable
from scpl_compile.kernels.positives import positives_of
from scpl_compile.kernels.routes import Route, route

__all__ = ["supcon_triton"]

BITS = math.log2(math.e)
TUNE = Tuner()


def forward(
    features: Tensor,
    labels: Tensor,
    temperature: float,
    divisor: str,
    normalize: bool,
    reduction: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss; x (B_PAD, D_PAD); a, c (B,); factor (); kept E, or nothing: see `triton_kernels`."""
    batch, way = len(features), _route(features, temperature, normalize)
    loss, x, a, c, factor, kept = forward_fake(
        features, labels, temperature, divisor, normalize, reduction, keep
    )
    labels = labels.long().contiguous()
    with torch.cuda.device_of(features):
        _prologue(features, x, temperature, normalize)
        stored = kept if kept.numel() else None
        way = TUNE(way, "forward", features, lambda one: _sums(one, x, labels, stored))
        rows, dots, counts = _sums(way, x, labels, stored)
        triton_rows.finalise_kernel[(1,)](
            rows, dots, counts, loss, a, c, factor, batch, len(rows), len(dots),
            KHOSLA=divisor == "khosla", MEAN=reduction == "mean", ONLINE=way.online,
            BLOCK=1024, num_warps=8,
        )  # fmt: skip
    return loss, x, a, c, factor, kept


def forward_fake(
    features: Tensor,
    labels: Tensor,
    temperature: float,
    divisor: str,
    normalize: bool,
    reduction: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `forward` returns, not filled in."""
    batch, way = len(features), _route(features, temperature, normalize)
    numbers = features.new_empty(2, batch, dtype=torch.float32)
    kept_shape = (way.batch_pad, way.batch_pad) if keep and way.stored else (0,)
    return (
        numbers.new_empty(() if reduction == "mean" else (batch,)),
        features.new_empty(way.batch_pad, way.dim_pad, dtype=way.dtype),
        torch.empty_like(numbers[0]),
        torch.empty_like(numbers[1]),
        numbers.new_empty(()),
        features.new_empty(kept_shape, dtype=way.kept_dtype),
    )


def backward(
    grad_loss: Tensor,
    features: Tensor,
    labels: Tensor,
    x: Tensor,
    a: Tensor,
    c: Tensor,
    factor: Tensor,
    kept: Tensor,
    temperature: float,
    divisor: str,
    normalize: bool,
    reduction: str,
    keep: bool,
) -> Tensor:
    """The gradient of the features, in their dtype, contiguous."""
    way = _route(features, temperature, normalize)
    labels = labels.long().contiguous()
    weight, scale = None, grad_loss.float()
    if reduction == "none":  # a largest weight of 1, so that float16 can hold W
        scale = grad_loss.abs().amax().clamp_min(torch.finfo(torch.float32).tiny).float()
        weight = grad_loss / scale
        c = c * weight
        a = a if way.online else a * weight
    elif way.online:
        weight = torch.ones_like(c)
    grad = x.new_empty(x.shape, dtype=torch.float32)
    with torch.cuda.device_of(features):

        def run(one: Route) -> None:
            if one.resident:
                _backward_rows(one, x, labels, a, c, weight, grad, reduction)
            else:
                _backward_stored(one, x, labels, a, c, weight, grad, kept)

        run(TUNE(way, "backward", features, run))
        return _project(grad, features, factor, scale, temperature, normalize)


def _route(features: Tensor, temperature: float, normalize: bool) -> Route:
    batch, dim = features.shape
    return route(batch, dim, features.dtype, _architecture(features), temperature, normalize)


def _architecture(features: Tensor) -> str:
    """sm_90, gfx942, …; "interpreter" under TRITON_INTERPRET=1."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(features.device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(features.device)
    return f"sm_{major}{minor}"


def _root(temperature: float) -> float:
    """What unit features are multiplied by, so that their products are similarities in bits."""
    return math.sqrt(BITS / temperature)


def _prologue(features: Tensor, x: Tensor, temperature: float, normalize: bool) -> None:
    block_m, block_d = 32, min(x.shape[1], 128)
    triton_rows.prologue_kernel[(x.shape[0] // block_m,)](
        features, x, *features.shape, *features.stride(), _root(temperature),
        D_PAD=x.shape[1], NORMALIZE=normalize, BLOCK_M=block_m, BLOCK_D=block_d,
    )  # fmt: skip


def _project(
    grad: Tensor,
    features: Tensor,
    factor: Tensor,
    scale: Tensor,
    temperature: float,
    normalize: bool,
) -> Tensor:
    out = torch.empty_like(features, memory_format=torch.contiguous_format)
    block_m, block_d = 32, min(grad.shape[1], 128)
    triton_rows.project_kernel[(triton.cdiv(len(features), block_m),)](
        grad, features, out, factor, scale, *features.shape, *features.stride(),
        _root(temperature), D_PAD=grad.shape[1], NORMALIZE=normalize, BLOCK_M=block_m,
        BLOCK_D=block_d,
    )  # fmt: skip
    return out


def _positives(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(1, B) each: x_i·(sum of x over the positives of i), and their number; by class sums."""
    x, positives = x.float(), positives_of(labels)
    return (x * positives.sums(x)).sum(1)[None], positives.counts(x.dtype)[None]


def _sums(
    way: Route, x: Tensor, labels: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """R (its logarithm when online), x_i·(sum of x over the positives of i), and their number; each
    (number of parts, B), to be combined in their order."""
    batch = len(labels)
    if way.distances:
        return _run_triangle(way, x, batch), *_positives(x[:batch], labels)
    rows = x.new_empty(way.groups, batch, dtype=torch.float32)
    if way.labels:
        dots, counts = torch.empty_like(rows), torch.empty_like(rows)
    else:
        dots, counts = _positives(x[:batch], labels)
    _run_forward(way, x, labels, (rows, dots, counts), kept, 0, batch)
    return rows, dots, counts


def _run_triangle(way: Route, x: Tensor, batch: int) -> Tensor:
    """(1, B): R."""
    parts = x.new_empty(way.groups + way.distances, batch, dtype=torch.float32)
    grid = triton.cdiv(batch, way.forward.block_m), way.groups
    triton_triangle.triangle_kernel[grid](
        _descriptor(way, x, way.forward.block_n), x, parts, batch, way.groups, way.distances,
        **way.triangle_options(),
    )  # fmt: skip
    return parts.sum(0, keepdim=True)  # in one program of `finalise_kernel` many would be slow


def _run_forward(
    way: Route,
    x: Tensor,
    labels: Tensor,
    sums: tuple[Tensor, Tensor, Tensor] | None,
    kept: Tensor | None,
    first: int,
    end: int,
) -> None:
    """Rows first to end: their sums, or what the backward wants kept of them, or both."""
    rows, dots, counts = sums or (None, None, None)
    triton_kernels.forward_kernel[(triton.cdiv(end - first, way.forward.block_m), way.groups)](
        _descriptor(way, x, way.forward.block_n),
        x, labels, rows, dots, counts, kept, len(labels), first, way.group_size, way.batch_pad,
        SUMS=sums is not None, **way.forward_options(),
    )  # fmt: skip


def _descriptor(way: Route, x: Tensor, block_n: int) -> TensorDescriptor | None:
    """Of tiles of x, where the kernels load them so."""
    if not way.descriptors:
        return None
    return TensorDescriptor.from_tensor(x, [block_n, way.dim_pad])


def _backward_rows(
    way: Route,
    x: Tensor,
    labels: Tensor,
    a: Tensor,
    c: Tensor,
    weight: Tensor | None,
    grad: Tensor,
    reduction: str,
) -> None:
    batch, tiles = len(labels), way.backward
    if not way.labels:
        part, positives = x[:batch].float(), positives_of(labels)
        if reduction == "mean":  # c_j = c_i within a class
            torch.mul(positives.sums(part), (-2 * c)[:, None], out=grad[:batch])
        else:
            torch.add(positives.sums(part, c), positives.sums(part) * c[:, None], out=grad[:batch])
            grad.neg_()
    triton_kernels.backward_kernel[(triton.cdiv(batch, tiles.block_m),)](
        _descriptor(way, x, tiles.block_n), x, labels, a, c, weight, grad, batch,
        **way.backward_options(),
    )  # fmt: skip


def _backward_stored(
    way: Route,
    x: Tensor,
    labels: Tensor,
    a: Tensor,
    c: Tensor,
    weight: Tensor | None,
    grad: Tensor,
    kept: Tensor,
) -> None:
    batch, tiles = len(labels), way.backward
    step = way.batch_pad if kept.numel() else way.chunk_rows
    buffer = kept if kept.numel() else x.new_empty(step, way.batch_pad, dtype=way.kept_dtype)
    for first in range(0, batch, step):
        end = min(first + step, batch)
        if not kept.numel():
            _run_forward(way, x, labels, None, buffer, first, end)
        grid = triton.cdiv(end - first, tiles.block_m), way.dim_pad // tiles.block_n
        triton_kernels.product_kernel[grid](
            buffer, x, labels, a, c, weight, grad, batch, first, way.batch_pad,
            **way.backward_options(),
        )  # fmt: skip


supcon_triton = differentiable(
    "supcon_triton", forward=forward, forward_fake=forward_fake, backward=backward
)
"""(features, labels, temperature, divisor, normalize, reduction, keep) -> loss."""
