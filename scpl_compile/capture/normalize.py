"""Bringing a traced graph into a form that can be cut between any two nodes.

Only tensors cross a cut. So the parts of a tuple, list or dict of tensors are read right after the
node that makes it, and put together again where the whole is used: the state of an LSTM crosses as
two tensors. Parameters and buffers do not cross: each user reads its own.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils._pytree import tree_leaves

from scpl_compile.capture.captured import ModuleCall
from scpl_compile.capture.proxies import IN_PLACE

__all__ = [
    "calls_with_parts",
    "is_field_read",
    "prefer_new_tensors",
    "read_attributes_at_use",
    "unpack_containers",
]


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
    pending = [(n, values[n]) for n in graph.nodes if n.op.startswith("call_")]
    for node, value in pending:
        if not _holds_tensors(value):
            continue
        reads = [user for user in node.users if is_field_read(user)]
        for read in reversed(reads):
            _move_after(node, read)
        whole = [user for user in node.users if user not in reads]
        if whole and type(value) in (tuple, list):
            items, made = _read_all(graph, node, value, reads)
            parts[node] = type(value)(items)
            pending += [(read, value[read.args[1]]) for read in made]
            for user in whole:
                _replace_argument(user, node, parts[node])
    return parts


def _read_all(
    graph: Graph, node: Node, value: Any, reads: list[Node]
) -> tuple[list[Any], list[Node]]:
    """A read of every item of `value`, which `node` gives, and those of them that are new."""
    read_of = {read.args[1]: read for read in reads}
    items, made = [], []
    for index, item in enumerate(value):
        if item is not None and index not in read_of:
            with graph.inserting_after(node):
                read_of[index] = graph.call_function(getitem, (node, index))
            made.append(read_of[index])
        items.append(None if item is None else read_of[index])
    for read in reversed(items):
        if read is not None:
            _move_after(node, read)
    return items, made


def _move_after(node: Node, read: Node) -> None:
    node.append(read)
    read.meta["scope"] = node.meta["scope"]


def _replace_argument(user: Node, old: Node, new: Any) -> None:
    user.args = map_arg(user.args, lambda n: new if n is old else n)
    user.kwargs = map_arg(user.kwargs, lambda n: new if n is old else n)


def prefer_new_tensors(graph: Graph, unknown: frozenset[str] = frozenset()) -> None:
    """Write `x += y` as `x + y` where nothing reads x, or its memory, afterwards.

    unknown: paths of modules that may give back the memory of their arguments in evaluation only,
    as dropout does. The results are the same bit for bit; without the write, x may cross a cut
    without a copy.
    """
    place = {node: index for index, node in enumerate(graph.nodes)}
    sharing: dict[str, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op != "output":
            sharing[node.meta["base"]].append(node)
    for node in graph.nodes:
        if node.target not in IN_PLACE or node.meta["tensor"] is None or node.meta["alias"]:
            continue
        same = sharing[node.meta["base"]]
        older = [n for n in same if place[n] < place[node]]
        users = [u for n in older for u in n.users]
        users += [v for u in users if u.meta.get("random") or u.target in unknown for v in u.users]
        if _keeps_dtype(node) and not any(place[user] > place[node] for user in users):
            node.target = IN_PLACE[node.target]
            node.meta["mutates"] = ()
            sharing[node.name] = same[len(older) :]
            for newer in sharing[node.name]:
                newer.meta["base"] = node.name


def _keeps_dtype(node: Node) -> bool:
    """Whether both operands have the dtype of the result, so that writing it converts nothing."""
    dtypes = {n.meta["tensor"].dtype for n in node.all_input_nodes if n.meta["tensor"] is not None}
    numbers = all(isinstance(arg, (Node, int, float)) for arg in node.args)
    is_float = node.meta["tensor"].dtype.startswith(("float", "bfloat"))
    only_tensors = all(isinstance(arg, Node) and arg.meta["tensor"] for arg in node.args)
    return dtypes == {node.meta["tensor"].dtype} and (only_tensors or (numbers and is_float))


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
