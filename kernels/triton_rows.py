"""What is done once per row, in O(B·D): before, between and after `triton_kernels`."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl

__all__ = ["EPSILON", "LN2", "SCALE", "finalise_kernel", "project_kernel", "prologue_kernel"]

EPSILON = tl.constexpr(1e-12)  # least norm a feature vector is divided by
LN2 = tl.constexpr(0.6931471805599453)
SCALE = tl.constexpr(4096.0)  # of the weights W: keeps float16 out of its subnormals


@triton.jit
def prologue_kernel(
    features_ptr, x_ptr, batch, dim, row_stride, dim_stride, root,
    D_PAD: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x = features * root, divided by their norm when NORMALIZE; zeros in the padding."""
    i = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    rows = features_ptr + i[:, None] * row_stride
    scale = tl.full((BLOCK_M,), root, tl.float32)
    if NORMALIZE:
        square = tl.full((BLOCK_M,), 0.0, tl.float32)
        for d0 in range(0, D_PAD, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            inside = (i[:, None] < batch) & (d[None, :] < dim)
            z = tl.load(rows + d[None, :] * dim_stride, inside, 0.0).to(tl.float32)
            square += tl.sum(z * z, 1)
        scale = root / tl.maximum(tl.sqrt(square), EPSILON)
    for d0 in range(0, D_PAD, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        inside = (i[:, None] < batch) & (d[None, :] < dim)
        z = tl.load(rows + d[None, :] * dim_stride, inside, 0.0).to(tl.float32)
        x = (z * scale[:, None]).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + i[:, None] * D_PAD + d[None, :], x)


@triton.jit
def finalise_kernel(
    rows_ptr, dots_ptr, counts_ptr, loss_ptr, a_ptr, c_ptr, factor_ptr, batch, groups,
    positive_groups, KHOSLA: tl.constexpr, MEAN: tl.constexpr, ONLINE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The losses or their mean; a SCALE and c SCALE of each anchor; 1/SCALE, over the number of
    anchors for the mean. One program; groups are added in their order. When ONLINE, a is given
    as -log2(a SCALE): what a similarity is reduced by before its power of two is taken.
    """
    loss_sum = tl.full((BLOCK,), 0.0, tl.float32)
    anchors = tl.full((BLOCK,), 0.0, tl.float32)
    for first in range(0, batch, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < batch
        dots = tl.full((BLOCK,), 0.0, tl.float32)
        counts = tl.full((BLOCK,), 0.0, tl.float32)
        at = i.to(tl.int64)
        for _ in range(positive_groups):
            dots += tl.load(dots_ptr + at, inside, 0.0)
            counts += tl.load(counts_ptr + at, inside, 0.0)
            at += batch
        top = tl.full((BLOCK,), 0.0, tl.float32)
        if ONLINE:
            top = tl.full((BLOCK,), float("-inf"), tl.float32)
            at = i.to(tl.int64)
            for _ in range(groups):
                top = tl.maximum(top, tl.load(rows_ptr + at, inside, 0.0))
                at += batch
            top = tl.where(top == float("-inf"), 0.0, top)
        rows = tl.full((BLOCK,), 0.0, tl.float32)
        at = i.to(tl.int64)
        for _ in range(groups):
            part = tl.load(rows_ptr + at, inside, 0.0)
            rows += tl.exp2(part - top) if ONLINE else part
            at += batch
        used = counts > 0
        divisor = tl.maximum(counts, 1.0) if KHOSLA else counts + 1
        log_rows = top + tl.log2(tl.where(used, rows, 1.0))
        losses = tl.where(used, (counts * log_rows - dots) * LN2 / divisor, 0.0)
        share = counts / divisor * SCALE
        if ONLINE:
            a = tl.where(used, log_rows - tl.log2(tl.where(used, share, 1.0)), float("inf"))
        else:
            a = tl.where(used, share / tl.where(used, rows, 1.0), 0.0)
        tl.store(a_ptr + i, a, inside)
        tl.store(c_ptr + i, 1 / divisor * SCALE, inside)
        if MEAN:
            loss_sum += losses
            anchors += tl.where(used | (not KHOSLA), 1.0, 0.0) * inside
        else:
            tl.store(loss_ptr + i, losses, inside)
    if MEAN:
        weight = 1 / tl.maximum(tl.sum(anchors, 0), 1.0)
        tl.store(loss_ptr, tl.sum(loss_sum, 0) * weight)
        tl.store(factor_ptr, weight / SCALE)
    else:
        tl.store(factor_ptr, 1.0 / SCALE)


@triton.jit
def project_kernel(
    grad_ptr, features_ptr, out_ptr, factor_ptr, scale_ptr, batch, dim, row_stride, dim_stride,
    root, D_PAD: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of x becomes that of the features, times both factors: what lies along a
    normalised vector vanishes, unless the vector was too short to be divided by its norm.
    """
    i = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    rows = features_ptr + i[:, None] * row_stride
    square = tl.full((BLOCK_M,), 0.0, tl.float32)
    along = tl.full((BLOCK_M,), 0.0, tl.float32)
    factor = tl.load(factor_ptr) * tl.load(scale_ptr) * LN2 * root
    scale = tl.full((BLOCK_M,), 1.0, tl.float32) * factor
    if NORMALIZE:
        for d0 in range(0, D_PAD, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            inside = (i[:, None] < batch) & (d[None, :] < dim)
            z = tl.load(rows + d[None, :] * dim_stride, inside, 0.0).to(tl.float32)
            g = tl.load(grad_ptr + i[:, None] * D_PAD + d[None, :], inside, 0.0)
            square += tl.sum(z * z, 1)
            along += tl.sum(z * g, 1)
        norm = tl.sqrt(square)
        scale = factor / tl.maximum(norm, EPSILON)
        along = tl.where(norm > EPSILON, along / tl.where(norm > EPSILON, square, 1.0), 0.0)
    for d0 in range(0, D_PAD, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        inside = (i[:, None] < batch) & (d[None, :] < dim)
        z = tl.load(rows + d[None, :] * dim_stride, inside, 0.0).to(tl.float32)
        g = tl.load(grad_ptr + i[:, None] * D_PAD + d[None, :], inside, 0.0)
        value = (g - z * along[:, None]) * scale[:, None]
        tl.store(
            out_ptr + i[:, None] * dim + d[None, :], value.to(out_ptr.dtype.element_ty), inside
        )
