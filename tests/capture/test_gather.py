"""Nodes that share a parameter run as early as they can, so that a cut may lie behind them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capture_nets import ids, same_result
from scpl_compile.capture import Capture, capture, cut_candidates


class Sides(nn.Module):
    """Two embeddings from one table, the second after what the first one leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.table(ids))
        return self.second(x + self.again(ids, x))

    def again(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.table(ids.flip(1))


class NeedsTheFirst(Sides):
    def again(self, ids, x):
        return self.table((ids + (x.sum() > 0)) % 9)


class Functional(Sides):
    def again(self, ids, x):
        return F.embedding(ids.flip(1), self.table.weight)


class Draws(Sides):
    def again(self, ids, x):
        return F.embedding((torch.rand_like(x[..., 0]) * 9).long(), self.table.weight)


class ReadsWhatIsWritten(Sides):
    def forward(self, ids):
        other = ids.clone()
        x = self.first(self.table(ids))
        other[:, 0] = 3
        return self.second(x + self.table(other))


class WroteBefore(Sides):
    def forward(self, ids):
        other = ids.clone()
        other[:, 0] = 3
        return self.second(self.first(self.table(ids)) + self.table(other))


def moved(captured: Capture) -> list[str]:
    return [n.name for n in captured.graph.nodes if "moved" in n.meta and n.op != "get_attr"]


def first_allowed(captured: Capture) -> str:
    return next(c.after for c in cut_candidates(captured) if c.allowed)


@pytest.mark.parametrize(
    ("kind", "frontend", "expected"),
    [
        (Sides, "fx", ["flip", "table_1"]),
        (Sides, "record", ["flip", "table_1"]),
        (Functional, "fx", ["flip", "embedding"]),
        (Functional, "record", ["flip", "embedding"]),
        (WroteBefore, "record", ["table_1"]),
        (NeedsTheFirst, "fx", []),
        (Draws, "record", []),
        (ReadsWhatIsWritten, "record", []),
    ],
)
def test_what_can_run_right_after_the_first_does(
    kind: type[Sides], frontend: str, expected: list[str]
) -> None:
    model = kind()
    captured = capture(model, (ids(5, high=9),), frontend=frontend)
    assert moved(captured) == expected
    order = [n.name for n in captured.compute_nodes]
    if expected:
        start = order.index("table")
        assert order[start + 1 : start + 1 + len(expected)] == expected
    torch.manual_seed(0)
    same_result(model, [captured], torch.randint(9, (3, 5)))


def test_a_cut_may_lie_between() -> None:
    captured = capture(Sides(), (ids(5, high=9),))
    places: dict[str, Any] = {c.after: c for c in cut_candidates(captured)}
    assert places["first"].allowed
    assert set(places["first"].crossing) == {"first", "table_1"}


def test_neighbours_stay_where_they_are() -> None:
    class Twice(Sides):
        def forward(self, ids: Tensor) -> Tensor:
            return self.second(F.linear(self.first(self.table(ids)).tanh(), self.first.weight))

    assert moved(capture(Twice(), (ids(5, high=9),))) == []
