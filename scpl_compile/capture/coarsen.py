"""From the fine graph, whose cuts are chosen, to one in which whole modules are single calls.

A module call that lies inside one stage is replaced by a call of that module, outermost first, as
long as everything that is used outside is part of what it returned. Nothing is traced again, so
the values that cross the cuts stay the same.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from scpl_compile.capture.arguments import without_defaults
from scpl_compile.capture.captured import Capture, ModuleCall, Switch, blank_meta
from scpl_compile.capture.normalize import is_field_read
from scpl_compile.capture.values import Fields
from scpl_compile.errors import CaptureError

__all__ = ["coarsen"]

_CONSTANTS = (bool, int, float, str, type(None), type(...), torch.dtype, torch.device, Switch)


def coarsen(capture: Capture, stage_of: Mapping[str, int]) -> tuple[Capture, dict[str, int]]:
    """Collapse the module calls that lie inside one stage; give the graph and its nodes' stages.

    stage_of: stage of each compute node of `capture`, by name; it never falls along the graph.
    So do the stages of the result's compute nodes, which are given.

    Raises:
        CaptureError: a compute node has no stage.
    """
    if missing := [n.name for n in capture.compute_nodes if n.name not in stage_of]:
        raise CaptureError(f"node {missing[0]!r} was given no stage")
    builder = _Builder(capture, stage_of)
    for node in capture.graph.nodes:
        builder.add(node)
    graph, stages = builder.graph, builder.stages
    outputs = graph.find_nodes(op="output")[0].all_input_nodes
    coarse = replace(capture, graph=graph, outputs=tuple(n.name for n in outputs))
    return coarse, {node.name: stages[node] for node in graph.nodes if node in stages}


@dataclass(frozen=True, slots=True)
class _Collapse:
    """A module call that becomes one node.

    nodes: the compute nodes inside. given: those of them that the outside gets at, directly or by
    reading a field of what the call returned.
    """

    call: ModuleCall
    nodes: list[Node]
    given: list[Node]


def _collapses(capture: Capture, stage_of: Mapping[str, int]) -> dict[str, _Collapse]:
    """The module calls that can each become one node, by key."""
    inside: dict[str, list[Node]] = defaultdict(list)
    for node in capture.compute_nodes:
        for key in node.meta["scope"]:
            inside[key].append(node)
    alive = set(capture.graph.nodes)
    known = {node.target for node in capture.graph.find_nodes(op="get_attr")}
    found = {}
    for key, nodes in inside.items():
        call = capture.calls[key]
        given = _given(call, nodes)
        one_stage = len({stage_of[node.name] for node in nodes}) == 1
        one_stage = one_stage and not any("moved" in node.meta for node in nodes)
        one_stage = one_stage and call.has_gradient
        if one_stage and given is not None and _is_writable(call, known, alive):
            found[key] = _Collapse(call, nodes, given)
    while lost := [key for key in found if not _has_arguments(found[key], found, stage_of)]:
        found = {key: collapse for key, collapse in found.items() if key not in lost}
    return found


def _has_arguments(
    collapse: _Collapse, found: Mapping[str, _Collapse], stage_of: Mapping[str, int]
) -> bool:
    """Whether what the call is given is at hand, also where it makes no use of it.

    A value that nothing uses may be hidden in another call, or lie in an earlier stage.
    """
    scope, stage = collapse.nodes[0].meta["scope"], stage_of[collapse.nodes[0].name]
    for leaf in _leaves((collapse.call.args, dict(collapse.call.kwargs))):
        if not isinstance(leaf, Node) or leaf.name not in stage_of:
            continue
        key = next((k for k in leaf.meta["scope"] if k in found), None)
        if key is not None and key not in scope and leaf not in found[key].given:
            return False
        last_use = max((stage_of.get(user.name, stage) for user in leaf.users), default=-1)
        if max(last_use, stage_of[leaf.name]) < stage:
            return False
    return True


def _given(call: ModuleCall, nodes: list[Node]) -> list[Node] | None:
    """The nodes that the outside gets at; None if it uses one that the call did not return."""
    inside = set(nodes)
    returned = {leaf for leaf in _leaves(call.result) if isinstance(leaf, Node)}
    given: set[Node] = set()
    for node in nodes:
        if inside.issuperset(node.users):
            continue
        given.add(node)
        while node not in returned:
            if not is_field_read(node):
                return None
            node = node.all_input_nodes[0]
            if node not in inside:
                return None
            given.add(node)
    return [node for node in nodes if node in given]


def _is_writable(call: ModuleCall, known_attributes: set[Any], alive: set[Node]) -> bool:
    """Whether the arguments of a call are values of the graph and constants."""
    for leaf in _leaves((call.args, dict(call.kwargs))):
        if isinstance(leaf, Node):
            if leaf.target not in known_attributes if leaf.op == "get_attr" else leaf not in alive:
                return False
        elif not isinstance(leaf, _CONSTANTS):
            return False
    return True


class _Builder:
    """Copies the fine graph node by node, with one node for each collapsed call."""

    def __init__(self, capture: Capture, stage_of: Mapping[str, int]) -> None:
        self.graph = Graph()
        self.stages: dict[Node, int] = {}
        self._model = capture.model
        self._stage_of = stage_of
        self._by_name = {node.name: node for node in capture.graph.nodes}
        self._attributes = {n.target: n for n in capture.graph.find_nodes(op="get_attr")}
        self._collapses = _collapses(capture, stage_of)
        self._made: set[str] = set()
        self._copies: dict[Node, Node] = {}
        self._fine_base: dict[Node, str] = {}
        self._base: dict[str, str] = {}

    def add(self, node: Node) -> None:
        """Copy one node of the fine graph, or the collapsed call that it lies in."""
        if node.op == "get_attr":
            return
        key = next((k for k in node.meta["scope"] if k in self._collapses), None)
        if key is None:
            copy = self._create(node.op, node.target, (node.args, node.kwargs), node.name)
            copy.meta = dict(node.meta)
            if node.op != "output":
                self._stand_for(copy, node)
                copy.meta["mutates"] = self._written(copy, [node])
            if node.name in self._stage_of:
                self.stages[copy] = self._stage_of[node.name]
        elif key not in self._made:
            self._made.add(key)
            self._call(key, self._collapses[key])

    def _call(self, key: str, collapse: _Collapse) -> None:
        call, nodes = collapse.call, collapse.nodes
        scope = nodes[0].meta["scope"][: nodes[0].meta["scope"].index(key)]
        stage = self._stage_of[nodes[0].name]
        module = self._model.get_submodule(call.path)
        arguments = without_defaults(module, call.args, call.kwargs)
        node = self._create("call_module", call.path, arguments, None)
        node.meta = blank_meta(node, scope)
        made = [node, *self._give(call.result, node, collapse)]
        for fine in collapse.given:
            if fine not in self._copies:
                made.append(self._create(fine.op, fine.target, (fine.args, fine.kwargs), fine.name))
                made[-1].meta = blank_meta(made[-1], scope)
                self._stand_for(made[-1], fine)
        self.stages |= dict.fromkeys(made, stage)
        node.meta["mutates"] = self._written(node, nodes)
        node.meta["ops"] = tuple(op for inner in nodes for op in inner.meta["ops"])
        node.meta["random"] = any(inner.meta["random"] for inner in nodes)

    def _give(self, result: Any, node: Node, collapse: _Collapse) -> list[Node]:
        """Let `node`, which gives `result`, stand for the nodes in it; the reads this takes."""
        if isinstance(result, Node):
            if result in collapse.given and result not in self._copies:
                self._stand_for(node, result)
            return []
        made = []
        for field, item in result.items() if isinstance(result, dict) else enumerate(result):
            if any(leaf in collapse.given and leaf not in self._copies for leaf in _leaves(item)):
                function = getattr if isinstance(result, Fields) else getitem
                read = self.graph.call_function(function, (node, field))
                read.meta = blank_meta(read, node.meta["scope"])
                made += [read, *self._give(item, read, collapse)]
        return made

    def _create(self, op: str, target: Any, arguments: Any, name: str | None) -> Node:
        args, kwargs = map_aggregate(arguments, self._argument)
        return self.graph.create_node(op, target, args, kwargs, name)

    def _argument(self, item: Any) -> Any:
        if not isinstance(item, Node) or item.op != "get_attr":
            return self._copies[item] if isinstance(item, Node) else item
        attribute = self._attributes[item.target]
        copy = self.graph.get_attr(attribute.target)
        copy.meta = dict(attribute.meta)
        self._stand_for(copy, attribute)
        return copy

    def _stand_for(self, node: Node, fine: Node) -> None:
        """Let `node` give what `fine` gave."""
        self._copies[fine] = node
        self._fine_base[node] = fine.meta["base"]
        facts = ("kind", "tensor", "alias", "recipe")
        node.meta |= {key: fine.meta[key] for key in facts if key in fine.meta}
        node.meta["base"] = self._base.setdefault(fine.meta["base"], node.name)

    def _written(self, node: Node, fine_nodes: list[Node]) -> tuple[str, ...]:
        """Names of the arguments of `node` whose memory `fine_nodes` write."""
        written = [self._by_name[name] for fine in fine_nodes for name in fine.meta["mutates"]]
        bases = {fine.meta["base"] for fine in written}
        return tuple(n.name for n in node.all_input_nodes if self._fine_base.get(n) in bases)


def _leaves(value: Any) -> Iterator[Any]:
    """What is inside nested tuples, lists, dicts and slices."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
