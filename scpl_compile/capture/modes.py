"""Tracing a model in train() and eval() until both give one graph.

Functional code that reads `self.training` (F.dropout(training=self.training), `if self.training:`)
would be frozen as it was while tracing. Where the two graphs differ, the innermost opened module
whose own code made the difference is kept whole. It stays open if only constants differ, which
become Switches; so it is with the model's own forward, where anything else that differs is refused.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from scpl_compile.capture.captured import Switch
from scpl_compile.capture.on_data import run_once
from scpl_compile.capture.opening import Trace
from scpl_compile.capture.pure import is_pure
from scpl_compile.capture.state import preserved
from scpl_compile.errors import TraceError
from scpl_compile.ir import InputSpec

__all__ = ["trace"]

_READS_TRAINING = "depends on self.training"
_CONSTANTS = (bool, int, float, str, type(None))

Scope = tuple[str, ...]
TraceMode = Callable[[nn.Module, tuple[InputSpec, ...], dict[str, str], bool], Trace]
"""(model, inputs, opaque, training) -> Trace: a frontend."""


def trace(
    model: nn.Module,
    inputs: tuple[InputSpec, ...],
    trace_mode: TraceMode,
    second_call: bool = False,
) -> tuple[Trace, tuple[tuple[str, str], ...]]:
    """Trace `model`; give the graph of its nodes and the modules kept whole, with the reasons.

    inputs: by names of forward's parameters; the others keep their defaults.
    trace_mode: the frontend (tracer.trace_mode, recorder.record_mode).
    second_call: the model runs once before, on random data, so that what only its first call sets
    (a flag, hooks) stands in no one's way; verify compares with the model as it was.
    The model is left bit for bit as it was, and so are the random states.

    Raises:
        CaptureError: the model's own forward cannot be traced, or the inputs do not fit it.
    """
    opaque: dict[str, str] = {}
    with preserved(model):
        if second_call:
            run_once(model, inputs)
        found = _trace_both(model, inputs, trace_mode, opaque)
    _remove_dead_nodes(found)
    called = dict.fromkeys(str(n.target) for n in found.graph.find_nodes(op="call_module"))
    _check_modules(model, called)
    return found, tuple((path, opaque[path]) for path in called if path in opaque)


def _check_modules(model: nn.Module, paths: Iterable[str]) -> None:
    """Raises TraceError where a module exists only since the model ran."""
    for path in paths:
        try:
            model.get_submodule(path)
        except AttributeError as error:
            raise TraceError(
                f"the first call of {type(model).__name__} makes the module {path!r}: call the "
                "model once before you give it"
            ) from error


def _trace_both(
    model: nn.Module,
    inputs: tuple[InputSpec, ...],
    trace_mode: TraceMode,
    opaque: dict[str, str],
) -> Trace:
    """The graph of both modes; adds to `opaque` what must be kept whole for it."""
    while True:
        training = trace_mode(model, inputs, opaque, True)
        if _is_stale(training, opaque):
            continue
        evaluation = trace_mode(model, inputs, opaque, False)
        if _is_stale(training, opaque) or _is_stale(evaluation, opaque):
            continue
        differing = _differing_modules(training, evaluation)
        if not differing:
            return training
        opaque |= dict.fromkeys(differing, _READS_TRAINING)


def _is_stale(trace: Trace, opaque: Mapping[str, str]) -> bool:
    """Whether `trace` opened a module that was found later to be kept whole."""
    return any(call.path in opaque for call in trace.calls.values())


def _differing_modules(training: Trace, evaluation: Trace) -> set[str]:
    """Paths of the modules whose own code differs between the traces; empty if none does.

    Constants that differ where that is allowed become Switch in the training graph.
    """
    own_training, own_evaluation = _own_code(training.graph), _own_code(evaluation.graph)
    if idle := _idle_in_one(training, evaluation, own_training, own_evaluation):
        return idle
    scopes = {
        scope
        for scope in own_training.keys() & own_evaluation.keys()
        if scope
        and own_training[scope] != own_evaluation[scope]
        and not _differs_in_constants(own_training[scope], own_evaluation[scope])
    }
    if not scopes:
        pairs = list(zip_longest(own_training[()], own_evaluation[()], fillvalue=("", "its end")))
        for one, other in pairs:
            if one[:2] != other[:2]:
                raise _root_error(one[1] if one[0] else other[1])
        scopes = _switch_constants(training.graph, evaluation.graph)
        scopes = scopes or _differing_wiring(training.graph, evaluation.graph)
    return {training.calls[scope[-1]].path for scope in scopes}


def _idle_in_one(
    training: Trace,
    evaluation: Trace,
    own_training: Mapping[Scope, list[Any]],
    own_evaluation: Mapping[Scope, list[Any]],
) -> set[str]:
    """Paths of the modules that both modes call and that compute something in one of them only.

    Stochastic depth gives back what it was given in evaluation: it, not the block around it.
    """
    return {
        training.calls[scope[-1]].path
        for scope in own_training.keys() ^ own_evaluation.keys()
        for own in (own_training.get(scope) or own_evaluation[scope],)
        if scope[-1] in training.calls.keys() & evaluation.calls.keys()
        and any(entry[0] != "call" for entry in own)
    }


def _root_error(target: Any) -> TraceError:
    name = getattr(target, "__name__", target)
    return TraceError(
        f"the forward of the model itself depends on self.training (at {name}): move that code "
        "into a submodule, which is then kept whole"
    )


def _differs_in_constants(one: list[Any], other: list[Any]) -> bool:
    """Whether a module makes the same nodes and calls in both modes."""
    return [entry[:2] for entry in one] == [entry[:2] for entry in other]


def _switch_constants(training: Graph, evaluation: Graph) -> set[Scope]:
    """Let constants that differ depend on the mode; the graphs have the same nodes.

    Gives the scopes where something differs that is no constant.
    """
    scopes: set[Scope] = set()
    for one, other in zip(training.nodes, evaluation.nodes, strict=True):
        try:
            args = _merged(one.args, other.args, one)
            one.args, one.kwargs = args, _merged(one.kwargs, other.kwargs, one)
        except TraceError:
            if not one.meta["scope"]:
                raise
            scopes.add(one.meta["scope"])
    return scopes


def _merged(one: Any, other: Any, node: Node) -> Any:
    if isinstance(one, Node) and isinstance(other, Node):
        return one
    if isinstance(one, slice) and isinstance(other, slice):
        parts = ((one.start, other.start), (one.stop, other.stop), (one.step, other.step))
        return slice(*(_merged(a, b, node) for a, b in parts))
    if isinstance(one, (tuple, list)) and len(one) == len(other):
        items = [_merged(a, b, node) for a, b in zip(one, other, strict=True)]
        return tuple(items) if isinstance(one, tuple) else items
    if isinstance(one, dict) and one.keys() == other.keys():
        return {key: _merged(one[key], other[key], node) for key in one}
    if one == other:
        return one
    if not isinstance(one, _CONSTANTS) or not isinstance(other, _CONSTANTS):
        raise _root_error(node.target)
    return Switch(training=one, evaluation=other)


def _own_code(graph: Graph) -> dict[Scope, list[Any]]:
    """What each module call does itself: its nodes without their inputs, and its inner calls."""
    own: dict[Scope, list[Any]] = defaultdict(list)
    for node in graph.nodes:
        scope: Scope = node.meta["scope"]
        for depth, key in enumerate(scope):
            if own[scope[:depth]][-1:] != [("call", key)]:
                own[scope[:depth]].append(("call", key))
        arguments = map_arg((node.args, node.kwargs), lambda _: "node")
        own[scope].append((node.op, node.target, repr(arguments)))
    return own


def _differing_wiring(training: Graph, evaluation: Graph) -> set[Scope]:
    """The scope of the first node whose inputs come from other nodes in the other graph.

    Where both inputs were made inside one module (`return a if self.training else b`), it is that
    module's scope.

    Raises:
        CaptureError: it is the model's own forward.
    """
    place = {n: i for graph in (training, evaluation) for i, n in enumerate(graph.nodes)}
    for one, other in zip(training.nodes, evaluation.nodes, strict=True):
        for a, b in zip(_inputs(one), _inputs(other), strict=True):
            if place[a] != place[b]:
                common = _common(a.meta["scope"], b.meta["scope"])
                scope = max(common, one.meta["scope"], key=len)
                if not scope:
                    raise _root_error(one.target)
                return {scope}
    return set()


def _inputs(node: Node) -> list[Node]:
    """The nodes among the arguments, each as often as it is there."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _common(a: Scope, b: Scope) -> Scope:
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return a[:length] if length is not None else min(a, b, key=len)


def _remove_dead_nodes(trace: Trace) -> None:
    """Remove what nothing uses and checks of shapes; what a module was given stays."""
    given: set[Node] = set()
    for call in trace.calls.values():
        map_arg((call.args, dict(call.kwargs)), given.add)
    for node in reversed(trace.graph.nodes):
        if not node.users and node not in given and (is_pure(node) or _is_shape_check(node)):
            trace.graph.erase_node(node)


def _is_shape_check(node: Node) -> bool:
    """Whether `node` asserts something about sizes alone, which capture has seen to hold."""
    return node.target is torch._assert and _is_of_sizes(node.args[0])


def _is_of_sizes(value: Any) -> bool:
    """Whether `value` is a constant, a size, or computed from these."""
    if not isinstance(value, Node):
        return True
    if any("varies" in source.meta for source in value.all_input_nodes):
        return False
    if value.op == "call_method":
        return value.target in ("size", "dim", "numel")
    if value.target is getattr:
        return value.args[1] in ("shape", "ndim")
    is_operator = getattr(value.target, "__module__", "") == "_operator"
    return is_operator and bool(value.args) and all(map(_is_of_sizes, value.args))
