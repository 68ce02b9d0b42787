"""The coverage benchmark: its list is whole, its yardstick is right, and one model runs through."""

import json
from dataclasses import asdict
from itertools import combinations, pairwise
from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from benchmarks.coverage.leaves import best_max_us, item_costs, opaque_share, pieces_of
from benchmarks.coverage.one import run_one, without_paths
from benchmarks.coverage.results import COLUMNS, as_row
from benchmarks.coverage.zoo import ABSENT, TIMM_MODULES, ZOO, Entry
from scpl_compile.capture import capture
from scpl_compile.cost import DEVICES, node_costs
from scpl_compile.inputs import parse_inputs

HEADS = ("SEQUENCE", "IMAGE", "AUDIO")


def names(family: str) -> set[str]:
    return {e.spec.partition(":")[2] for e in ZOO.values() if e.family == family}


# ---------------------------------------------------------------------- the list


def test_every_classifier_of_torchvision_is_in_the_list() -> None:
    assert names("torchvision") == set(torchvision.models.list_models(torchvision.models))
    assert len(names("torchvision")) == 80


def test_a_model_of_every_module_of_timm_is_in_the_list() -> None:
    # list_modules leaves out the files of timm.models that define no model (_builder, _hub, …).
    assert set(TIMM_MODULES) == set(timm.list_modules())
    for module, name in TIMM_MODULES.items():
        assert name in timm.list_models(module=module)
    assert names("timm") >= set(TIMM_MODULES.values()) and len(names("timm")) >= 130


def test_every_architecture_of_transformers_with_a_head_is_in_the_list() -> None:
    types = set()
    for head in HEADS:
        types |= set(getattr(modeling_auto, f"MODEL_FOR_{head}_CLASSIFICATION_MAPPING_NAMES"))
    assert names("transformers") == types - ABSENT.keys()
    assert len(names("transformers")) >= 50 and len(names("transformers, full size")) >= 5


# ---------------------------------------------------------------------- the yardstick


def best_of_all_cuts(items: list[float], num_stages: int) -> float:
    places = range(len(items) + 1)
    cuts = list(combinations(places, num_stages - 1))
    return min(max(sum(items[a:b]) for a, b in pairwise((0, *cut, len(items)))) for cut in cuts)


@given(st.lists(st.integers(0, 100), min_size=3, max_size=9), st.integers(1, 4))
def test_the_best_is_the_best_of_all_cuts(items: list[int], num_stages: int) -> None:
    assert best_max_us(items, num_stages) == best_of_all_cuts([float(i) for i in items], num_stages)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(16, 64)
        self.narrow = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.wide(x)
        hidden = hidden * hidden.sigmoid()  # outside of leaf modules
        return x + self.narrow(hidden)


def test_items_are_the_calls_of_leaf_modules_with_what_runs_before_them() -> None:
    model = nn.Sequential(Block(), Block())
    pieces = pieces_of(model, parse_inputs("16", ["input"]), 8)
    assert [p.path for p in pieces if p.is_leaf] == ["0.wide", "0.narrow", "1.wide", "1.narrow"]
    assert [p.path for p in pieces if not p.is_leaf] == ["0", "0", "1", "1"]
    items = item_costs(pieces)
    assert len(items) == 4
    assert sum(items) == pytest.approx(sum(piece.cost_us for piece in pieces))


def test_a_module_that_is_kept_whole_still_counts_as_its_leaves() -> None:
    pieces = pieces_of(nn.Sequential(Block(), Block()), parse_inputs("16", ["input"]), 8)
    assert opaque_share(pieces, ["0"]) == pytest.approx(0.5, abs=0.05)
    assert opaque_share(pieces, ["0", "1"]) == pytest.approx(1.0)
    assert opaque_share(pieces, []) == 0.0
    assert best_max_us(item_costs(pieces), 4) < 0.4 * sum(item_costs(pieces))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(x)  # type: ignore[no-any-return]


def test_a_custom_backward_counts_as_the_cost_model_counts_it() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Doubles(), nn.Linear(16, 16))
    inputs = parse_inputs("16", ["input"])
    captured = capture(model, inputs, 8)
    costs = node_costs(captured, DEVICES["cpu"])
    expected = [costs[node.name].total_us for node in captured.compute_nodes]
    assert item_costs(pieces_of(model, inputs, 8)) == pytest.approx(expected)


# ---------------------------------------------------------------------- one model


@pytest.mark.parametrize(
    "entry",
    [
        Entry(family="timm", name="timm:test_vit", spec="timm:test_vit"),
        Entry(family="transformers", name="hf:bert", spec="hf:bert", is_tiny=True),
    ],
    ids=lambda entry: entry.name,
)
def test_a_model_runs_through(entry: Entry) -> None:
    found = run_one(entry, [2])
    assert found.error == ""
    outcome = found.outcomes[2]
    assert outcome.counts and len(outcome.stage_us) == 2
    assert 0.5 < outcome.ratio <= 1.25
    assert found.graph_nodes > 10 and 0 <= found.opaque_share <= 1 and found.seconds > 0
    facts = asdict(found) | {"asked": 1}
    facts["outcomes"] = {"2": asdict(outcome) | {"ratio": outcome.ratio, "counts": outcome.counts}}
    row = as_row(json.loads(json.dumps(facts)), {"commit": "abc"})
    assert tuple(row) == COLUMNS and row["counts"] == "yes" and row["ratio_4"] == ""


def test_a_model_that_is_refused_has_a_row_with_the_error() -> None:
    entry = Entry(family="timm", name="x", spec="timm:test_vti")
    found = run_one(entry, [2, 4])
    assert found.outcomes == {} and "test_vit" in found.error
    assert found.error_type == "SourceError"
    row = as_row(asdict(found) | {"asked": 2}, {})
    assert (row["counts"], row["verified"]) == ("no", "no")


def test_errors_hold_no_path() -> None:
    text = without_paths("/home/someone/lib/net.py:12 fails in /opt/x/y.py")
    assert text == "net.py:12 fails in y.py"
