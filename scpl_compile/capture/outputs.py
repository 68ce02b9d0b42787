"""Of a model with several outputs: the graph of one of them."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg

from scpl_compile.capture.captured import Capture
from scpl_compile.ir import TensorMeta
from scpl_compile.sources.outputs import OutputPath, Structure, output_structure, pick_output

__all__ = ["keep_output", "outputs_of"]


def outputs_of(capture: Capture) -> Structure:
    """What the model gives, with its dicts and tuples."""

    def described(value: Any) -> TensorMeta | None:
        meta: TensorMeta | None = value.meta["tensor"] if isinstance(value, Node) else None
        return meta

    return output_structure(_returned(capture.graph.output_node().args[0]), described)


def _returned(output: Any) -> Any:
    """`output` with a dict in place of every node that makes a named tuple or a dataclass."""
    made = output.target if isinstance(output, Node) else None
    if isinstance(output, Node) and isinstance(made, type):
        names = getattr(made, "_fields", None)
        if names is None and is_dataclass(made):
            names = [field.name for field in fields(made)]
        given = {**dict(zip(names or (), output.args, strict=False)), **output.kwargs}
        return {name: _returned(value) for name, value in given.items()} if names else output
    if isinstance(output, dict):
        return {name: _returned(value) for name, value in output.items()}
    if isinstance(output, (tuple, list)):
        return [_returned(value) for value in output]
    return output


def keep_output(capture: Capture, path: OutputPath) -> Capture:
    """Let the graph give what lies at `path` of its outputs and nothing else; the graph is changed.

    What only other outputs needed is removed, unless leaving it out would show: random numbers,
    running statistics, writes in place. So the rest computes bit for bit what it did.
    """
    graph = capture.graph
    output = graph.output_node()
    chosen = pick_output(_returned(output.args[0]), path)
    dropped = set(output.all_input_nodes) - {chosen}
    output.args = (chosen,)
    if dropped:
        live = _live(capture)
        for node in reversed(graph.nodes):
            if node not in live:
                graph.erase_node(node)
    return replace(capture, outputs=(chosen.name,))


def _live(capture: Capture) -> set[Node]:
    """The nodes that must stay.

    With a node that stays so do the arguments of the module calls around it: the call may yet be
    written as one.
    """
    pending = [n for n in capture.graph.nodes if n.op in ("output", "placeholder")]
    pending += [n for n in capture.compute_nodes if _shows(capture, n)]
    live: set[Node] = set()
    known: set[str] = set()
    while pending:
        node = pending.pop()
        if node in live:
            continue
        live.add(node)
        pending += node.all_input_nodes
        for key in set(node.meta["scope"]) - known:
            known.add(key)
            call = capture.calls[key]
            pending += _nodes((call.args, dict(call.kwargs)))
    return live


def _nodes(value: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(value, found.append)
    return found


def _shows(capture: Capture, node: Node) -> bool:
    """Whether running this node has an effect besides its value."""
    if node.meta["random"] or node.meta["mutates"]:
        return True
    if node.op != "call_module":
        return False
    module = capture.model.get_submodule(str(node.target))
    is_opaque = str(node.target) in {path for path, _ in capture.opaque}
    return is_opaque or any(True for _ in module.buffers())
