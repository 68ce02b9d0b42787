"""Every stage draws from a stream of its own; the process's generators stay the caller's."""

import json
import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scpl_compile.runtime.randomness import StageRandom, seeded, spread_seed

CPU = torch.device("cpu")
DRAWS: dict[str, Callable[[], float]] = {
    "torch.rand": lambda: float(torch.rand(())),
    "torch.randn": lambda: float(torch.randn(3).sum()),
    "torch.randn of many": lambda: float(torch.randn(40).sum()),
    "numpy.random": lambda: float(np.random.random()),
    "numpy.normal": lambda: float(np.random.standard_normal()),
    "random.random": random.random,
    "random.gauss": lambda: random.gauss(0, 1),
}
names = st.sampled_from(sorted(DRAWS))


def global_state() -> tuple[object, ...]:
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), kind, keys.tolist(), rest, random.getstate()


def draw(streams: StageRandom, kinds: list[str]) -> list[float]:
    with streams.drawing():
        return [DRAWS[kind]() for kind in kinds]


# ---------------------------------------------------------------------- the caller's generators


@given(st.lists(names, max_size=6), st.lists(names, max_size=6))
def test_the_callers_generators_do_not_move(inside: list[str], after: list[str]) -> None:
    before = global_state()
    draw(StageRandom(3, CPU), inside)
    with seeded(4):
        [DRAWS[kind]() for kind in after]
    assert global_state() == before


def test_after_an_exception_too() -> None:
    before = global_state()
    streams = StageRandom(1, CPU)
    with pytest.raises(KeyError), streams.drawing():
        torch.rand(3)
        raise KeyError
    with pytest.raises(ZeroDivisionError), seeded(1), seeded(2):
        random.random()
        raise ZeroDivisionError
    assert global_state() == before
    assert draw(streams, ["torch.rand"]) == draw(continued(1, ["torch.rand"] * 3), ["torch.rand"])


def continued(seed: int, kinds: list[str]) -> StageRandom:
    streams = StageRandom(seed, CPU)
    draw(streams, kinds)
    return streams


def test_scopes_of_one_thread_nest() -> None:
    with seeded(1):
        first = torch.rand(())
        with seeded(2), StageRandom(3, CPU).drawing():
            inner = torch.rand(())
        second = torch.rand(())
    with seeded(1):
        assert torch.equal(torch.rand(2), torch.stack([first, second]))
    with seeded(3):
        assert torch.equal(torch.rand(()), inner)


# ---------------------------------------------------------------------- the stage's stream


@given(st.lists(names, max_size=8), st.integers(0, 8))
def test_a_stream_goes_on_from_scope_to_scope(kinds: list[str], at: int) -> None:
    whole = draw(StageRandom(9, CPU), kinds)
    parts = StageRandom(9, CPU)
    assert draw(parts, kinds[:at]) + draw(parts, kinds[at:]) == whole


@given(st.integers(0, 2**63 - 1))
def test_a_seed_gives_what_it_gives_alone(seed: int) -> None:
    expected = torch.rand(3, generator=torch.Generator().manual_seed(seed))
    with seeded(seed):
        assert torch.equal(torch.rand(3), expected)
        assert random.random() == random.Random(seed).random()
        assert np.random.random() == np.random.RandomState(seed % 2**32).random()


@pytest.mark.parametrize("kind", sorted(DRAWS))
def test_stages_draw_different_numbers(kind: str) -> None:
    streams = [StageRandom(spread_seed(0, 2, k), CPU) for k in range(8)]
    assert len({draw(stream, [kind])[0] for stream in streams}) == 8


def test_stages_side_by_side_draw_what_each_draws_alone() -> None:
    kinds = ["torch.randn", "random.random", "numpy.normal"]
    expected = [[draw(continued(k, kinds * i), kinds) for i in range(20)] for k in range(3)]
    streams = [StageRandom(k, CPU) for k in range(3)]
    found: list[list[list[float]]] = [[], [], []]

    def work(k: int) -> None:
        for _ in range(20):
            found[k].append(draw(streams[k], kinds))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    before = global_state()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert global_state() == before


# ---------------------------------------------------------------------- its state


@given(st.lists(names, max_size=8), st.lists(names, min_size=1, max_size=8))
def test_a_loaded_state_goes_on_exactly(before: list[str], after: list[str]) -> None:
    streams = continued(7, before)
    tensors, text = streams.state()
    loaded = StageRandom(8, CPU)
    loaded.load_state(tensors, json.dumps(json.loads(text)))
    expected = draw(streams, after)
    assert draw(loaded, after) == expected
    again = StageRandom(9, CPU)
    again.load_state(tensors, text)  # what was drawn since has not changed the saved state
    assert draw(again, after) == expected


def test_a_state_is_of_integers_that_a_file_can_hold() -> None:
    tensors, _ = continued(1, ["random.gauss"]).state()
    assert {name: str(t.dtype) for name, t in tensors.items()} == {
        "torch": "torch.uint8", "numpy": "torch.int64", "python": "torch.int64",
    }  # fmt: skip


def test_a_state_from_a_gpu_loads_on_cpu() -> None:
    tensors, text = StageRandom(1, CPU).state()
    streams = StageRandom(2, CPU)
    streams.load_state({**tensors, "cuda": torch.zeros(16, dtype=torch.uint8)}, text)
    assert draw(streams, ["torch.rand"]) == draw(StageRandom(1, CPU), ["torch.rand"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("numpy", [625, 0]),  # numpy would read behind its key
        ("numpy", [-1, 0]),
        ("numpy", ["0", 0]),
        ("numpy", None),
        ("python", [9, None]),
        ("python", [3, "x"]),
        ("numpy_gauss", "x"),
    ],
)
def test_a_state_that_is_none_is_refused_before_it_is_drawn_from(name: str, value: object) -> None:
    streams = StageRandom(1, CPU)
    tensors, text = StageRandom(2, CPU).state()
    with pytest.raises((TypeError, ValueError)):
        streams.load_state(tensors, json.dumps({**json.loads(text), name: value}))
    for key, tensor in tensors.items():
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            streams.load_state({**tensors, key: tensor[:-1]}, text)
    assert draw(streams, ["torch.rand"]) == draw(StageRandom(1, CPU), ["torch.rand"])


# ---------------------------------------------------------------------- seeds


def test_spread_seeds_differ_for_all_parts() -> None:
    seeds = {spread_seed(s, a, b) for s in range(20) for a in range(20) for b in range(20)}
    seeds |= {spread_seed(s, a) for s in range(20) for a in range(20)}
    assert len(seeds) == 20**3 + 20**2


@given(st.integers(-(2**70), 2**70), st.lists(st.integers(0, 2**40), max_size=4))
def test_a_spread_seed_is_a_constant_of_63_bits(seed: int, parts: list[int]) -> None:
    value = spread_seed(seed, *parts)
    assert 0 <= value < 2**63
    assert value == spread_seed(seed, *parts)
    torch.Generator().manual_seed(value)
