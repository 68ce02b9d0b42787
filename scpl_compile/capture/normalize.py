"""Bringing a traced graph into a form that can be cut between any two nodes.

Only tensors cross a cut. So the parts of a tuple, list or dict of tensors are read right after the
node that makes it, and put together again where the whole is used: the state of an LSTM crosses as
two tensors. Parameters and buffers do not cross: each user reads its own.
"""

from collections.abc import Mapping
from dataclasses import replace
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils._pytree import tree_leaves

from scpl_compile.capture.captured import ModuleCall

__all__ = ["calls_with_parts", "is_field_read", "read_attributes_at_use", "unpack_containers"]


def read_attributes_at_use(graph: Graph) -> None:
    """Give every user of a get_attr node its own, right before it."""
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        for user in list(node.users):
            with graph.inserting_before(user):
                own = graph.node_copy(node)
            own.meta = {"scope": user.meta["scope"]}
            user.replace_input_with(node, own)
        graph.erase_node(node)


def is_field_read(node: Node) -> bool:
    """Whether `node` reads one constant field of one value (`state[0]`, `output.logits`)."""
    return node.target in (getitem, getattr) and isinstance(node.args[1], (int, str))


def unpack_containers(graph: Graph, values: Mapping[Node, Any]) -> dict[Node, Any]:
    """Read the fields of containers of tensors where these are made.

    values: what each node gave in a run; for nodes made here their values must be found anew.
    Gives, for each tuple or list that was used whole, the nodes of its parts in its place.
    """
    parts: dict[Node, Any] = {}
    for node in list(graph.nodes):
        if node.op.startswith("call_") and _holds_tensors(values[node]):
            _unpack(graph, node, values[node], parts)
    return parts


def _unpack(graph: Graph, node: Node, value: Any, parts: dict[Node, Any]) -> None:
    reads = [user for user in node.users if is_field_read(user)]
    for read in reversed(reads):
        node.append(read)
        read.meta["scope"] = node.meta["scope"]
    whole = [user for user in node.users if not is_field_read(user)]
    if not whole or type(value) not in (tuple, list):
        return
    read_of = {read.args[1]: read for read in reversed(reads)}
    items: list[Any] = []
    last = node
    for index, item in enumerate(value):
        if item is None:
            items.append(None)
            continue
        read = read_of.get(index)
        if read is None:
            with graph.inserting_after(last):
                read = graph.call_function(getitem, (node, index))
            read.meta["scope"] = node.meta["scope"]
            if _holds_tensors(item):
                _unpack(graph, read, item, parts)
        last = read
        items.append(parts.get(read, read))
    parts[node] = type(value)(items)
    for user in whole:
        user.args = map_arg(user.args, lambda n: parts[node] if n is node else n)
        user.kwargs = map_arg(user.kwargs, lambda n: parts[node] if n is node else n)


def _holds_tensors(value: Any) -> bool:
    """Whether `value` is a container with a tensor in it."""
    if isinstance(value, torch.Tensor):
        return False
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))


def calls_with_parts(
    calls: Mapping[str, ModuleCall], parts: Mapping[Node, Any]
) -> dict[str, ModuleCall]:
    """`calls` whose arguments name the parts of the containers that were taken apart."""

    def taken_apart(value: Any) -> Any:
        return map_aggregate(
            value,
            lambda item: (
                taken_apart(parts[item]) if isinstance(item, Node) and item in parts else item
            ),
        )

    return {
        key: replace(call, args=taken_apart(call.args), kwargs=taken_apart(call.kwargs))
        for key, call in calls.items()
    }
