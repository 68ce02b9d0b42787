"""Capture: a model becomes a graph that calls the model's own modules.

`capture` traces at the grain of torch.nn modules, `cut_candidates` says where the graph may be
cut, and when the cuts are chosen `coarsen` turns whole modules back into one call each.
"""

from functools import partial
from types import MappingProxyType
from typing import Final

from torch import nn
from torch.nn.parameter import is_lazy

from scpl_compile.capture.captured import BATCH, DEVICE, Capture, ModuleCall, Switch
from scpl_compile.capture.coarsen import coarsen
from scpl_compile.capture.gather import gather_shared
from scpl_compile.capture.graph import (
    CutCandidate,
    cut_candidates,
    node_parameters,
    tied_groups,
    trained_nodes,
)
from scpl_compile.capture.modes import trace
from scpl_compile.capture.normalize import (
    calls_with_parts,
    prefer_new_tensors,
    read_attributes_at_use,
    unpack_containers,
)
from scpl_compile.capture.recorder import record_mode
from scpl_compile.capture.run import run_graph
from scpl_compile.capture.shapes import annotate
from scpl_compile.capture.tracer import trace_mode
from scpl_compile.errors import CaptureError
from scpl_compile.ir import InputSpec

__all__ = [
    "BATCH",
    "DEVICE",
    "FRONTENDS",
    "Capture",
    "CutCandidate",
    "ModuleCall",
    "Switch",
    "capture",
    "coarsen",
    "cut_candidates",
    "node_parameters",
    "tied_groups",
    "trained_nodes",
]


FRONTENDS: Final = MappingProxyType(
    {
        "fx": partial(trace, trace_mode=trace_mode),
        "record": partial(trace, trace_mode=record_mode),
        "record-second-call": partial(trace, trace_mode=record_mode, second_call=True),
    }
)
"""The ways to a graph, in the order in which they are tried. The last is for models that set
attributes in their first call."""


def capture(
    model: nn.Module, inputs: tuple[InputSpec, ...], batch_size: int = 8, frontend: str = "fx"
) -> Capture:
    """Trace `model` and find what every node of its graph gives.

    inputs: one per parameter of forward that is fed; their names are the parameters' names.
    batch_size: of the shapes that are reported (samples). frontend: a key of FRONTENDS.
    `model` and the global random states are left bit for bit as they were.

    Raises:
        CaptureError: the model's own forward cannot be traced, or fails on these inputs.
    """
    if frontend not in FRONTENDS:
        raise CaptureError(
            f"there is no frontend {frontend!r}; it is one of {', '.join(FRONTENDS)}"
        )
    if batch_size < 2:
        raise CaptureError(f"the batch size is {batch_size}: capture needs at least 2 samples")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise CaptureError(f"{name} has no shape yet: run the model once, then capture it")
    traced, opaque = FRONTENDS[frontend](model, inputs)
    graph = traced.graph
    read_attributes_at_use(graph)
    unknown = frozenset(path for path, _ in opaque)
    first = run_graph(model, graph, inputs, batch_size, unknown)
    parts = unpack_containers(graph, {node: seen.value for node, seen in first.items()})
    if parts:
        first = run_graph(model, graph, inputs, batch_size, unknown)
    second = run_graph(model, graph, inputs, batch_size + 1, unknown)
    annotate(graph, first, second, batch_size)
    prefer_new_tensors(graph, unknown)
    captured = Capture(
        model=model,
        graph=graph,
        frontend=frontend,
        opaque=opaque,
        inputs=inputs,
        outputs=tuple(n.name for n in graph.find_nodes(op="output")[0].all_input_nodes),
        batch_size=batch_size,
        calls=calls_with_parts(traced.calls, parts),
    )
    gather_shared(captured)
    return captured
