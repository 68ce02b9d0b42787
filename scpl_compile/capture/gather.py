"""Nodes that share a parameter, brought close together.

They must run in one stage, and so must all that lies between them. The decoder of a translation
model embeds its tokens with the table of the encoder, and waits with that for the encoder to end::

    embed(source)   encoder …   embed(target)   decoder …     one stage, but for the last layers
    embed(source)   embed(target)   encoder …   decoder …     the second embedding crosses the cuts
"""

from collections import defaultdict

from torch.fx import Node

from scpl_compile.capture.captured import Capture
from scpl_compile.capture.graph import node_parameters

__all__ = ["gather_shared"]

_MAX_MOVED = 16
"""Nodes that may move with one that shares a parameter: what it reads, which others made."""


def gather_shared(capture: Capture) -> None:
    """Move every node that can run right after the first one that uses the same parameter there.

    Only nodes move that draw and write nothing and read nothing that is ever written; each gets
    meta "moved". The graph of `capture` is changed.
    """
    users: dict[str, list[Node]] = defaultdict(list)
    nodes = {node.name: node for node in capture.graph.nodes}
    for name, parameters in node_parameters(capture).items():
        for parameter in parameters:
            users[parameter].append(nodes[name])
    bases = {name: node.meta.get("base", "") for name, node in nodes.items()}
    written = {bases[name] for n in nodes.values() for name in n.meta.get("mutates", ())}
    for first, *others in users.values():
        for other in others:
            moving = _moving(other, first, capture, written)
            for node in reversed(moving):
                first.append(node)
                node.meta["moved"] = True


def _moving(node: Node, first: Node, capture: Capture, written: set[str]) -> list[Node]:
    """`node` and what it reads that comes after `first`, in order; empty if these cannot move, or
    nothing else lies between.
    """
    place = {n: index for index, n in enumerate(capture.graph.nodes)}
    found: set[Node] = set()
    pending = [node]
    while pending:
        one = pending.pop()
        if place[one] <= place[first] or one in found:
            continue
        is_fixed = one.meta.get("random") or one.meta.get("mutates") or one.meta["base"] in written
        if is_fixed or (one.op == "call_module" and one is not node) or len(found) == _MAX_MOVED:
            return []
        found.add(one)
        pending += one.all_input_nodes
    between = [n for n in place if place[first] < place[n] < place[node] and n not in found]
    return sorted(found, key=place.__getitem__) if any(n.op != "get_attr" for n in between) else []
