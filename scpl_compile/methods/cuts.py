"""What a cut at every place of the graph would mean for a method: the partitioner's problem."""

from collections.abc import Container, Mapping, Sequence
from itertools import pairwise

import networkx as nx
from torch import fx

from scpl_compile.capture import (
    Capture,
    CutCandidate,
    cut_candidates,
    node_parameters,
    tied_groups,
    trained_nodes,
)
from scpl_compile.capture.normalize import is_field_read
from scpl_compile.cost import DeviceSpec
from scpl_compile.errors import LossError, MethodError, OwnCodeError, PartitionError
from scpl_compile.ir import SINGLE_LABEL, NodeCost, TensorMeta
from scpl_compile.methods.base import Method, loss_us, losses_of
from scpl_compile.methods.flow import meta_of
from scpl_compile.methods.plan import candidate_view, last_view
from scpl_compile.partition import PartitionProblem

__all__ = ["cut_problem", "split_nodes"]


def cut_problem(
    capture: Capture,
    costs: Mapping[str, NodeCost],
    method: Method,
    num_classes: int,
    device: DeviceSpec,
    task: str = SINGLE_LABEL,
) -> PartitionProblem:
    """The graph with its costs, and for every place whether a cut is allowed and what it costs.

    The heads and losses of a stage depend on where it ends, so their cost is part of the balance.

    Raises:
        MethodError: the method cannot be applied to the last stage.
        LossError: a loss of the user's own cannot be used.
        OwnCodeError: code of the user's own fails wherever the graph could be cut.
    """
    nodes = capture.compute_nodes
    failures: list[OwnCodeError] = []
    graph = _graph(capture, costs)
    allowed, reasons, heads, penalties = [], [], [], []
    metas = {n.name: meta_of(n) for n in capture.graph.nodes}
    carries_gradient = {
        name: meta is not None and meta.requires_grad for name, meta in metas.items()
    }
    candidates = cut_candidates(capture)
    largest = max((candidate_nbytes(c, metas) for c in candidates), default=0) or 1
    for candidate, (before, after) in zip(candidates, pairwise(nodes), strict=True):
        reason = candidate.reason or None
        head_us = 0.0
        num_gradients = 1
        if candidate.allowed:
            try:
                view = candidate_view(candidate.crossing, capture, num_classes, task)
                num_gradients = sum(carries_gradient[name] for name in candidate.crossing)
                head_us = sum(loss_us(loss, device) for loss in losses_of(method, view))
            except LossError:
                raise  # no other place would do
            except MethodError as error:
                reason = str(error)
                failures += [error] if isinstance(error, OwnCodeError) else []
        allowed.append(reason is None)
        reasons.append(reason)
        heads.append(head_us)
        traffic = candidate_nbytes(candidate, metas) / largest
        penalties.append(_open_modules(before, after) + 2.0 * (num_gradients - 1) + 0.5 * traffic)
    if failures and not any(allowed):  # a mistake in the code, and not in the places
        raise failures[0]
    return PartitionProblem(
        graph=graph,
        allowed=tuple(allowed),
        head_us=tuple(heads),
        penalty=tuple(penalties),
        tail_us=sum(
            loss_us(loss, device)
            for loss in losses_of(method, last_view(capture, num_classes, task))
        ),
        reason=tuple(reasons),
    )


def _graph(capture: Capture, costs: Mapping[str, NodeCost]) -> nx.DiGraph:
    graph = nx.DiGraph()
    groups = tied_groups(capture)
    parameters = node_parameters(capture)
    trained = {name for name, p in capture.model.named_parameters() if p.requires_grad}
    reached = trained_nodes(capture)
    for node in capture.compute_nodes:
        graph.add_node(
            node.name,
            cost_us=costs[node.name].total_us,
            group=groups.get(node.name),
            trainable=node.name in reached and not trained.isdisjoint(parameters[node.name]),
        )
    for node in capture.compute_nodes:
        graph.add_edges_from(
            (source.name, node.name) for source in node.all_input_nodes if source.name in graph
        )
    return graph


def candidate_nbytes(candidate: CutCandidate, metas: Mapping[str, TensorMeta | None]) -> int:
    """Bytes that a cut there would send; metas: of every node, by name."""
    names = (*candidate.crossing, *candidate.inputs)
    return sum(meta.nbytes for name in names if (meta := metas[name]) is not None)


def _open_modules(before: fx.Node, after: fx.Node) -> int:
    """How many modules a cut between two neighbours would part."""
    depth = 0
    for left, right in zip(before.meta["scope"], after.meta["scope"], strict=False):
        if left != right:
            break
        depth += 1
    return depth


def split_nodes(capture: Capture, names: Sequence[str]) -> list[str]:
    """The graph node after which each of `names` ends: a node's name or a module's path.

    Raises:
        PartitionError: there is no such module, or the output does not need it.
    """
    last: dict[str, str] = {}
    paths: dict[fx.Node, str] = {}  # of the module whose result, or whose container's item, it is
    for node in capture.compute_nodes:
        last[node.name] = node.name
        for key in node.meta["scope"]:
            last[key.split("@")[0]] = node.name
        if node.op == "call_module":
            paths[node] = str(node.target)
        elif is_field_read(node):
            container = node.all_input_nodes[0]
            if container in paths and container.meta["tensor"] is None:
                paths[node] = paths[container]
        if node in paths:
            last[paths[node]] = node.name
    for name in names:
        if name not in last:
            raise PartitionError(f"--split-at {name!r} {_why_no_place(capture, name, last)}")
    return [last[name] for name in names]


def _why_no_place(capture: Capture, name: str, known: Container[str]) -> str:
    """Why the graph has no node of `name`, and what to name instead."""
    modules = dict(capture.model.named_modules())
    if name not in modules:
        children = ", ".join([child for child, _ in capture.model.named_children()][:12])
        return f"is no module of the model; it has {children}"
    inside = [path for path in modules if path.startswith(f"{name}.") and path in known]
    if inside:
        return f"is a container that is not called itself; name the last of {_listed(inside)}"
    called = {str(node.target) for node in capture.graph.find_nodes(op="call_module")}
    around = [p for p in called if p in modules and (not p or name.startswith(f"{p}."))]
    if around:
        whole, *_ = around
        reason = dict(capture.opaque).get(whole, f"{type(modules[whole]).__name__} is of torch.nn")
        return f"lies in {whole or 'the model'!r}, which is kept whole ({reason}); name another"
    places = [path for path in modules if path in known]
    return (
        "is a module that the output does not depend on (it is not called, or nothing uses what "
        f"it gives); name another module, as {_listed(places)}"
    )


def _listed(paths: list[str]) -> str:
    return ", ".join(paths[:8]) + (", …" if len(paths) > 8 else "")
