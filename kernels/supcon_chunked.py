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

No shape and no branch depends on data, so nothing waits for the device. Every sum has a fixed
order: equal inputs give equal bits at an equal number of threads.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["chunk_size", "supcon_chunked"]

EPSILON = 1e-12  # least norm a feature vector is divided by
CPU_CHUNK = 320  # a block in a core's second-level cache; from 256 to 512 the time is flat
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
        chunk = chunk_size(len(features), features.device.type)
    loss: Tensor = _ChunkedSupCon.apply(
        features, labels, temperature, divisor, normalize, reduction, chunk
    )
    return loss


def chunk_size(batch: int, device_type: str) -> int:
    """Anchors per block: the batch in the fewest equal blocks that are not too large."""
    largest = CPU_CHUNK if device_type == "cpu" else DEVICE_CHUNK
    return math.ceil(batch / math.ceil(batch / largest))


class _ChunkedSupCon(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        labels: Tensor,
        temperature: float,
        divisor: str,
        normalize: bool,
        reduction: str,
        chunk: int,
    ) -> Tensor:
        x, scale, is_unit = _prescale(features, temperature, normalize)
        classes, size = _classes(labels)
        positives = (size - 1).to(x.dtype)  # P
        weight = _anchor_weights(positives, divisor, reduction)  # n
        others = _class_sums(x, classes) - x  # o
        bounded = normalize and 1 / temperature <= MAX_BOUNDED_LOGIT[x.dtype]
        keep = ctx.needs_input_grad[0] and len(x) <= max(MAX_KEPT_BATCH, 2 * x.shape[1])
        rows, blocks = _row_sums(x, chunk, bounded, keep)
        log_rows = rows.log() if bounded else rows
        losses = (positives * log_rows - (x * others).sum(1)) * weight
        # For the mean, c_j = c_i within a class: its backward needs no classes.
        saved = () if reduction == "mean" else classes
        ctx.options = temperature, chunk, bounded, len(saved), features.dtype
        ctx.save_for_backward(x, scale, is_unit, positives, weight, others, rows, *saved, *blocks)
        return losses.sum() if reduction == "mean" else losses

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the chunked supcon_loss has no second derivative: call backward without "
                "create_graph=True, or use impl='reference'"
            )
        temperature, chunk, bounded, num_saved, dtype = ctx.options
        x, scale, is_unit, positives, weight, others, rows, *rest = ctx.saved_tensors
        c = grad_output * weight
        if num_saved:
            classes = _Classes(*rest[:num_saved])
            grad = c[:, None] * (x - others) - _class_sums(x, classes, c)
        else:
            grad = (-2 * c)[:, None] * others
        _add_products(grad, x, c * positives, rows, chunk, bounded, rest[num_saved:])
        if is_unit is not None:  # the gradient along a unit vector vanishes
            along = (x * grad).sum(1, keepdim=True) * is_unit
            grad.addcmul_(x, along, value=-temperature)
        grad.mul_(scale)
        return grad.to(dtype), None, None, None, None, None, None


def _prescale(
    features: Tensor, temperature: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, the factor that made it, and which rows (B, 1) were divided by their own norm."""
    z = features.to(torch.promote_types(features.dtype, torch.float32))
    root = temperature**-0.5
    if not normalize:
        return z * root, z.new_full((), root), None
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    scale = root / norm.clamp_min(EPSILON)
    return z * scale, scale, norm > EPSILON


class _Classes(NamedTuple):
    """Anchors by label. Class k's members lie at order[offsets[k] : offsets[k + 1]].

    A class is numbered by the place of its first member in `order`, and the other places are empty
    classes: B classes whatever the labels, so no shape depends on data.
    """

    order: Tensor  # (B,) anchors sorted by label
    offsets: Tensor  # (B,)
    class_of: Tensor  # (B,) class of each anchor


def _classes(labels: Tensor) -> tuple[_Classes, Tensor]:
    """The classes, and for each anchor the size of its own."""
    ordered, order = labels.long().sort(stable=True)
    first = torch.searchsorted(ordered, ordered)
    end = torch.searchsorted(ordered, ordered, right=True)
    place = torch.arange(len(labels), device=labels.device)
    offsets = torch.where(first == place, place, end)
    class_of = torch.empty_like(order).scatter_(0, order, first)
    size = torch.empty_like(order).scatter_(0, order, end - first)
    return _Classes(order, offsets, class_of), size


def _class_sums(x: Tensor, classes: _Classes, weight: Tensor | None = None) -> Tensor:
    """(B, D): for each anchor, the (weighted) sum of x over its class."""
    order, offsets, class_of = classes
    if weight is not None:
        weight = weight[order]
    # index_add would be shorter, but a GPU adds in no fixed order there.
    sums = functional.embedding_bag(order, x, offsets, mode="sum", per_sample_weights=weight)
    return sums.index_select(0, class_of)


def _anchor_weights(positives: Tensor, divisor: str, reduction: str) -> Tensor:
    """n: one over N_i, and for the mean over the number of anchors too."""
    inverse = positives + 1 if divisor == "scpl" else positives.clamp_min(1)
    if reduction == "mean" and divisor == "scpl":
        inverse *= len(inverse)
    elif reduction == "mean":
        inverse *= (positives > 0).sum().clamp_min(1)
    return inverse.reciprocal_()


def _row_sums(x: Tensor, chunk: int, bounded: bool, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """R when bounded, else ln R; and the blocks in the order of `_pairs` where they are kept."""
    rows = x.new_full((len(x),), 0.0 if bounded else -math.inf)
    x_parts, row_parts = x.split(chunk), rows.split(chunk)
    blocks: list[Tensor] = []
    for i, j in _pairs(len(x_parts)):
        block = _block(x_parts[i], x_parts[j], i == j, bounded)
        if keep:
            blocks.append(block)
        _accumulate(row_parts[i], block, 1, bounded)
        if i != j:
            _accumulate(row_parts[j], block, 0, bounded)
    if len(x) == 1:
        rows.fill_(1.0 if bounded else 0.0)  # an empty sum, whose logarithm is asked for times 0
    return rows, blocks


def _add_products(
    grad: Tensor,
    x: Tensor,
    v: Tensor,
    rows: Tensor,
    chunk: int,
    bounded: bool,
    kept: list[Tensor],
) -> None:
    """grad += W x in place, for v = c P; kept is what `_row_sums` kept."""
    x_parts, grad_parts, row_parts = x.split(chunk), grad.split(chunk), rows.split(chunk)
    v_parts = (v / rows if bounded else v).split(chunk)
    for number, (i, j) in enumerate(_pairs(len(x_parts))):
        block = kept[number] if kept else _block(x_parts[i], x_parts[j], i == j, bounded)
        if bounded:
            weights = (v_parts[i][:, None] + v_parts[j]).mul_(block)
        else:
            weights = (block - row_parts[i][:, None]).exp_().mul_(v_parts[i][:, None])
            weights.addcmul_((block - row_parts[j]).exp_(), v_parts[j])
        grad_parts[i].addmm_(weights, x_parts[j])
        if i != j:
            grad_parts[j].addmm_(weights.t(), x_parts[i])


def _pairs(num_blocks: int) -> list[tuple[int, int]]:
    """(I, J) of the upper triangle of blocks, row by row."""
    return [(i, j) for i in range(num_blocks) for j in range(i, num_blocks)]


def _block(x_i: Tensor, x_j: Tensor, is_diagonal: bool, bounded: bool) -> Tensor:
    """E when bounded, else s, of two blocks; where they are one, each anchor leaves itself out."""
    block = x_i.new_empty(len(x_i), len(x_j))
    torch.mm(x_i, x_j.t(), out=block)  # out= because autocast leaves that form alone
    if bounded:
        block.exp_()
    if is_diagonal:
        block.fill_diagonal_(0.0 if bounded else -math.inf)
    return block


def _accumulate(rows: Tensor, block: Tensor, dim: int, bounded: bool) -> None:
    if bounded:
        rows.add_(block.sum(dim))
    else:
        torch.logaddexp(rows, block.logsumexp(dim), out=rows)
