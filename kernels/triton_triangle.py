"""The row sums R of E from half of its tiles; the letters are those of `triton_kernels`.

E is symmetric: the row sums of tile (I, J) belong to the rows of block I, its column sums to those
of block J. Program I keeps x_i and takes the blocks at distance 1, 2, … after it, round the end of
the batch and half way round: the upper triangle, folded so that all programs have as much of it::

         0 1 2 3 4 r
       0 ▓ ▒ ▒ . . ░     ▒ one tile for its rows and its columns: no comparison, no mask
       1 . ▓ ▒ ▒ . ░     ▓ the block itself: the diagonal is left out
       2 . . ▓ ▒ ▒ ░     ░ the ragged end of the batch, by rows only; so are, where the number of
       3 ▒ . . ▓ ▒ ░       blocks is even, the two tiles of blocks that lie opposite each other
       4 ▒ ▒ . . ▓ ░     . not computed
       r ░ ░ ░ ░ ░ ▓

No atomics: the column sums of each distance have a row of the workspace to themselves, and what
adds its rows up has a fixed order. Logits are bounded, and the positives are class sums.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl

from scpl_compile.kernels.triton_kernels import operand, tile_of

__all__ = ["triangle_kernel"]


@triton.jit
def triangle_kernel(
    columns, x_ptr, sums_ptr, batch, groups, distances, D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """sums (groups + distances, B): row sums, by group of tiles; column sums, by distance.

    distances = (number of full blocks - 1) // 2. All rows together are R. A tile is turned, so
    that its column sums, due at every tile, are those along the registers of a thread.
    """
    PARTS: tl.constexpr = BLOCK_M // BLOCK_N
    i0, group = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    i, n = i0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    full = batch // BLOCK_M * BLOCK_M
    x_i = tl.trans(operand(x_ptr, i0, 0, D_PAD, BLOCK_M, D_PAD, UPCAST))
    total = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    opposite = (full // BLOCK_M - 1 - 2 * distances) * PARTS
    if i0 < full:
        for tile in range(group, distances * PARTS, groups):
            j0 = _after(i0 + BLOCK_M + tile * BLOCK_N, full)
            x_j = tile_of(columns, x_ptr, j0, D_PAD, BLOCK_N, UPCAST)
            e = tl.exp2(tl.dot(x_j, x_i, input_precision=PRECISION))
            total += e
            out = (groups + tile // PARTS).to(tl.int64) * batch + j0
            tl.store(sums_ptr + out + n, tl.sum(e, 1))
        by_rows = PARTS + opposite + tl.cdiv(batch - full, BLOCK_N)
    else:
        for distance in range(group, distances, groups):
            out = (groups + distance).to(tl.int64) * batch + i
            tl.store(sums_ptr + out, tl.full((BLOCK_M,), 0.0, tl.float32), i < batch)
        by_rows = tl.cdiv(batch, BLOCK_N)
    for tile in range(group, by_rows, groups):
        j0 = full + (tile - PARTS - opposite) * BLOCK_N
        if i0 >= full:
            j0 = tile * BLOCK_N
        elif tile < PARTS:
            j0 = i0 + tile * BLOCK_N
        elif tile < PARTS + opposite:
            j0 = _after(i0 + full // 2 + (tile - PARTS) * BLOCK_N, full)
        j = j0 + n
        x_j = tile_of(None, x_ptr, j0, D_PAD, BLOCK_N, UPCAST)
        e = tl.exp2(tl.dot(x_j, x_i, input_precision=PRECISION))
        total += tl.where((i[None, :] != j[:, None]) & (j[:, None] < batch), e, 0.0)
    out = group.to(tl.int64) * batch + i
    tl.store(sums_ptr + out, tl.sum(total, 0), i < batch)


@triton.jit
def _after(j0, full):
    """A column of the full blocks, round their end."""
    return j0 - full * (j0 >= full).to(tl.int32)
