"""Tiles by timing: only where asked for and possible, once, the fastest. The timer is a fake."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scpl_compile.kernels.autotune import VARIABLE, Tuner, candidates, is_wanted
from scpl_compile.kernels.routes import Route, Tiles, route

PHASES = ("forward", "backward")
SHAPES = [(256, 256), (2048, 1024), (1024, 64), (8192, 128), (65536, 128), (300000, 16)]
GPU = torch.device("cuda", 0)


def way(batch: int, dim: int, temperature: float = 0.1) -> Route:
    return route(batch, dim, torch.bfloat16, "sm_90", temperature, True)


class Timer:
    """The time of each call is what `cost` says of the tiles that ran; `ran` are all of them."""

    def __init__(self, cost: Callable[[Tiles], float]) -> None:
        self.cost, self.ran = cost, []

    def __call__(self, run: Callable[[], object]) -> float:
        before = len(self.ran)
        run()
        assert len(self.ran) == before + 1
        return self.cost(self.ran[-1])

    def note(self, phase: str) -> Callable[[Route], object]:
        return lambda one: self.ran.append(getattr(one, phase))


def tuned(timer: Timer, tuner: Tuner, phase: str, shape: tuple[int, int]) -> Tiles:
    found = tuner(way(*shape), phase, torch.empty(shape, device="meta"), timer.note(phase))
    return getattr(found, phase)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fastest_is_taken_and_timed_once(phase: str, shape: tuple[int, int]) -> None:
    ways = candidates(way(*shape), phase, *shape)
    fastest = getattr(ways[-1], phase)
    timer = Timer(lambda tiles: 0.5 if tiles == fastest else 1.0)
    tuner = Tuner(timer, wanted=lambda _: True)
    assert [tuned(timer, tuner, phase, shape) for _ in range(3)] == [fastest] * 3
    assert timer.ran == [getattr(one, phase) for one in ways]


@pytest.mark.parametrize("phase", PHASES)
def test_each_path_bucket_of_the_batch_and_width_is_timed(phase: str) -> None:
    timer = Timer(lambda _: 1.0)
    tuner = Tuner(timer, wanted=lambda _: True)
    for number, shape in enumerate([(1000, 64), (2000, 64), (2000, 32), (8192, 128)], 1):
        assert tuned(timer, tuner, phase, shape) == getattr(way(*shape), phase), "a tie: the table"
        assert timer.ran.count(getattr(way(*shape), phase)) >= 1
        timed = len(timer.ran)
        tuned(timer, tuner, phase, (shape[0] - 20, shape[1]))
        assert len(timer.ran) == timed >= 4 * number


def test_what_one_process_keeps_no_other_one_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tuner of its own stands for the process: there is no file that two of them could spoil."""
    for variable in ("HOME", "TMPDIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    ways = candidates(way(1024, 64), "forward", 1024, 64)
    for fastest in (ways[0].forward, ways[-1].forward):
        timer = Timer(lambda tiles, fastest=fastest: float(tiles != fastest))
        tuner = Tuner(timer, wanted=lambda _: True)
        assert tuned(timer, tuner, "forward", (1024, 64)) == fastest
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_not_taken() -> None:
    table = way(1024, 64).forward
    timer = Timer(lambda tiles: 1.0 if tiles == table else math.inf)
    assert tuned(timer, Tuner(timer, wanted=lambda _: True), "forward", (1024, 64)) == table


def test_it_is_off_unless_the_variable_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not is_wanted(GPU)
    monkeypatch.setenv(VARIABLE, "0")
    assert not is_wanted(GPU)


def test_without_a_gpu_or_in_the_interpreter_the_table_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    assert is_wanted(GPU) and not is_wanted(torch.device("cpu"))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not is_wanted(GPU)
    monkeypatch.undo()
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr("triton.knobs.runtime.interpret", True)
    assert not is_wanted(GPU)
    timer = Timer(lambda _: 1.0)
    found = Tuner(timer)(way(1024, 64), "forward", torch.empty(1024, 64), timer.note("forward"))
    assert found == way(1024, 64) and timer.ran == []


@pytest.mark.parametrize("phase", PHASES)
def test_candidates_keep_the_path_and_every_shape(phase: str) -> None:
    for shape, temperature in itertools.product(SHAPES, (0.1, 0.005)):
        table = way(*shape, temperature)
        found = candidates(table, phase, *shape)
        assert found[0] == table and len(found) >= 2
        for one in found:
            other = {"forward": table.forward, "backward": table.backward}
            same = replace(one, groups=table.groups, group_size=table.group_size, **other)
            assert replace(same, distances=table.distances) == table
            assert bool(one.distances) == bool(table.distances)
            assert not one.distances or one.groups + one.distances <= shape[1]
            tiles = getattr(one, phase)
            assert one.batch_pad % tiles.block_m == 0 and one.group_size % tiles.block_n == 0
            if not one.resident:
                assert phase == "forward" or one.dim_pad % tiles.block_n == 0
            else:
                assert tiles.block_m % tiles.block_n == 0
