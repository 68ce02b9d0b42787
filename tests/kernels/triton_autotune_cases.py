"""Tuned tiles compute the same loss: in the process that test_supcon_triton starts."""

import math
from collections.abc import Callable

import pytest
import torch
from supcon_peers import OPTIONS, assert_triangle, loss_and_gradient, random_batch
from torch import Tensor

from scpl_compile.kernels import supcon_loss, supcon_triton
from scpl_compile.kernels.autotune import VARIABLE, Tuner, milliseconds

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(60, 140), (300, 144), (200, 20), (400, 20)]
"""(B, D): E kept, E made again, by rows with labels, and over the triangle."""


def supcon(features: Tensor, labels: Tensor, **options: object) -> Tensor:
    loss = supcon_loss(features.to(DEVICE), labels.to(DEVICE), impl="triton", **options)
    return loss.to(features.device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("place", [1, 4, 7, 10])
def test_every_candidate_computes_the_loss(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], place: int
) -> None:
    """The timer runs each candidate and prefers the one at a place, whose result is looked at."""
    if shape == (400, 20):
        monkeypatch.setattr("scpl_compile.kernels.routes.MAX_LABELS_BATCH", 0)
    timed: list[float] = []

    def time(run: Callable[[], object]) -> float:
        timed.append(0.0 if len(timed) % 11 == place else 1.0)
        return timed[-1]

    monkeypatch.setattr(supcon_triton, "TUNE", Tuner(time, wanted=lambda _: True))
    features, labels = random_batch(*shape, 9, torch.float32)
    assert_triangle(supcon, features, labels, roundings=3, **OPTIONS)
    assert 0.0 in timed or len(timed) < place


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_variable_changes_last_bits_at_most(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    """In the interpreter nothing at all, and nothing is timed."""
    timed = []

    def time(run: Callable[[], object]) -> float:
        timed.append(milliseconds(run))
        return timed[-1]

    features, labels = random_batch(*shape, 9, torch.float32)
    by_table = loss_and_gradient(supcon, features, labels, **OPTIONS)
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr(supcon_triton, "TUNE", Tuner(time))
    tuned = loss_and_gradient(supcon, features, labels, **OPTIONS)
    if DEVICE == "cpu":
        assert timed == []
        assert all(torch.equal(*pair) for pair in zip(tuned, by_table, strict=True))
    else:
        assert timed and min(timed) < math.inf
        torch.testing.assert_close(tuned, by_table, rtol=1e-4, atol=1e-6)
