"""Nodes that share a parameter, brought close together.

They must run in one stage, and so must all that lies between them. The decoder of a translation
model embeds its tokens with the table of the encoder, and waits with that for the encoder to end::

    embed(source)   encoder …   embed(target)   decoder …     one stage, but for the last layers
    embed(source)   embed(target)   encoder …   decoder …     the second embedding crosses the cuts
"""

from collections import defaultdict

import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from scpl_compile.capture.captured import Capture
from scpl_compile.capture.graph import node_parameters

__all__ = ["gather_shared"]

_MAX_MOVED = 16
"""Nodes that may move with one that shares a parameter: what it reads, which others made."""


def gather_shared(capture: Capture) -> None:
    """Move every node that can run right after the first one that uses the same parameter there.

    Only nodes move that draw and write nothing, and read nothing that is written on the way; each
    gets meta "moved". The graph of `capture` is changed.
    """
    users: dict[str, list[Node]] = defaultdict(list)
    nodes = {node.name: node for node in capture.graph.nodes}
    for name, parameters in node_parameters(capture).items():
        for parameter in parameters:
            users[parameter].append(nodes[name])
    for last, *others in users.values():
        if not all(_only_reads(node, capture.model) for node in (last, *others)):
            continue
        for other in others:
            moving = _moving(other, last, list(capture.graph.nodes))
            for node in reversed(moving):
                last.append(node)
                node.meta["moved"] = True
            last = other if moving else last


def _only_reads(node: Node, model: nn.Module) -> bool:
    """Whether a node that uses a parameter writes nothing that the graph does not show."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if type(module) is nn.Embedding:
            return module.max_norm is None
        return type(module) is nn.Linear
    return node.target is not F.embedding or node.kwargs.get("max_norm") is None


def _moving(node: Node, first: Node, nodes: list[Node]) -> list[Node]:
    """`node` and what it reads that comes after `first`, in order; empty if these cannot move, or
    nothing else lies between.
    """
    between = nodes[nodes.index(first) + 1 : nodes.index(node)]
    bases = {n.name: n.meta["base"] for n in nodes if n.op != "output"}
    written = {bases[name] for n in between for name in n.meta["mutates"]}
    found: set[Node] = set()
    pending = [node]
    while pending:
        one = pending.pop()
        if one in found or (one is not node and one not in between):
            continue
        touched = {bases[n.name] for n in (one, *one.all_input_nodes)}
        is_fixed = one.meta["random"] or one.meta["mutates"] or not written.isdisjoint(touched)
        if is_fixed or (one.op == "call_module" and one is not node) or len(found) == _MAX_MOVED:
            return []
        found.add(one)
        pending += one.all_input_nodes
    is_apart = any(n.op != "get_attr" and n not in found for n in between)
    return [n for n in (*between, node) if n in found] if is_apart else []
