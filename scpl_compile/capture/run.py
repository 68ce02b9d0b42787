"""Running a captured graph on fake tensors: what every node gives, without computing it.

A fake tensor has a shape, a dtype, memory that can be shared and a version that in-place
operations raise, but no data. Code that looks at data (`if mask.any():`, `lengths.tolist()`) cannot
run so; then the graph runs once on real random inputs.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from scpl_compile.capture.captured import Switch
from scpl_compile.capture.on_data import random_input
from scpl_compile.capture.quiet import quiet
from scpl_compile.capture.record import Op, OpRecorder
from scpl_compile.capture.state import host_random_state, preserved
from scpl_compile.capture.values import plain_tensors
from scpl_compile.errors import CaptureError
from scpl_compile.ir import InputSpec
from scpl_compile.runtime.randomness import seeded

__all__ = ["Seen", "run_graph"]

_NEEDS_DATA = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
    ZeroDivisionError,  # BatchNorm(momentum=None) divides by the batches seen, none in a fake run
)
_OWN_DICTS = ("_parameters", "_buffers", "_modules")
_MAX_TEXT = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one node did in a run.

    value: what it gave. storages: keys of the memory of the tensors in it, in order.
    alias: whose memory a tensor is ("" if fresh), see captured.py.
    mutates: names of the argument nodes whose memory it wrote. ops: the operations inside.
    draws: it changed the random state of Python or numpy.
    """

    value: Any
    storages: tuple[int, ...]
    alias: str = ""
    mutates: tuple[str, ...] = ()
    ops: tuple[Op, ...] = ()
    draws: bool = False


def run_graph(
    model: nn.Module,
    graph: Graph,
    inputs: tuple[InputSpec, ...],
    batch_size: int,
    opaque: frozenset[str],
) -> dict[Node, Seen]:
    """Run `graph` in training mode on a batch of `batch_size`; `model` stays as it was.

    opaque: paths of modules whose code is unknown: these may keep tensors and draw numbers.

    Raises:
        CaptureError: a node fails on these shapes; the message names it.
    """
    try:
        return _Run(model, inputs, batch_size, opaque, fake=True).through(graph)
    except _NodeFailed as failed:
        if not isinstance(failed.error, _NEEDS_DATA) and failed.node.target not in opaque:
            raise _error(failed, model, batch_size) from failed.error
    try:
        return _Run(model, inputs, batch_size, opaque, fake=False).through(graph)
    except _NodeFailed as failed:
        raise _error(failed, model, batch_size) from failed.error


class _NodeFailed(Exception):
    """A node raised `error` on arguments of these shapes."""

    def __init__(self, node: Node, shapes: str, error: Exception) -> None:
        super().__init__(node.name)
        self.node = node
        self.shapes = shapes
        self.error = error


class _Run:
    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[InputSpec, ...],
        batch_size: int,
        opaque: frozenset[str],
        fake: bool,
    ) -> None:
        self._model = model
        self._specs = {spec.name: spec for spec in inputs}
        self._batch_size = batch_size
        self._opaque = opaque
        self._fake = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
        self._recorder = OpRecorder()
        self._roles: dict[int, str] = {}
        # Keys of memory are addresses: what they were taken from must live as long as the run.
        self._alive: list[torch.Tensor] = []
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def through(self, graph: Graph) -> dict[Node, Seen]:
        """Run every node."""
        seen: dict[Node, Seen] = {}
        values: dict[Node, Any] = {}
        # A module that drops itself at random costs the same in every run.
        with preserved(self._model), seeded(0), torch.enable_grad():
            self._model.train()
            self._know([tensor for _, tensor in plain_tensors(self._model)], "cache")
            self._know(list(self._model.buffers()), "buffer")
            self._know(list(self._model.parameters()), "parameter")
            with quiet(), self._fake or nullcontext(), self._recorder:
                for node in graph.nodes:
                    if node.op == "output":
                        break
                    seen[node] = self._node(node, values)
                    values[node] = seen[node].value
        return seen

    def _node(self, node: Node, values: Mapping[Node, Any]) -> Seen:
        if node.op == "placeholder":
            value = self._input(self._specs[str(node.target)])
            self._know(value, "input")
            return Seen(value=value, storages=tuple(self._storages(value)), alias="input")
        if node.op == "get_attr":
            value = _attribute(self._model, str(node.target))
            return self._seen(value, None)
        args, kwargs = _filled(node.args, values), _filled(node.kwargs, values)
        versions = {n: _versions(values[n]) for n in node.all_input_nodes}
        unknown = node.op == "call_module" and node.target in self._opaque
        before = host_random_state() if unknown else None
        self._recorder.ops = []
        try:
            value = self._call(node, args, kwargs)
        except Exception as error:
            raise _NodeFailed(node, _shapes((args, kwargs)), error) from error
        return replace(
            self._seen(value, self._model.get_submodule(str(node.target)) if unknown else None),
            mutates=tuple(n.name for n, old in versions.items() if _versions(values[n]) != old),
            ops=tuple(self._recorder.ops),
            draws=unknown and before != host_random_state(),
        )

    def _seen(self, value: Any, unknown: nn.Module | None) -> Seen:
        storages = tuple(self._storages(value))
        alias = ""
        if isinstance(value, torch.Tensor):
            kept = "cache" if self._keeps(value, unknown) else ""
            alias = self._roles.get(storages[0], kept)
        return Seen(value=value, storages=storages, alias=alias)

    def _know(self, tensors: Any, role: str) -> None:
        self._roles |= dict.fromkeys(self._storages(tensors), role)

    def _call(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "call_module":
            return self._model.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target), "call_function nodes hold the function"
        return node.target(*args, **kwargs)

    def _input(self, spec: InputSpec) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, spec.dtype)
        shape = (self._batch_size, *spec.shape)
        if self._fake:
            return torch.empty(shape, dtype=dtype, device=self._device)
        return random_input(spec, self._batch_size).to(self._device)

    def _storages(self, value: Any) -> Iterator[int]:
        for tensor in _tensors(value):
            if tensor.layout is not torch.strided:
                yield id(tensor)
                continue
            if self._fake and not isinstance(tensor, FakeTensor):
                tensor = self._fake.from_tensor(tensor)
                self._alive.append(tensor)
            yield tensor.untyped_storage()._cdata

    def _keeps(self, value: torch.Tensor, module: nn.Module | None) -> bool:
        """Whether a tensor outlives the call: made before the run, or an attribute of `module`."""
        if self._fake and not isinstance(value, FakeTensor):
            return True
        if module is None:
            return False
        kept = [v for m in module.modules() for k, v in m.__dict__.items() if k not in _OWN_DICTS]
        return not set(self._storages(kept)).isdisjoint(self._storages(value))


def _filled(argument: Any, values: Mapping[Node, Any]) -> Any:
    """An argument with values for nodes, in containers that the called code may change."""
    if isinstance(argument, Node):
        return values[argument]
    if isinstance(argument, Switch):
        return argument.training
    if isinstance(argument, dict):
        return {key: _filled(item, values) for key, item in argument.items()}
    if isinstance(argument, slice):
        parts = (argument.start, argument.stop, argument.step)
        return slice(*(_filled(part, values) for part in parts))
    if isinstance(argument, (tuple, list)):
        items = [_filled(item, values) for item in argument]
        return items if isinstance(argument, list) else tuple(items)
    return argument


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _versions(value: Any) -> list[int]:
    return [tensor._version for tensor in _tensors(value)]


def _attribute(model: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(model.get_submodule(parent), name)


def _shapes(value: Any) -> str:
    tensors = _tensors(value)
    shapes = [f"{'x'.join(map(str, t.shape))} {str(t.dtype)[6:]}" for t in tensors]
    return ", ".join(shapes) or "no tensors"


def _error(failed: _NodeFailed, model: nn.Module, batch_size: int) -> CaptureError:
    node, scope = failed.node, failed.node.meta["scope"]
    if node.op == "call_module":
        kind = type(model.get_submodule(str(node.target))).__name__
        where = f"module {node.target!r} ({kind})"
    else:
        name = getattr(node.target, "__name__", node.target)
        where = f"{name} in {scope[-1] if scope else type(model).__name__ + '.forward'}"
    text = " ".join(str(failed.error).split())[:_MAX_TEXT]
    return CaptureError(
        f"{where} fails on {failed.shapes} at batch size {batch_size} "
        f"({type(failed.error).__name__}: {text}): check --input"
    )
