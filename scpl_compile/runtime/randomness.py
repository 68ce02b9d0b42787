"""A random stream of its own for every stage of one process.

Torch has one CPU generator for all threads of a process. If two stages drew from it as they run
side by side, the numbers that each gets would depend on timing, and no run could be repeated. So a
stage whose forward draws randomness holds one process-wide lock for the whole forward: it puts its
own state into the default generators, runs, and takes the state back::

    default generator   ──A──┐   ┌──A──        A: whatever the caller had
    stage k                  └─k─┘             k: the stage's own stream goes on

Stages that draw nothing take no lock and overlap freely.
"""

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["StageRandom", "is_held", "own_draws", "seeded", "spread_seed"]

_HELD = threading.local()
_GENERATORS = threading.RLock()
"""Guards the process's default generators (torch, numpy, python). Scopes of one thread may nest."""


def spread_seed(seed: int, *parts: int) -> int:
    """A 63-bit seed that differs for every combination of `parts` (splitmix64 steps)."""
    state = seed & (2**64 - 1)
    for part in (0, *parts):  # 0: the seed is mixed alone, else only seed + parts[0] would count
        state = (state + 0x9E3779B97F4A7C15 + part) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


@contextmanager
def own_draws() -> Iterator[None]:
    """Draws of the caller inside come from the default generators while no stage uses them.

    A script that draws from the default generators between two steps (a DataLoader that shuffles,
    a transform) must do so inside, or its draws and those of the stages mix, and runs differ.
    Steps wait meanwhile, so nothing inside may wait for them.
    """
    with _GENERATORS:
        before, _HELD.is_held = is_held(), True
        try:
            yield
        finally:
            _HELD.is_held = before


def is_held() -> bool:
    """Whether the caller is inside `own_draws`."""
    return getattr(_HELD, "is_held", False)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside come from a fresh stream of `seed`; the default generators stay as they were."""
    with StageRandom(seed, torch.device("cpu")).drawing():
        yield


class StageRandom:
    """The torch, numpy and python random streams of one stage."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        numpy_state = np.random.RandomState(seed % 2**32).get_state(legacy=False)
        self._state: dict[str, Any] = {
            "torch": torch.Generator().manual_seed(seed).get_state(),
            "numpy": numpy_state,
            "python": random.Random(seed).getstate(),
        }
        if device.type == "cuda":
            self._state["cuda"] = torch.Generator(device).manual_seed(seed).get_state()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Everything drawn inside comes from this stage's stream, and only from there."""
        with _GENERATORS:
            before = self._get()
            self._set(self._state)
            try:
                yield
            finally:
                self._state = self._get()
                self._set(before)

    def _get(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(legacy=False),
            "python": random.getstate(),
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _set(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        np.random.set_state(state["numpy"])
        random.setstate(state["python"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def state(self) -> tuple[dict[str, Tensor], str]:
        """(byte tensors, JSON text) from which `load_state` continues the stream."""
        tensors: dict[str, Tensor] = {
            name: self._state[name] for name in ("torch", "cuda") if name in self._state
        }
        numpy_state = self._state["numpy"]
        key = numpy_state["state"]["key"].astype(np.int64)
        rest = {
            "numpy": [int(numpy_state["state"]["pos"]), int(numpy_state["has_gauss"])],
            "numpy_gauss": float(numpy_state["gauss"]),
            "python": [self._state["python"][0], self._state["python"][2]],
        }
        tensors["numpy"] = torch.from_numpy(key)
        tensors["python"] = torch.tensor(self._state["python"][1], dtype=torch.int64)
        return {name: tensor.clone() for name, tensor in tensors.items()}, json.dumps(rest)

    def load_state(self, tensors: dict[str, Tensor], text: str) -> None:
        """Continue the stream that `state` described; whatever is raised, it was none.

        The generators themselves say so where they are set, but for these two: numpy's would read
        behind its key, and Python's returns what it is given.
        """
        rest = json.loads(text)
        position, has_gauss = rest["numpy"]
        key = tensors["numpy"].numpy().astype(np.uint32)
        version, gauss = rest["python"]
        if type(position) is not int or not 0 <= position <= len(key):
            raise ValueError(f"numpy's position is {position!r}")
        if gauss is not None and type(gauss) is not float:
            raise ValueError(f"Python's next number is {gauss!r}")
        state: dict[str, Any] = {
            "torch": tensors["torch"],
            "numpy": {
                "bit_generator": "MT19937",
                "state": {"key": key, "pos": position},
                "has_gauss": has_gauss,
                "gauss": rest["numpy_gauss"],
            },
            "python": (version, tuple(tensors["python"].tolist()), gauss),
        }
        torch.Generator().set_state(state["torch"])
        np.random.RandomState().set_state(state["numpy"])
        random.Random().setstate(state["python"])
        self._state |= state
        if "cuda" in tensors and self.device.type == "cuda":
            self._state["cuda"] = tensors["cuda"]
