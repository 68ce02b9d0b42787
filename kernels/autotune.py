"""Tiles by timing, where SCPL_AUTOTUNE=1 asks for it: else `routes` is a table, and stays so.

A few tiles are timed on the GPU at the first call for each path, power of two of B, D, dtype and
device, forward and backward each; the fastest is kept in memory until the process ends, in no file
that processes could share or spoil. It costs seconds of compilation, and the table's tiles win a
tie. What is fastest may differ from run to run, and last bits with it: a resumed run may go on with
other tiles than it was begun with. Never timed, so by the table: in Triton's interpreter, while a
CUDA graph is captured, and under torch.use_deterministic_algorithms.
"""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from scpl_compile.kernels.routes import Route, Tiles, with_forward

__all__ = ["VARIABLE", "Tuner", "candidates", "is_wanted", "milliseconds"]

VARIABLE = "SCPL_AUTOTUNE"
SHAPES = ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 64, 4), (64, 32, 4))
STAGES = (2, 3)

Phase = Literal["forward", "backward"]
Run = Callable[[Route], object]


def is_wanted(device: torch.device) -> bool:
    """Whether to time tiles on the device, now."""
    return (
        os.environ.get(VARIABLE) == "1"
        and device.type == "cuda"
        and not triton.knobs.runtime.interpret
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def milliseconds(run: Callable[[], object]) -> float:
    """The median of some calls on the GPU; infinite where the kernel does not fit on it."""
    try:
        return float(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"))
    except (OutOfResources, PTXASError):
        return math.inf


def candidates(way: Route, phase: Phase, batch: int, dim: int) -> list[Route]:
    """The table's own, first, and the same path with other tiles of its forward or backward."""
    found, table = [way], getattr(way, phase)
    for block_m, block_n, num_warps in ((table.block_m, table.block_n, table.num_warps), *SHAPES):
        for num_stages in STAGES:
            tiles = Tiles(block_m, block_n, num_warps, num_stages, table.block_k)
            if phase == "forward":
                other = with_forward(way, batch, dim, tiles)
            else:
                columns = block_n if way.resident else min(block_n, way.dim_pad)
                other = replace(way, backward=replace(tiles, block_n=columns))
            if other is not None and other not in found:
                found.append(other)
    return found


class Tuner:
    """Keeps the fastest tiles of each (phase, path, B, D, dtype, device) that was asked for."""

    def __init__(
        self,
        time: Callable[[Callable[[], object]], float] = milliseconds,
        wanted: Callable[[torch.device], bool] = is_wanted,
    ) -> None:
        self._time, self._wanted = time, wanted
        self._kept: dict[tuple[object, ...], Tiles] = {}

    def __call__(self, way: Route, phase: Phase, features: Tensor, run: Run) -> Route:
        """The way to go; `run` does the phase by the way it is given, as often as it is called."""
        if not self._wanted(features.device):
            return way
        batch, dim = features.shape
        ways = {getattr(one, phase): one for one in candidates(way, phase, batch, dim)}
        path = (way.resident, way.stored, way.online, way.labels, way.distances > 0, way.dtype)
        key = (phase, path, (batch - 1).bit_length(), dim, features.device)
        if self._kept.get(key) not in ways:
            times = {tiles: self._time(partial(run, one)) for tiles, one in ways.items()}
            self._kept[key] = min(times, key=times.__getitem__)
        return ways[self._kept[key]]
