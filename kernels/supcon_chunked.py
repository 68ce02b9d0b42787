"""The supervised contrastive loss block by block, in O(B·D + chunk²) memory, on any torch device.

Letters: B anchors and D features; i and j number anchors, I and J blocks of `chunk` anchors.

Let u_i be the (normalised) features, x_i = u_i / sqrt(T), s_ij = x_i·x_j, E_ij = exp(s_ij) with a
diagonal of 0, R_i = sum_j E_ij, P_i the number of positives of anchor i and o_i the sum of their x,
n_i the weight of anchor i in the result, and g_i the gradient that arrives for it. Then

    loss_i  = n_i (P_i ln R_i - x_i·o_i)
    dL/dx_i = sum_j W_ij x_j - c_i o_i - sum_{j positive of i} c_j x_j
    W_ij    = E_ij (a_i + a_j)                          c_i = g_i n_i,  a_i = c_i P_i / R_i

E and W are symmetric, so both passes visit only the blocks I <= J, and block IJ serves the rows of
I and the rows of J. Positives need no B x B work: o_i is the sum over the class of i, less x_i.

|s_ij| <= 1/T for normalised features. Where that could overflow, or without normalisation, ln R is
summed in logarithms and W_ij = c_i P_i exp(s_ij - ln R_i) + c_j P_j exp(s_ij - ln R_j) instead.

Gradients of bfloat16 features: on a CPU with AMX, W x is a product of bfloat16, added in float32.

No shape and no branch depends on data, so nothing waits for the device. Every sum has a fixed
order: equal inputs give equal bits at an equal number of threads.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from scpl_compile.kernels.operators import differentiable
from scpl_compile.kernels.positives import positives_of

__all__ = ["EPSILON", "chunk_size", "supcon_chunked"]

EPSILON = 1e-12  # least norm a feature vector is divided by
CPU_CHUNK = 320  # a block in a core's second-level cache; from 256 to 512 the time is flat
THREADS_CHUNK = 512  # with threads: fewer waits for each other, which a busy machine makes long
DEVICE_CHUNK = 4096  # a block that is worth its launches
MAX_KEPT_BATCH = 512  # up to this batch, or 2 D, the backward reuses the blocks of the forward
MAX_BOUNDED_LOGIT = {torch.float32: 40.0, torch.float64: 300.0}  # exp, R and 1/R stay normal


def supcon_chunked(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    divisor: Literal["scpl", "khosla"],
    normalize: bool,
    reduction: Literal["mean", "none"],
    chunk: int | None = None,
) -> Tensor:
    """Supervised contrastive loss; the arguments are those of `supcon.supcon_loss`, unchecked.

    Args:
        chunk: Anchors per block, at least 1; `chunk_size` by default. It moves last bits only.

    Returns:
        () or (B,), float64 for float64 features, else float32.

    Raises:
        RuntimeError: In a backward pass with `create_graph=True`.
    """
    if chunk is None:
        chunk = chunk_size(len(features), features.device.type, _threads())
    keep = features.requires_grad and torch.is_grad_enabled()
    return _loss(features, labels, temperature, divisor, normalize, reduction, chunk, keep)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _threads() -> int:
    return torch.get_num_threads()


def chunk_size(batch: int, device_type: str, threads: int) -> int:
    """Anchors per block: the batch in the fewest equal blocks that are not too large."""
    largest = CPU_CHUNK if threads == 1 else THREADS_CHUNK
    if device_type != "cpu":
        largest = DEVICE_CHUNK
    return math.ceil(batch / math.ceil(batch / largest))


def forward(
    features: Tensor,
    labels: Tensor,
    temperature: float,
    divisor: str,
    normalize: bool,
    reduction: str,
    chunk: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss; x, what it was divided by, o, R, P, n; and the blocks of a small batch, flat."""
    x, length = _prescale(features, temperature, normalize)
    others_of = positives_of(labels)
    positives = others_of.counts(x.dtype)  # P
    weight = _anchor_weights(positives, divisor, reduction)  # n
    others = others_of.sums(x)  # o
    bounded = _is_bounded(x, temperature, normalize)
    kept = x.new_empty(_kept_numel(features, chunk, keep))
    rows = _row_sums(x, chunk, bounded, kept)
    log_rows = rows.log() if bounded else rows
    losses = (positives * log_rows - (x * others).sum(1)) * weight
    loss = losses.sum() if reduction == "mean" else losses
    return loss, x, length, others, rows, positives, weight, kept


def forward_fake(
    features: Tensor,
    labels: Tensor,
    temperature: float,
    divisor: str,
    normalize: bool,
    reduction: str,
    chunk: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `forward` returns, without data."""
    batch = len(features)
    x = features.new_empty(
        features.shape, dtype=torch.promote_types(features.dtype, torch.float32)
    )  # fmt: skip
    return (
        x.new_empty(() if reduction == "mean" else (batch,)),
        x,
        x.new_empty((batch, 1) if normalize else ()),
        torch.empty_like(x),
        x.new_empty(batch),
        x.new_empty(batch),
        x.new_empty(batch),
        x.new_empty(_kept_numel(features, chunk, keep)),
    )


def backward(
    grad_loss: Tensor,
    features: Tensor,
    labels: Tensor,
    x: Tensor,
    length: Tensor,
    others: Tensor,
    rows: Tensor,
    positives: Tensor,
    weight: Tensor,
    kept: Tensor,
    temperature: float,
    divisor: str,
    normalize: bool,
    reduction: str,
    chunk: int,
    keep: bool,
) -> Tensor:
    """The gradient of the features, in their dtype."""
    c = grad_loss * weight
    if reduction == "mean" and labels.dim() == 1:  # c_j = c_i within a class
        grad = others * (-2 * c)[:, None]
    else:
        grad = positives_of(labels).sums(x, c).neg_().addcmul_(c[:, None], others, value=-1)
    bounded = _is_bounded(x, temperature, normalize)
    factors = x.bfloat16() if _multiplies_bfloat16(features) else x
    _add_products(grad, x, factors, c * positives, rows, chunk, bounded, kept)
    if normalize:  # the gradient along a unit vector vanishes
        is_unit = length > (1 + 1e-6) * temperature**0.5 * EPSILON
        along = (x * grad).sum(1, keepdim=True) * is_unit
        grad.addcmul_(x, along, value=-temperature)
    grad.div_(length)
    return grad.to(features.dtype)


def _is_bounded(x: Tensor, temperature: float, normalize: bool) -> bool:
    return normalize and 1 / temperature <= MAX_BOUNDED_LOGIT[x.dtype]


def _prescale(features: Tensor, temperature: float, normalize: bool) -> tuple[Tensor, Tensor]:
    """x, and what the features were divided by: (B, 1), or () without normalisation."""
    z = features.to(torch.promote_types(features.dtype, torch.float32))
    root = temperature**0.5
    if not normalize:
        return z / root, z.new_full((), root)
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    length = norm.clamp_min_(EPSILON).mul_(root)
    return z / length, length


def _kept_numel(features: Tensor, chunk: int, keep: bool) -> int:
    """Elements of the blocks that the backward reuses: those I <= J of a small batch."""
    batch, dim = features.shape
    if not keep or batch > max(MAX_KEPT_BATCH, 2 * dim):
        return 0
    last = batch - (batch - 1) // chunk * chunk
    diagonal = (batch - last) * chunk + last * last
    return (batch * batch + diagonal) // 2


def _anchor_weights(positives: Tensor, divisor: str, reduction: str) -> Tensor:
    """n: one over N_i, and for the mean over the number of anchors too."""
    inverse = positives + 1 if divisor == "scpl" else positives.clamp_min(1)
    if reduction == "mean" and divisor == "scpl":
        inverse *= len(inverse)
    elif reduction == "mean":
        inverse *= (positives > 0).sum().clamp_min(1)
    return inverse.reciprocal_()


def _row_sums(x: Tensor, chunk: int, bounded: bool, kept: Tensor) -> Tensor:
    """R when bounded, else ln R; kept, unless it is empty, receives the blocks."""
    rows = x.new_full((len(x),), 0.0 if bounded else -math.inf)
    x_parts, row_parts = _parts(x, chunk), _parts(rows, chunk)
    for i, j, block in _blocks(x_parts, kept):
        _fill(block, x_parts[i], x_parts[j], i == j, bounded)
        _accumulate(row_parts[i], block, 1, bounded)
        if i != j:
            _accumulate(row_parts[j], block, 0, bounded)
    if len(x) == 1:
        rows.fill_(1.0 if bounded else 0.0)  # an empty sum, whose logarithm is asked for times 0
    return rows


def _add_products(
    grad: Tensor,
    x: Tensor,
    factors: Tensor,
    v: Tensor,
    rows: Tensor,
    chunk: int,
    bounded: bool,
    kept: Tensor,
) -> None:
    """grad += W x in place, for v = c P; kept is what `_row_sums` kept; factors: x in the dtype of
    the products W x.
    """
    x_parts, grad_parts, row_parts = (_parts(part, chunk) for part in (x, grad, rows))
    factor_parts = _parts(factors, chunk)
    v_parts = _parts(v / rows if bounded else v, chunk)
    for i, j, block in _blocks(x_parts, kept):
        if not len(kept):
            _fill(block, x_parts[i], x_parts[j], i == j, bounded)
        if bounded:
            weights = (v_parts[i][:, None] + v_parts[j]).mul_(block)
        else:
            weights = (block - row_parts[i][:, None]).exp_().mul_(v_parts[i][:, None])
            weights.addcmul_((block - row_parts[j]).exp_(), v_parts[j])
        weights = weights.to(factors.dtype)
        _add_product(grad_parts[i], weights, factor_parts[j])
        if i != j:
            _add_product(grad_parts[j], weights.t(), factor_parts[i])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _multiplies_bfloat16(features: Tensor) -> bool:
    """Whether W x is taken in bfloat16: an x86 processor with AMX is several times faster at it,
    and what is lost is no more than the rounding of the gradient itself.
    """
    if features.dtype != torch.bfloat16 or features.device.type != "cpu":
        return False
    return len(features) > MAX_KEPT_BATCH and torch.cpu._is_amx_tile_supported()


def _parts(whole: Tensor, chunk: int) -> tuple[Tensor, ...]:
    return whole.split(chunk) if len(whole) > chunk else (whole,)


def _blocks(parts: tuple[Tensor, ...], kept: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """I, J and the place for block IJ, of the upper triangle row by row: in kept, or new."""
    at = 0
    for i, left in enumerate(parts):
        for j, right in enumerate(parts[i:], i):
            shape = len(left), len(right)
            if len(kept):
                yield i, j, kept.as_strided(shape, (shape[1], 1), at)
                at += math.prod(shape)
            else:
                yield i, j, left.new_empty(shape)


def _fill(block: Tensor, x_i: Tensor, x_j: Tensor, is_diagonal: bool, bounded: bool) -> None:
    """E when bounded, else s, of two blocks; where they are one, each anchor leaves itself out."""
    torch.mm(x_i, x_j.t(), out=block)  # out= because autocast leaves that form alone
    if bounded:
        block.exp_()
    if is_diagonal:
        block.fill_diagonal_(0.0 if bounded else -math.inf)


def _accumulate(rows: Tensor, block: Tensor, dim: int, bounded: bool) -> None:
    if bounded:
        rows.add_(block.sum(dim))
    else:
        torch.logaddexp(rows, block.logsumexp(dim), out=rows)


_loss = differentiable(
    "supcon_chunked", forward=forward, forward_fake=forward_fake, backward=backward
)
