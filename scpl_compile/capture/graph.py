"""Where a captured graph may be cut, what crosses there, and what must stay together."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isinf

import networkx as nx
import torch
from torch import nn
from torch.fx import Node

from scpl_compile.capture.captured import Capture

__all__ = ["CutCandidate", "cut_candidates", "node_parameters", "tied_groups", "trained_nodes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CutCandidate:
    """The boundary after one node, in the order of execution.

    index: of that node in `compute_nodes`; after: its name.
    crossing: names of the tensors made at or before it that are used after it, in the order they
    were made. inputs: names of the model's inputs that are read after it.
    reason: why there can be no cut here, "" if there can.
    """

    index: int
    after: str
    crossing: tuple[str, ...]
    inputs: tuple[str, ...]
    reason: str

    @property
    def allowed(self) -> bool:
        """Whether a cut may be here."""
        return not self.reason


def cut_candidates(capture: Capture) -> list[CutCandidate]:
    """One candidate per boundary between two compute nodes, in one sweep over the graph.

    A cut is refused where something other than a tensor would cross (a shape that any stage can
    compute again does not count) or one whose size depends on data, where a gradient-carrying
    tensor is a parameter or complex, where none with a batch dimension crosses (the nodes before
    could not be trained), and where two crossing tensors share memory that is written later. A
    gradient-carrying tensor without a batch dimension (a position bias that every layer adds)
    crosses beside others: no local loss reads it, so one that does must depend on it.
    """
    nodes = capture.compute_nodes
    last_use = _last_uses(capture)
    writes = _writes(capture)
    sources = _batchless_sources(capture)
    live = [n for n in last_use if n.op == "placeholder"]
    candidates = []
    for index, node in enumerate(nodes[:-1]):
        live = [n for n in (*live, node) if last_use.get(n, -1) > index]
        crossing = [n for n in live if n.op != "placeholder" and "recipe" not in n.meta]
        inputs = [n for n in live if n.op == "placeholder"]
        candidates.append(
            CutCandidate(
                index=index,
                after=node.name,
                crossing=tuple(n.name for n in crossing),
                inputs=tuple(n.name for n in inputs),
                reason=_refusal(index, crossing, inputs, writes, sources),
            )
        )
    return candidates


def tied_groups(capture: Capture) -> dict[str, str]:
    """Nodes that must be in one stage, because they share parameters or buffers that are written,
    or draw from one generator that is an attribute.

    Gives node name -> name of the first tensor that its group shares, by all its names
    ("wte.weight = head.weight"). Nodes that share nothing are absent.
    """
    holders: dict[str, list[str]] = defaultdict(list)
    for held in (node_parameters(capture), _node_buffers(capture), _node_generators(capture)):
        for node, names in held.items():
            for name in names:
                holders[name].append(node)
    links = nx.Graph()
    for name, nodes in holders.items():
        links.add_edges_from(((node, nodes[0]) for node in nodes[1:]), shared=name)
    groups: dict[str, str] = {}
    for members in nx.connected_components(links):
        order = [n.name for n in capture.compute_nodes if n.name in members]
        shared = [name for name, nodes in holders.items() if len(nodes) > 1 and nodes[0] in members]
        groups |= dict.fromkeys(order, " = ".join(_all_names(capture.model, shared[0])))
    return groups


def _all_names(model: nn.Module, name: str) -> list[str]:
    """The names of a parameter, `name` first."""
    known = dict(model.named_parameters(remove_duplicate=False))
    return [name, *(other for other, p in known.items() if other != name and p is known.get(name))]


def node_parameters(capture: Capture) -> dict[str, tuple[str, ...]]:
    """Names of the parameters that each compute node uses (a tied one by its first name)."""
    names = {id(p): name for name, p in capture.model.named_parameters()}
    return {
        node.name: tuple(dict.fromkeys(names[id(p)] for p in _parameters(capture.model, node)))
        for node in capture.compute_nodes
    }


def trained_nodes(capture: Capture) -> set[str]:
    """Names of the compute nodes that a gradient of the output reaches.

    The others are dead ends (a head whose result is dropped, a module called for its side effect
    alone): a stage of these would have no loss.
    """
    writers: dict[str, list[Node]] = defaultdict(list)
    bases = {n.name: n.meta["base"] for n in capture.graph.nodes if n.op != "output"}
    for node in capture.compute_nodes:
        for name in node.meta["mutates"]:
            writers[bases[name]].append(node)
    found: set[Node] = set()
    pending = list(capture.graph.output_node().all_input_nodes)
    while pending:
        node = pending.pop()
        if node not in found and _passes_gradient(node):
            found.add(node)
            pending += [*node.all_input_nodes, *writers[node.meta["base"]]]
    return {node.name for node in capture.compute_nodes if node in found}


def _passes_gradient(node: Node) -> bool:
    """Whether a gradient may go through; what is left out at random may only seem not to."""
    meta = node.meta["tensor"]
    if meta is None:
        return "recipe" not in node.meta
    return bool(meta.requires_grad or node.meta["random"])


def _parameters(model: nn.Module, node: Node) -> Iterator[nn.Parameter]:
    if node.op == "call_module":
        yield from model.get_submodule(str(node.target)).parameters()
    for source in node.all_input_nodes:
        if source.op == "get_attr" and source.meta["alias"] == "parameter":
            yield model.get_parameter(str(source.target))


def _node_buffers(capture: Capture) -> dict[str, tuple[str, ...]]:
    """Names of the buffers that must have one owner: of modules, and those written by nodes."""
    names = {id(b): name for name, b in capture.model.named_buffers()}
    written = _writes(capture)
    held = {}
    for node in capture.compute_nodes:
        read = [n for n in node.all_input_nodes if n.op == "get_attr"]
        held[node.name] = tuple(
            str(n.target) for n in read if n.meta["alias"] == "buffer" and n.meta["base"] in written
        )
        if node.op == "call_module":
            module = capture.model.get_submodule(str(node.target))
            held[node.name] += tuple(names[id(b)] for b in module.buffers())
    return held


def _node_generators(capture: Capture) -> dict[str, tuple[str, ...]]:
    """Names of the generators that modules have: stages that share one would draw in any order."""
    names: dict[int, str] = {}
    for path, module in capture.model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Generator):
                names.setdefault(id(value), f"{path}.{name}".lstrip("."))
    if not names:
        return {}
    held = {}
    for node in capture.graph.find_nodes(op="call_module"):
        parts = capture.model.get_submodule(str(node.target)).modules()
        values = [value for part in parts for value in vars(part).values()]
        held[node.name] = tuple(names[id(v)] for v in values if id(v) in names)
    return held


def _last_uses(capture: Capture) -> dict[Node, int]:
    """Index of the last compute node that uses each value; the number of nodes for outputs."""
    last: dict[Node, int] = {}
    users = [*capture.compute_nodes, *capture.graph.find_nodes(op="output")]
    for index, user in enumerate(users):
        last |= dict.fromkeys(user.all_input_nodes, index)
    return {node: index for node, index in last.items() if node.op != "get_attr"}


def _writes(capture: Capture) -> dict[str, tuple[int, ...]]:
    """For each piece of memory (by `base`): indices of the nodes that write it in place."""
    bases = {n.name: n.meta["base"] for n in capture.graph.nodes if n.op != "output"}
    writes: dict[str, list[int]] = defaultdict(list)
    for index, node in enumerate(capture.compute_nodes):
        for name in node.meta["mutates"]:
            writes[bases[name]].append(index)
    return {base: tuple(indices) for base, indices in writes.items()}


def _carries_gradient(node: Node) -> bool:
    meta = node.meta["tensor"]
    return meta is not None and meta.requires_grad and meta.nbytes > 0


def _has_infinity(node: Node) -> bool:
    """Whether a constant argument is infinite (F.pad(x, …, value=-inf) before a max pool)."""
    return any(isinstance(a, float) and isinf(a) for a in (*node.args, *node.kwargs.values()))


def _batchless_sources(capture: Capture) -> dict[Node, frozenset[Node]]:
    """For each compute node the gradient-carrying nodes without a batch that it depends on."""
    sources: dict[Node, frozenset[Node]] = {}
    for node in capture.compute_nodes:
        found = frozenset().union(*(sources.get(n, frozenset()) for n in node.all_input_nodes))
        if _carries_gradient(node) and node.meta["tensor"].batch_dim is None:
            found |= {node}
        sources[node] = found
    return sources


def _refusal(
    index: int,
    crossing: list[Node],
    inputs: list[Node],
    writes: Mapping[str, tuple[int, ...]],
    sources: Mapping[Node, frozenset[Node]],
) -> str:
    """Why there can be no cut after node `index`, or ""."""
    batchless = []
    trained: frozenset[Node] | None = None
    for node in crossing:
        meta = node.meta["tensor"]
        if meta is None:
            return f"{node.name} is not a tensor"
        if "varies" in node.meta:
            return f"the size of {node.name} depends on data"
        if not meta.requires_grad:
            continue
        if node.meta["alias"] == "parameter":
            return f"{node.name} is a parameter"
        if meta.dtype.startswith("complex"):
            return f"{node.name} is complex, which no local loss reads"
        if _has_infinity(node):
            return f"{node.name} holds infinities, which no local loss can read"
        if meta.batch_dim is None:
            batchless.append(node)
        else:
            trained = (trained or frozenset()) | sources[node]
    for node in batchless:
        if node not in (trained or ()):
            shape = "x".join(map(str, node.meta["tensor"].shape))
            return f"{node.name} has no batch dimension: {shape}"
    if trained is None:
        return "no tensor with a gradient crosses"
    for node in inputs:
        if writes.get(node.name, (index + 1,))[0] <= index:
            return f"{node.name} is read again after it was written in place"
    owner: dict[str, str] = {}
    for node in (*crossing, *inputs):
        base = node.meta["base"]
        if base in owner and writes.get(base, (0,))[-1] > index:
            return f"{owner[base]} and {node.name} share memory that is written later"
        owner[base] = node.name
    return ""
