"""What the tests of methods share: a captured model with a stage for every node, and its plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from scpl_compile.capture import Capture, capture, coarsen
from scpl_compile.inputs import forward_parameters
from scpl_compile.ir import Plan
from scpl_compile.methods import make_method
from scpl_compile.methods.cuts import split_nodes
from scpl_compile.methods.plan import PlanFacts, build_plan
from scpl_compile.sources import parse_inputs

BATCH = 4
NUM_CLASSES = 4


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A coarse graph and the stage of each of its nodes."""

    capture: Capture
    stage_of: Mapping[str, int]

    @property
    def num_stages(self) -> int:
        """K."""
        return 1 + max(self.stage_of.values())

    def node(self, name: str) -> fx.Node:
        """A node by its name."""
        return next(node for node in self.capture.graph.nodes if node.name == name)

    def plan(self, method: str = "scpl", **facts: Any) -> Plan:
        """The plan of `method`; facts: other than the usual ones."""
        options = facts.pop("options", {})
        known = {
            "model": "net", "num_classes": NUM_CLASSES, "placement": ("cpu",) * self.num_stages,
            "threads_per_stage": 1, "optimizer": {"name": "adam", "lr": 1e-3}, "solver": "chain-dp",
            "stage_us": (1.0,) * self.num_stages, "lower_bound_us": 1.0, "opaque": (),
            "source": None, "versions": {},
        }  # fmt: skip
        chosen = make_method(method, options=options)
        return build_plan(self.capture, self.stage_of, chosen, PlanFacts(**{**known, **facts}))


def fine(model: nn.Module, inputs: str) -> Capture:
    """The captured graph, nothing collapsed."""
    return capture(model, parse_inputs(inputs, forward_parameters(model)), BATCH)


def staged(model: nn.Module, inputs: str, *cuts: str) -> Staged:
    """The graph with a cut after each of these nodes or modules."""
    found = fine(model, inputs)
    ends = set(split_nodes(found, cuts))
    stage, stage_of = 0, {}
    for node in found.compute_nodes:
        stage_of[node.name] = stage
        stage += node.name in ends
    coarse, coarse_stage_of = coarsen(found, stage_of)
    return Staged(capture=coarse, stage_of=coarse_stage_of)
