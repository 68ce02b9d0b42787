"""The supervised contrastive loss as Triton kernels; `supcon_triton` launches them.

Letters: B anchors, D features; u_i the (normalised) features of anchor i, x_i = u_i sqrt(log2 e/T),
so that x_i·x_j is the similarity in bits; E_ij = 2^(x_i·x_j) for i != j, E_ii = 0; P_i positives
and the divisor N_i of anchor i, m_ij = 1 where j is a positive of i, R_i = sum_j E_ij. Then

    loss_i  = ln(2)/N_i (P_i log2 R_i - sum_j m_ij x_i·x_j)
    dL/dx_i ~ sum_j W_ij x_j       W_ij = E_ij (a_i + a_j) - (c_i + c_j) m_ij

with a_i = P_i/(N_i R_i) and c_i = 1/N_i, times the gradient that arrives. W is symmetric: one pass
serves the row and the column term. Each program owns a block of rows, adds its columns in a fixed
order and writes what no other writes, so there are no atomics and equal inputs give equal bits::

      columns j ->     plain tiles: no comparison, no label, no mask in the inner loop
    i ▒▒▒▒▒▒▒▒▒▒▓▒▒▒▒▒░
      ▒▒▒▒▒▒▒▒▒▒▓▒▒▒▒▒░   ▓ the block's own columns: the diagonal is left out
                          ░ the ragged end of the batch: columns that do not exist are left out

No running maximum: |x_i·x_j| <= log2(e)/T for normalised features. ONLINE kernels keep one, for
temperatures so small that 2^(log2(e)/T) overflows and for features that have no bound.
Positives cost no B x B work where class sums give them (LABELS False); LABELS compares in the tile,
which needs fewer launches. Weights carry the factor SCALE of `triton_rows`.

The operand x is padded with zeros, (B_PAD, D_PAD), so tiles of it load without masks. UPCAST is for
Triton's interpreter, whose bfloat16 dot is wrong.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl

__all__ = ["backward_kernel", "forward_kernel", "operand", "product_kernel", "tile_of"]


@triton.jit
def operand(
    x_ptr, first, d0, D_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """x[first : first + ROWS, d0 : d0 + COLUMNS]."""
    offsets = tl.arange(0, ROWS)[:, None] * D_PAD + tl.arange(0, COLUMNS)[None, :]
    tile = tl.load(x_ptr + tl.cast(first, tl.int64) * D_PAD + d0 + offsets)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def tile_of(
    columns, x_ptr, j0, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """x_j of a tile; by a tensor descriptor (TMA) where there is one: fewer instructions."""
    if columns is not None:
        x_j = columns.load([j0, 0])
        if UPCAST:
            x_j = x_j.to(tl.float32)
    else:
        x_j = operand(x_ptr, j0, 0, D_PAD, BLOCK_N, D_PAD, UPCAST)
    return x_j


@triton.jit
def _similarity(
    x_i, columns, x_ptr, i0, j0, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x_i·x_j of a tile; x_i is resident where BLOCK_K is all of D, and else not used."""
    if BLOCK_K == D_PAD:
        x_j = tile_of(columns, x_ptr, j0, D_PAD, BLOCK_N, UPCAST)
        s = tl.dot(x_i, tl.trans(x_j), input_precision=PRECISION)
    else:
        s = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        for d0 in range(0, D_PAD, BLOCK_K):
            left = operand(x_ptr, i0, d0, D_PAD, BLOCK_M, BLOCK_K, UPCAST)
            right = operand(x_ptr, j0, d0, D_PAD, BLOCK_N, BLOCK_K, UPCAST)
            s = tl.dot(left, tl.trans(right), s, input_precision=PRECISION)
    return s


@triton.jit
def _counts(i0, lo, hi, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of the columns lo to hi: plain tiles, own (diagonal) tiles, ragged end (0 or 1), where."""
    end = lo + (hi - lo) // BLOCK_N * BLOCK_N
    begin = tl.maximum(i0, lo)
    full_own = tl.maximum(tl.minimum(end, i0 + BLOCK_M) - begin, 0) // BLOCK_N
    own = (tl.maximum(tl.minimum(hi, i0 + BLOCK_M) - begin, 0) + BLOCK_N - 1) // BLOCK_N
    plain = (end - lo) // BLOCK_N - full_own
    ragged = ((end < hi) & ((end < i0) | (end >= i0 + BLOCK_M))).to(tl.int32)
    return plain, own, ragged, end


@triton.jit
def _plain(tile, i0, lo, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First column of a plain tile: the row block's own columns are stepped over."""
    j0 = lo + tile * BLOCK_N
    return j0 + BLOCK_M * ((j0 >= i0) & (i0 >= lo)).to(tl.int32)


@triton.jit
def _add(
    top, total, dots, counts, s, same, MASKED: tl.constexpr, ONLINE: tl.constexpr,
    LABELS: tl.constexpr,
):  # fmt: skip
    """One tile into the sums of its rows; total is (BLOCK_M, BLOCK_N) of lanes if not ONLINE.

    s is -inf where a column is left out.
    """
    if ONLINE:
        peak = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
        top = peak
    else:
        total += tl.exp2(s)
    if LABELS:
        if MASKED:
            same = same & (s != float("-inf"))
        dots += tl.sum(tl.where(same, s, 0.0), 1)
        counts += tl.sum(same.to(tl.int32), 1)
    return top, total, dots, counts


@triton.jit
def forward_kernel(
    columns, x_ptr, labels_ptr, rows_ptr, dots_ptr, counts_ptr, kept_ptr, batch, first_row,
    group_size, B_PAD, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, ONLINE: tl.constexpr, LABELS: tl.constexpr, SUMS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """R (log2 R when ONLINE) and, with LABELS, the dots and counts of positives, of a row block
    and a group of columns; with kept_ptr also E (x_i·x_j when ONLINE), for `product_kernel`.
    """
    i0 = first_row + tl.program_id(0) * BLOCK_M
    lo = tl.program_id(1) * group_size
    hi = tl.minimum(lo + group_size, batch)
    i, n = i0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    x_i = operand(x_ptr, i0, 0, D_PAD, BLOCK_M, BLOCK_K, UPCAST)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.full((BLOCK_M,) if ONLINE else (BLOCK_M, BLOCK_N), 0.0, tl.float32)
    dots = tl.full((BLOCK_M,), 0.0, tl.float32)
    counts = tl.full((BLOCK_M,), 0, tl.int32)
    label_i = tl.load(labels_ptr + i, i < batch, 0) if LABELS else i
    kept = (i - first_row).to(tl.int64)[:, None] * B_PAD + n[None, :]
    plain, own, ragged, end = _counts(i0, lo, hi, BLOCK_M, BLOCK_N)
    for tile in range(plain):
        j0 = _plain(tile, i0, lo, BLOCK_M, BLOCK_N)
        s = _similarity(
            x_i, columns, x_ptr, i0, j0, D_PAD, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST
        )  # fmt: skip
        if SUMS:
            label_j = tl.load(labels_ptr + j0 + n) if LABELS else n
            same = label_i[:, None] == label_j[None, :]
            top, total, dots, counts = _add(
                top, total, dots, counts, s, same, False, ONLINE, LABELS
            )  # fmt: skip
        if kept_ptr is not None:
            value = s if ONLINE else tl.exp2(s)
            tl.store(kept_ptr + kept + j0, value.to(kept_ptr.dtype.element_ty))
    for tile in range(own + ragged):
        j0 = tl.where(tile < own, tl.maximum(i0, lo) + tile * BLOCK_N, end)
        j = j0 + n
        s = _similarity(
            x_i, None, x_ptr, i0, j0, D_PAD, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST
        )  # fmt: skip
        s = tl.where((i[:, None] != j[None, :]) & (j[None, :] < batch), s, float("-inf"))
        if SUMS:
            label_j = tl.load(labels_ptr + j, j < batch, 0) if LABELS else n
            same = label_i[:, None] == label_j[None, :]
            top, total, dots, counts = _add(
                top, total, dots, counts, s, same, True, ONLINE, LABELS
            )  # fmt: skip
        if kept_ptr is not None:
            value = s if ONLINE else tl.exp2(s)
            tl.store(kept_ptr + kept + j0, value.to(kept_ptr.dtype.element_ty))
    if SUMS:
        out = tl.program_id(1).to(tl.int64) * batch + i
        rows = top + tl.log2(total) if ONLINE else tl.sum(total, 1)
        tl.store(rows_ptr + out, rows, i < batch)
        if LABELS:
            tl.store(dots_ptr + out, dots, i < batch)
            tl.store(counts_ptr + out, counts.to(tl.float32), i < batch)


@triton.jit
def _weights(kept, a_i, a_j, g_i, g_j, ONLINE: tl.constexpr):
    """E_ij (a_i + a_j), of E; when ONLINE, of x_i·x_j, and each term times its anchor's g."""
    if ONLINE:
        w = tl.exp2(kept - a_i[:, None]) * g_i[:, None]
        w += tl.exp2(kept - a_j[None, :]) * g_j[None, :]
    else:
        w = kept * (a_i[:, None] + a_j[None, :])
    return w


@triton.jit
def backward_kernel(
    columns, x_ptr, labels_ptr, a_ptr, c_ptr, weight_ptr, grad_ptr, batch,
    D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONLINE: tl.constexpr,
    LABELS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grad = W x of a row block in one pass, x_i and the gradient resident (D_PAD at most 256).

    With LABELS False, grad += (E ∘ (a_i + a_j)) x: the caller put the positives' part there.
    """
    i0 = tl.program_id(0) * BLOCK_M
    i, n = i0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    x_i = operand(x_ptr, i0, 0, D_PAD, BLOCK_M, D_PAD, UPCAST)
    a_i = tl.load(a_ptr + i, i < batch, 0.0)
    g_i = tl.load(weight_ptr + i, i < batch, 0.0) if ONLINE else a_i
    c_i = tl.load(c_ptr + i, i < batch, 0.0) if LABELS else a_i
    label_i = tl.load(labels_ptr + i, i < batch, 0) if LABELS else i
    grad = i.to(tl.int64)[:, None] * D_PAD + tl.arange(0, D_PAD)[None, :]
    total = tl.full((BLOCK_M, D_PAD), 0.0, tl.float32)
    plain, own, ragged, end = _counts(i0, 0, batch, BLOCK_M, BLOCK_N)
    for tile in range(plain):
        j0 = _plain(tile, i0, 0, BLOCK_M, BLOCK_N)
        j = j0 + n
        x_j = tile_of(columns, x_ptr, j0, D_PAD, BLOCK_N, UPCAST)
        s = tl.dot(x_i, tl.trans(x_j), input_precision=PRECISION)
        a_j = tl.load(a_ptr + j)
        g_j = tl.load(weight_ptr + j) if ONLINE else a_j
        w = _weights(s if ONLINE else tl.exp2(s), a_i, a_j, g_i, g_j, ONLINE)
        if LABELS:
            same = label_i[:, None] == tl.load(labels_ptr + j)[None, :]
            w -= tl.where(same, c_i[:, None] + tl.load(c_ptr + j)[None, :], 0.0)
        total = tl.dot(w.to(x_j.dtype), x_j, total, input_precision=PRECISION)
    for tile in range(own + ragged):
        j0 = tl.where(tile < own, i0 + tile * BLOCK_N, end)
        j = j0 + n
        x_j = operand(x_ptr, j0, 0, D_PAD, BLOCK_N, D_PAD, UPCAST)
        s = tl.dot(x_i, tl.trans(x_j), input_precision=PRECISION)
        valid = (i[:, None] != j[None, :]) & (j[None, :] < batch)
        s = tl.where(valid, s, float("-inf"))
        a_j = tl.load(a_ptr + j, j < batch, 0.0)
        g_j = tl.load(weight_ptr + j, j < batch, 0.0) if ONLINE else a_j
        w = _weights(s if ONLINE else tl.exp2(s), a_i, a_j, g_i, g_j, ONLINE)
        if LABELS:
            same = label_i[:, None] == tl.load(labels_ptr + j, j < batch, 0)[None, :]
            c_j = tl.load(c_ptr + j, j < batch, 0.0)
            w -= tl.where(same & valid, c_i[:, None] + c_j[None, :], 0.0)
        total = tl.dot(w.to(x_j.dtype), x_j, total, input_precision=PRECISION)
    if not LABELS:
        total += tl.load(grad_ptr + grad)
    tl.store(grad_ptr + grad, total)


@triton.jit
def product_kernel(
    kept_ptr, x_ptr, labels_ptr, a_ptr, c_ptr, weight_ptr, grad_ptr, batch, first_row, B_PAD,
    D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ONLINE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grad = W x of a row block and BLOCK_N features, W from what `forward_kernel` kept."""
    m, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    i, d0 = first_row + m, tl.program_id(1) * BLOCK_N
    a_i = tl.load(a_ptr + i, i < batch, 0.0)
    g_i = tl.load(weight_ptr + i, i < batch, 0.0) if ONLINE else a_i
    c_i = tl.load(c_ptr + i, i < batch, 0.0)
    label_i = tl.load(labels_ptr + i, i < batch, 0)
    kept = m.to(tl.int64)[:, None] * B_PAD + n[None, :]
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for j0 in range(0, batch, BLOCK_K):
        j = j0 + n
        x_j = operand(x_ptr, j0, d0, D_PAD, BLOCK_K, BLOCK_N, UPCAST)
        value = tl.load(kept_ptr + kept + j0).to(tl.float32)
        a_j = tl.load(a_ptr + j, j < batch, 0.0)
        g_j = tl.load(weight_ptr + j, j < batch, 0.0) if ONLINE else a_j
        w = _weights(value, a_i, a_j, g_i, g_j, ONLINE)
        same = label_i[:, None] == tl.load(labels_ptr + j, j < batch, 0)[None, :]
        same = same & (i[:, None] != j[None, :]) & (j[None, :] < batch)
        c_j = tl.load(c_ptr + j, j < batch, 0.0)
        w -= tl.where(same, c_i[:, None] + c_j[None, :], 0.0)
        total = tl.dot(w.to(x_j.dtype), x_j, total, input_precision=PRECISION)
    grad = i.to(tl.int64)[:, None] * D_PAD + d0 + tl.arange(0, BLOCK_N)[None, :]
    tl.store(grad_ptr + grad, total, i[:, None] < batch)
