"""Tracing a model with torch.fx so that what tracing would lose stays inside a module call.

Modules of torch.nn are called whole. Every other module is opened; where its forward cannot be
traced, or holds something that tracing drops without an error, the nodes made since are taken
back and the module stays one opaque call. `trace_mode` does this for one of train() and eval();
modes.py compares the two.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node, Proxy, Tracer
from torch.fx.node import map_aggregate
from torch.nn.utils import rnn

from scpl_compile.capture.captured import ModuleCall
from scpl_compile.capture.opening import (
    Frame,
    Trace,
    Untraceable,
    check_model,
    is_library_leaf,
    never_opened,
    phrase,
    place,
    root_error,
    single_call,
    why_closed,
)
from scpl_compile.capture.proxies import IN_PLACE, InputProxy, ParameterProxy, ValueProxy
from scpl_compile.capture.state import ModelState, RandomState
from scpl_compile.capture.watch import watched
from scpl_compile.ir import InputSpec

__all__ = ["trace_mode"]

# Functions that become nodes although torch does not offer them to a tracer. Called with numbers
# only, the first would run once, while tracing; as nodes they run each time.
_RECORDED = {
    torch: (
        torch.arange, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.linspace,
        torch.rand, torch.randn, torch.randint, torch.randperm, torch.tensor,
    ),
    rnn: (rnn.pack_padded_sequence, rnn.pad_packed_sequence),
}  # fmt: skip


@dataclass(slots=True)
class _Mark:
    """Where tracing stood when a module was opened."""

    tail: Node
    state: ModelState
    randomness: RandomState


def trace_mode(
    model: nn.Module,
    inputs: tuple[InputSpec, ...],
    opaque: dict[str, str],
    training: bool,
) -> Trace:
    """Trace `model` in training or evaluation mode.

    opaque: path -> reason of the modules to keep whole; the modules found on the way are added,
    and then the trace must be repeated (a module may have been opened in an earlier call).
    The caller preserves the model's state.

    Raises:
        CaptureError: the model's own forward cannot be traced, or the inputs do not fit it.
    """
    model.train(training)
    check_model(model, inputs)
    if is_library_leaf(model):
        return single_call(model, inputs)
    tracer = _AutoLeafTracer(inputs, opaque)
    with watched(tracer.report):
        return tracer.run(model)


class _AutoLeafTracer(Tracer):
    """See the module docstring."""

    def __init__(self, inputs: tuple[InputSpec, ...], opaque: dict[str, str]) -> None:
        super().__init__(autowrap_modules=(math,), autowrap_functions=_RECORDED[rnn])
        self._inputs = inputs
        self._opaque = opaque
        self._frames = [Frame("")]
        self._counts: Counter[str] = Counter()
        self._calls: dict[str, ModuleCall] = {}
        self._names: dict[int, str] = {}

    # --- the whole model

    def run(self, model: nn.Module) -> Trace:
        """Trace `model`; state that its own forward changes is an error."""
        self._names = {id(b): name for name, b in model.named_buffers()}
        self._names |= {id(p): name for name, p in model.named_parameters()}
        state, randomness = ModelState.of(model), RandomState.now()
        self._state = state
        try:
            with _recorded(self):
                graph = self.trace(model)
        except Exception as error:
            raise root_error(model, phrase(error), place(error)) from error
        reason = why_closed(self._frames[0], state, randomness)
        if reason:
            raise root_error(model, reason, "")
        return Trace(graph=graph, calls=self._calls)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for the declared inputs; every other parameter keeps its default."""
        proxies = {spec.name: self._placeholder(spec) for spec in self._inputs}

        def forward(root: nn.Module) -> Any:
            return root_fn(root, **proxies)

        return forward, [self.root]

    def _placeholder(self, spec: InputSpec) -> Proxy:
        node = self.create_node("placeholder", spec.name, (), {})
        return InputProxy(node, self, spec.shape)

    # --- modules

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call `m` whole, or trace through it and take that back where it would lose something."""
        path = self.path_of_module(m)
        if path not in self._opaque and (reason := never_opened(m)):
            self._opaque[path] = reason
        if path in self._opaque or is_library_leaf(m):
            return self.create_proxy("call_module", path, args, kwargs)
        return self._open(m, path, forward, args, kwargs)

    def _open(
        self, m: nn.Module, path: str, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        mark = _Mark(
            tail=next(iter(reversed(self.graph.nodes))),
            state=self._state.part(m),
            randomness=RandomState.now(),
        )
        count = self._counts[path]
        key = f"{path}@{count}" if count else path
        self._counts[path] += 1
        given = _nodes((args, kwargs))
        frame = Frame(key)
        self._frames.append(frame)
        try:
            result = forward(*args, **kwargs)
            reason = why_closed(frame, mark.state, mark.randomness)
        except Exception as error:
            reason = frame.reason or phrase(error)
        finally:
            self._frames.pop()
        if reason:
            self._roll_back(mark)
            self._opaque[path] = reason
            return self.create_proxy("call_module", path, args, kwargs)
        self._frames[-1].opens = True
        self._calls[key] = ModuleCall(
            path=path, args=given[0], kwargs=given[1], result=_nodes(result)
        )
        return result

    def _roll_back(self, mark: _Mark) -> None:
        for node in reversed(self.graph.nodes):
            if node is mark.tail:
                break
            self.graph.erase_node(node)
        mark.state.restore()
        mark.randomness.restore()

    def report(self, reason: str) -> None:
        """Close the innermost opened module, because of `reason`."""
        self._frames[-1].close(reason)

    # --- values

    def proxy(self, node: Node) -> Proxy:
        """What stands for a node in the traced code."""
        return ValueProxy(node, self)

    def create_node(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: str | None = None,
        type_expr: Any = None,
    ) -> Node:
        """Make a node that knows the module calls around it."""
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["scope"] = tuple(frame.key for frame in self._frames[1:])
        if len(self._frames) > 1 and _writes_first_argument(kind, target):
            written = args[0] if args else None
            if isinstance(written, Node) and written.op == "get_attr":
                self.report(f"writes {written.target!r} in place")
        return node

    def create_arg(self, a: Any) -> Any:
        """A node or constant for an argument; a tensor must be a parameter or a buffer."""
        if isinstance(a, torch.Generator):
            raise Untraceable("uses a torch.Generator")
        if isinstance(a, torch.Tensor):
            if id(a) not in self._names:
                raise Untraceable("uses a tensor that is neither parameter nor buffer")
            return self.create_node("get_attr", self._names[id(a)], (), {})
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        """A fresh get_attr node each time a parameter or buffer is read.

        (Torch's own version keeps them in a cache, which rolling back would leave stale.)
        """
        name = self._names.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if name is None:
            return attr_val
        node = self.create_node("get_attr", name, (), {})
        return ParameterProxy(node, self, attr_val)


def _nodes(value: Any) -> Any:
    """`value` with the nodes in place of their proxies."""
    return map_aggregate(value, lambda item: item.node if isinstance(item, Proxy) else item)


def _writes_first_argument(kind: str, target: Any) -> bool:
    """Whether a node of this kind and target is an in-place operation, by its name."""
    if kind == "call_method":
        return target == "__setitem__" or (target.endswith("_") and not target.endswith("__"))
    if kind != "call_function":
        return False
    if getattr(target, "__module__", "") == "_operator":
        return target in IN_PLACE
    return bool(getattr(target, "__name__", "").endswith("_"))


@contextmanager
def _recorded(tracer: _AutoLeafTracer) -> Iterator[None]:
    """Let the functions of _RECORDED become nodes when they are called as torch.arange(…)."""

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: tracer.create_proxy("call_function", function, args, kwargs)

    pairs = [(owner, function) for owner, group in _RECORDED.items() for function in group]
    try:
        for owner, function in pairs:
            setattr(owner, function.__name__, recorded(function))
        yield
    finally:
        for owner, function in pairs:
            setattr(owner, function.__name__, function)
