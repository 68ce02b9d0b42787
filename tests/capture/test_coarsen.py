"""Whole modules become one call each, and what crosses the cuts stays the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from capture_nets import (
    Nested,
    crossings,
    cut_after,
    floats,
    ids,
    node_of,
    run,
    same_result,
    targets,
)
from scpl_compile.capture import Capture, capture, coarsen, cut_candidates
from scpl_compile.errors import CaptureError


def by_path(captured: Capture, path: str, position: int = -1) -> str:
    """Name of the last (or another) node inside a module."""
    inside = [
        n.name
        for n in captured.compute_nodes
        if str(n.target) == path or any(key.split("@")[0] == path for key in n.meta["scope"])
    ]
    return inside[position]


def coarse_targets(captured: Capture, *after: str) -> list[str]:
    return targets(coarsen(captured, cut_after(captured, *after))[0])


def test_one_stage_is_the_outermost_modules() -> None:
    captured = capture(Nested(), (floats(3, 6, 6),))
    assert coarse_targets(captured) == ["stem", "layer1", "layer2", "dropout", "head"]


def test_a_cut_between_modules_keeps_them_whole() -> None:
    captured = capture(Nested(), (floats(3, 6, 6),))
    coarse, stage_of = coarsen(captured, cut_after(captured, by_path(captured, "layer1")))
    assert targets(coarse) == ["stem", "layer1", "layer2", "dropout", "head"]
    assert list(stage_of) == [n.name for n in coarse.compute_nodes]
    assert [stage_of[n.name] for n in coarse.compute_nodes if n.op == "call_module"] == [
        0,
        0,
        1,
        1,
        1,
    ]


def test_a_cut_inside_a_container_parts_only_that_container() -> None:
    captured = capture(Nested(), (floats(3, 6, 6),))
    found = coarse_targets(captured, by_path(captured, "layer2.0"))
    assert found == ["stem", "layer1", "layer2.0", "layer2.1", "dropout", "head"]


def test_a_cut_inside_a_block_parts_the_block_and_what_holds_it() -> None:
    captured = capture(Nested(), (floats(3, 6, 6),))
    found = coarse_targets(captured, by_path(captured, "layer2.0.body.1"))
    block = [f"layer2.0.body.{i}" for i in range(4)] + ["layer2.0.relu"]
    assert found == ["stem", "layer1", *block, "layer2.1", "dropout", "head"]


def test_the_last_node_of_a_call_outside_parts_it() -> None:
    captured = capture(Nested(), (floats(3, 6, 6),))
    found = coarse_targets(captured, by_path(captured, "layer2.0.body"))
    assert found == [
        "stem",
        "layer1",
        "layer2.0.body",
        "layer2.0.relu",
        "layer2.1",
        "dropout",
        "head",
    ]


NESTED = capture(Nested(), (floats(3, 6, 6),))
ALLOWED = [c.after for c in cut_candidates(NESTED) if c.allowed]


@settings(max_examples=25, deadline=None)
@given(st.sets(st.sampled_from(ALLOWED), max_size=4))
def test_any_cuts_give_the_same_results_and_crossings(after: set[str]) -> None:
    stage_of = cut_after(NESTED, *after)
    coarse, coarse_stage_of = coarsen(NESTED, stage_of)
    coarse.graph.lint()
    assert crossings(coarse, coarse_stage_of) == crossings(NESTED, stage_of)
    same_result(NESTED.model, [NESTED, coarse], torch.randn(3, 3, 6, 6))


class Pair(nn.Module):
    """Gives two values and a constant in nested containers."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple:
        return self.one(x), {"other": [self.two(x), 3.0]}


class Leaky(Pair):
    """Hands one of its values out through a list that it was given."""

    def forward(self, x: Tensor, out: list) -> Tensor:
        out.append(self.one(x))
        return self.two(x)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module, function) -> None:
        super().__init__()
        self.inner = inner
        self.last = nn.Linear(4, 4)
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self._function(self.inner, x))


def check(model: nn.Module, expected: list[str]) -> Capture:
    """Coarsen with a cut before `last`; give the coarse capture."""
    captured = capture(model, (floats(4),))
    stage_of = cut_after(captured, captured.compute_nodes[-2].name)
    coarse, coarse_stage_of = coarsen(captured, stage_of)
    coarse.graph.lint()
    assert targets(coarse) == expected
    assert crossings(coarse, coarse_stage_of) == crossings(captured, stage_of)
    same_result(model, [captured, coarse], torch.randn(3, 4))
    return coarse


def test_a_module_that_gives_containers() -> None:
    def function(inner, x):
        first, rest = inner(x)
        return first + rest["other"][0] * rest["other"][1]

    coarse = check(Outer(Pair(), function), ["inner", "last"])
    assert node_of(coarse, "inner").meta["kind"] == "other"


def test_a_module_whose_values_leave_by_another_way_stays_open() -> None:
    def function(inner, x):
        out: list[Tensor] = []
        return inner(x, out) + out[0]

    check(Outer(Leaky(), function), ["inner.one", "inner.two", "last"])


def test_a_module_that_is_given_an_object_stays_open() -> None:
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, function):
            return function(self.linear(x))

    check(Outer(Uses(), lambda inner, x: inner(x, torch.tanh)), ["inner.linear", "last"])


def test_a_module_that_is_given_a_parameter() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, scale):
            return self.linear(x) * scale

    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))
            self.scales = Scales()

        def forward(self, x):
            return self.scales(x, scale=self.scale)

    model = nn.Sequential(Gives(), nn.Linear(4, 4))
    captured = capture(model, (floats(4, name="input"),))
    after = by_path(captured, "0.scales")
    coarse, _ = coarsen(captured, cut_after(captured, after))
    assert targets(coarse) == ["0", "1"]
    both = nn.Sequential(Gives(), Gives())
    captured = capture(both, (floats(4, name="input"),))
    after = by_path(captured, "1.scales.linear")
    coarse, _ = coarsen(captured, cut_after(captured, after))
    assert targets(coarse) == ["0", "1.scales.linear"]
    same_result(both, [coarse], torch.randn(2, 4))


def test_a_module_that_gives_back_what_it_was_given() -> None:
    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return x, self.linear(x)

    check(Outer(Through(), lambda inner, x: sum(inner(x))), ["inner", "last"])


def test_a_module_that_writes_what_it_was_given() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            x.mul_(2.0)
            return self.linear(x)

    def function(inner, x):
        y = x + 1
        return inner(y) + y

    coarse = check(Outer(Writes(), function), ["inner", "last"])
    assert node_of(coarse, "inner").meta["mutates"] == ("add",)


def test_facts_of_a_collapsed_call() -> None:
    captured = capture(Nested(), (floats(3, 6, 6),))
    coarse, _ = coarsen(captured, cut_after(captured))
    fine = node_of(captured, "layer1.1.relu").meta
    meta = node_of(coarse, "layer1").meta
    assert meta["tensor"] == fine["tensor"]
    assert meta["scope"] == () and meta["alias"] == ""
    inside = [n for n in captured.compute_nodes if "layer1" in n.meta["scope"]]
    assert len(meta["ops"]) == sum(len(n.meta["ops"]) for n in inside)
    assert not meta["random"] and node_of(coarse, "dropout").meta["random"]


def test_each_call_of_a_module_collapses_by_itself() -> None:
    class Act(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tanh = nn.Tanh()

        def forward(self, x):
            return self.tanh(x) * 2

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = nn.Linear(4, 4)
            self.act = Act()

        def forward(self, x):
            return self.act(self.two(self.act(self.one(x))))

    model = Twice()
    captured = capture(model, (floats(4),))
    assert coarse_targets(captured, "two") == ["one", "act", "two", "act"]
    first = [n for n in captured.compute_nodes if n.meta["scope"] == ("act",)][0]
    coarse, _ = coarsen(captured, cut_after(captured, first.name))
    assert targets(coarse) == ["one", "act.tanh", "two", "act"]
    same_result(model, [coarse], torch.randn(3, 4))


def test_the_state_of_an_lstm_crosses_as_tensors() -> None:
    class Encoder(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.lstm = nn.LSTM(width, 5, batch_first=True)

        def forward(self, x, state=None):
            return self.lstm(x, state)

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 6)
            self.one, self.two = Encoder(6), Encoder(5)
            self.head = nn.Linear(5, 3)

        def forward(self, ids):
            x, state = self.one(self.table(ids))
            x, _ = self.two(x, state)
            return self.head((x * (ids != 0).unsqueeze(-1)).mean(1))

    model = Text()
    captured = capture(model, (ids(7, 20),))
    candidates = [c for c in cut_candidates(captured) if len(c.crossing) == 3 and c.allowed]
    assert len(candidates) == 1
    stage_of = cut_after(captured, candidates[0].after)
    coarse, coarse_stage_of = coarsen(captured, stage_of)
    assert targets(coarse) == ["table", "one", "two", "head"]
    assert crossings(coarse, coarse_stage_of) == crossings(captured, stage_of)
    same_result(model, [captured, coarse], torch.randint(0, 20, (3, 7)))


def test_outputs_follow() -> None:
    captured = capture(Nested(), (floats(3, 6, 6),))
    coarse, _ = coarsen(captured, cut_after(captured))
    assert coarse.outputs == ("head",)
    x = torch.randn(2, 3, 6, 6)
    assert run(coarse, x).shape == (2, 5)


def test_every_node_needs_a_stage() -> None:
    captured = capture(Nested(), (floats(3, 6, 6),))
    with pytest.raises(CaptureError, match="node 'stem' was given no stage"):
        coarsen(captured, {"size": 0})
