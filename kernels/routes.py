"""Which path and which tiles: a plain table by batch, features, dtype and architecture.

A table gives the same bits on every run and starts at once; `autotune` replaces its tiles, where
asked to. Torch only, so the offline compiler and the tests read it without a GPU.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

__all__ = ["Route", "Tiles", "route", "with_forward"]

PAD = 128  # rows of x, a multiple of every block of rows or columns
MAX_BOUNDED_LOGIT = 40.0  # in nats: E, R and 1/R stay normal in float32
MAX_LABELS_BATCH = 4096  # up to here comparing labels in the tile beats the launches of class sums
PROGRAMS = 256  # enough of them to fill a large GPU
CHUNK_BYTES = 32 * 2**20  # of E at a time: it stays in the second-level cache


@dataclass(frozen=True, slots=True)
class Tiles:
    """Blocks of rows, columns and the inner dimension; warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 2
    block_k: int = 64


BIG, MEDIUM, SQUARE = Tiles(128, 128, 8), Tiles(128, 64, 8), Tiles(64, 64, 8)
SLIM, SMALL = Tiles(64, 32, 4), Tiles(32, 32, 4)
SHALLOW = Tiles(64, 64, 8, block_k=32)  # tiles of float32 are wide: fewer features at a time

TABLE = {  # forward and backward: the largest tiles that spill nothing and fit, from offline.py
    ("sm_80", "16 bit"): {
        "plain": (BIG, MEDIUM), "labels": (MEDIUM, BIG), "online": (MEDIUM, BIG),
        "stored labels": (MEDIUM, BIG), "stored online": (MEDIUM, BIG),
    },
    ("sm_80", "fp32"): {
        "plain": (SLIM, SLIM), "labels": (SLIM, SMALL), "online": (SLIM, SMALL),
        "stored labels": (Tiles(64, 32, 4, block_k=32), Tiles(64, 64, 4, block_k=32)),
        "stored online": (SHALLOW, Tiles(64, 64, 4, block_k=32)),
    },
    ("sm_90", "16 bit"): {
        "plain": (BIG, BIG), "labels": (MEDIUM, BIG), "online": (MEDIUM, BIG),
        "stored labels": (MEDIUM, BIG), "stored online": (MEDIUM, BIG),
    },
    ("sm_90", "fp32"): {
        "plain": (BIG, MEDIUM), "labels": (MEDIUM, MEDIUM), "online": (MEDIUM, MEDIUM),
        "stored labels": (Tiles(64, 64, 4, block_k=32), BIG),
        "stored online": (Tiles(64, 64, 4, block_k=32), BIG),
    },
    ("sm_100", "16 bit"): {
        "plain": (BIG, BIG), "labels": (SQUARE, MEDIUM), "online": (MEDIUM, MEDIUM),
        "stored labels": (SQUARE, BIG), "stored online": (MEDIUM, BIG),
    },
    ("sm_100", "fp32"): {
        "plain": (MEDIUM, SQUARE), "labels": (SQUARE, SQUARE), "online": (MEDIUM, SQUARE),
        "stored labels": (SHALLOW, Tiles(128, 128, 8, block_k=32)),
        "stored online": (SHALLOW, Tiles(128, 128, 8, block_k=32)),
    },
    ("gfx942", "16 bit"): {
        "plain": (BIG, Tiles(64, 64, 4)), "labels": (BIG, SLIM), "online": (BIG, SLIM),
        "stored labels": (MEDIUM, BIG), "stored online": (MEDIUM, BIG),
    },
    ("gfx942", "fp32"): {
        "plain": (BIG, SLIM), "labels": (BIG, SLIM), "online": (BIG, SLIM),
        "stored labels": (MEDIUM, BIG), "stored online": (MEDIUM, BIG),
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """How one batch is computed; see `supcon_triton` and `triton_kernels`.

    dtype, kept_dtype: of x and of the kept E. upcast: Triton's interpreter cannot multiply
    bfloat16. descriptors: tiles are loaded by tensor descriptors. resident: the row block of x
    stays on chip, and the backward goes by rows. stored: the forward keeps E. chunk_rows: of E at
    a time, where it is made again. groups, group_size: of the columns in the forward. distances:
    of the blocks whose tiles serve rows and columns, 0 where the forward goes by rows.
    """

    batch_pad: int
    dim_pad: int
    dtype: torch.dtype
    kept_dtype: torch.dtype
    precision: str
    upcast: bool
    online: bool
    labels: bool
    descriptors: bool
    resident: bool
    stored: bool
    chunk_rows: int
    groups: int
    group_size: int
    distances: int
    forward: Tiles
    backward: Tiles

    def forward_options(self) -> dict[str, Any]:
        """Of `forward_kernel`: constants and launch options."""
        block_k = self.dim_pad if self.resident else min(self.dim_pad, self.forward.block_k)
        return self._options(self.forward) | {"BLOCK_K": block_k, "LABELS": self.labels}

    def triangle_options(self) -> dict[str, Any]:
        """Of `triangle_kernel`."""
        options = self._options(self.forward)
        return {name: value for name, value in options.items() if name != "ONLINE"}

    def backward_options(self) -> dict[str, Any]:
        """Of `backward_kernel` where resident, else of `product_kernel`."""
        own = {"LABELS": self.labels} if self.resident else {"BLOCK_K": self.backward.block_k}
        return self._options(self.backward) | own

    def _options(self, tiles: Tiles) -> dict[str, Any]:
        return {
            "D_PAD": self.dim_pad,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "ONLINE": self.online,
            "PRECISION": self.precision,
            "UPCAST": self.upcast,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }


def route(
    batch: int, dim: int, dtype: torch.dtype, architecture: str, temperature: float, normalize: bool
) -> Route:
    """The path of (batch, dim) features of `dtype` on sm_80, sm_90, gfx942, interpreter, …"""
    online = not normalize or 1 / temperature > MAX_BOUNDED_LOGIT
    operand = _operand_dtype(dtype, normalize)
    wide = operand == torch.float32
    resident = dim <= (64 if wide else 128) and batch > 2 * dim
    labels = online or not resident or batch <= MAX_LABELS_BATCH
    kind = "online" if online else "labels" if labels else "plain"
    dim_pad = max(16, _power_of_two(dim)) if dim <= 128 else _up(dim, 128)
    forward, backward = _tiles(architecture, wide, resident, kind, dim_pad)
    kept_dtype = torch.bfloat16 if operand == torch.bfloat16 and not online else torch.float32
    distances = 0
    if resident and kind == "plain":
        forward, distances = _folded(batch, dim, forward, wide)
    groups, group_size = _groups(batch, forward.block_m)
    batch_pad = _up(batch, max(PAD, forward.block_m))
    row_bytes = batch_pad * kept_dtype.itemsize
    return Route(
        batch_pad=batch_pad,
        dim_pad=dim_pad,
        dtype=operand,
        kept_dtype=kept_dtype,
        precision="ieee" if architecture.startswith("gfx") else "tf32x3" if wide else "tf32",
        upcast=architecture == "interpreter" and operand == torch.bfloat16,
        online=online,
        labels=labels,
        descriptors=not wide and kind == "plain" and _has_descriptors(architecture),
        resident=resident,
        stored=not resident and batch <= max(2 * dim, PAD),
        chunk_rows=max(PAD, CHUNK_BYTES // row_bytes // PAD * PAD),
        groups=groups,
        group_size=group_size,
        distances=distances,
        forward=forward,
        backward=backward,
    )


def _operand_dtype(dtype: torch.dtype, normalize: bool) -> torch.dtype:
    """float16 could not hold features of any length; float64 is computed in float32."""
    if dtype == torch.bfloat16 or (dtype == torch.float16 and normalize):
        return dtype
    return torch.float32


def _tiles(
    architecture: str, wide: bool, resident: bool, kind: str, dim_pad: int
) -> tuple[Tiles, Tiles]:
    """Forward and backward."""
    if architecture == "interpreter":  # its cost is by tile: fewer, and yet several
        columns = 32 if resident else min(64, dim_pad)
        return Tiles(64, 32, 4, block_k=128), Tiles(64, columns, 4, block_k=32)
    forward, backward = TABLE[_family(architecture), "fp32" if wide else "16 bit"][
        kind if resident else f"stored {kind}"
    ]
    if not resident:  # these columns are features
        backward = replace(backward, block_n=min(backward.block_n, dim_pad))
    return forward, backward


def _has_descriptors(architecture: str) -> bool:
    number = architecture.removeprefix("sm_")
    return architecture == "interpreter" or (number.isdecimal() and int(number) >= 90)


def _family(architecture: str) -> str:
    """The row of the table for an architecture that may not be in it."""
    if architecture.startswith("gfx"):
        return "gfx942"
    number = int(architecture.removeprefix("sm_"))
    return "sm_80" if number < 90 or number >= 120 else "sm_90" if number < 100 else "sm_100"


def with_forward(way: Route, batch: int, dim: int, tiles: Tiles) -> Route | None:
    """The same path with other tiles in its forward; None where its workspace would not fit."""
    groups, group_size = _groups(batch, tiles.block_m)
    distances = _distances(batch, dim, tiles) if way.distances else 0
    if bool(distances) != bool(way.distances):
        return None
    return replace(
        way, forward=tiles, groups=groups, group_size=group_size, distances=distances
    )  # fmt: skip


def _folded(batch: int, dim: int, tiles: Tiles, wide: bool) -> tuple[Tiles, int]:
    """Tiles of a forward over the triangle, and its distances; tall ones where they must be few."""
    tall = replace(tiles, block_m=2 * tiles.block_m, block_n=tiles.block_n // 2)
    for one in (tiles,) if wide else (tiles, tall):
        if distances := _distances(batch, dim, one):
            return one, distances
    return tiles, 0


def _distances(batch: int, dim: int, tiles: Tiles) -> int:
    """Half of the full blocks, without the block itself; 0 where the workspace would be more than
    the gradient of x: B floats for each distance and each group."""
    distances = max(batch // tiles.block_m - 1, 0) // 2
    return distances if distances + _groups(batch, tiles.block_m)[0] <= dim else 0


def _groups(batch: int, block_m: int) -> tuple[int, int]:
    """Number and size of the groups of columns: enough programs, and not more than are useful."""
    wanted = min(math.ceil(PROGRAMS / math.ceil(batch / block_m)), math.ceil(batch / PAD))
    size = _up(math.ceil(batch / wanted), PAD)
    return math.ceil(batch / size), size


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
