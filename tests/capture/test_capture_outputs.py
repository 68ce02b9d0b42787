"""Of several outputs one is kept; the rest of the graph goes where nobody notices."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from capture_nets import cut_after, floats, targets
from scpl_compile.capture import capture, coarsen
from scpl_compile.capture.outputs import keep_output, outputs_of
from scpl_compile.sources.outputs import output_name, output_tensors


class Pair(NamedTuple):
    scores: Tensor
    rest: Any = None


@dataclass
class Record:
    scores: Tensor
    rest: Any = None


class TwoBranches(nn.Module):
    """Gives its two inputs through a layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Linear(6, 6)
        self.side = nn.Linear(6, 6)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(self.main(x)), self.side(y)


class Several(nn.Module):
    """Several outputs; `gives` says how they are returned."""

    def __init__(self, gives: Any, aside: nn.Module) -> None:
        super().__init__()
        self.gives = gives
        self.branches = TwoBranches()
        self.aside = aside
        self.other = nn.Linear(6, 4)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        main, side = self.branches(x, x * 2)
        return self.gives(self.head(main), [side, self.other(self.aside(x))])


RETURNS = {
    "tuple": lambda *outputs: outputs,
    "dict": lambda scores, rest: {"scores": scores, "rest": tuple(rest)},
    "named tuple": Pair,
    "dataclass": Record,
    "nested": lambda scores, rest: {"first": Pair(scores), "rest": Record(scores=rest[0])},
}


@pytest.mark.parametrize(
    ("gives", "names"),
    [
        ("tuple", ["0", "1.0", "1.1"]),
        ("dict", ["scores", "rest.0", "rest.1"]),
        ("named tuple", ["scores", "rest.0", "rest.1"]),
        ("dataclass", ["scores", "rest.0", "rest.1"]),
        ("nested", ["first.scores", "rest.scores"]),
    ],
)
def test_the_outputs_are_known_by_name_and_one_is_kept(gives: str, names: list[str]) -> None:
    model = Several(RETURNS[gives], nn.Identity())
    captured = capture(model, (floats(6),), batch_size=5)
    found = output_tensors(outputs_of(captured))
    assert [output_name(path) for path in found] == names
    assert [meta.shape for meta in found.values()][:2] == [(5, 3), (5, 6)]
    kept = keep_output(captured, next(iter(found)))
    assert kept.outputs == ("head",) == tuple(n.name for n in kept.graph.output_node().args)
    assert targets(kept) == ["branches.main", "head"]
    kept.graph.lint()


def test_a_module_with_a_dropped_branch_is_still_called_whole() -> None:
    captured = capture(Several(RETURNS["tuple"], nn.Identity()), (floats(6),))
    kept = keep_output(captured, (0,))
    coarse, _ = coarsen(kept, cut_after(kept))
    assert targets(coarse) == ["branches", "head"]


@pytest.mark.parametrize("aside", [nn.Dropout(0.5), nn.BatchNorm1d(6)])
def test_what_draws_or_counts_stays(aside: nn.Module) -> None:
    captured = capture(Several(RETURNS["tuple"], aside), (floats(6),))
    kept = targets(keep_output(captured, (0,)))
    assert "aside" in kept and "other" not in kept


class Writes(nn.Module):
    """The second output is made by writing into what the first one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        half = h[:, :3].mul_(2)
        return self.head(h), half


def test_what_is_written_in_place_stays() -> None:
    captured = capture(Writes(), (floats(6),))
    kept = keep_output(captured, (0,)).compute_nodes
    assert [node.name for node in kept] == ["body", "getitem", "mul_", "head"]


def test_a_single_output_is_kept_as_it_is() -> None:
    captured = capture(nn.Linear(6, 3), (floats(6, name="input"),))
    before = str(captured.graph)
    assert str(keep_output(captured, ()).graph) == before
