"""The best that a model's own leaf modules allow, whatever graph the compiler took of it.

The model runs once in training mode on fake tensors, and every operation is charged to the module
in whose forward it ran. A leaf module (one without children) is an item; operations outside leaf
modules belong to the leaf that follows them, the last ones to the last leaf. The least possible
cost of the costliest of K stages is then the best cut of that chain of items, validity of cuts and
heads left out. A module that the compiler keeps whole is many items here, so a plan cannot look
good because its graph is coarse.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from scpl_compile.capture.quiet import quiet
from scpl_compile.capture.record import Op, OpRecorder
from scpl_compile.capture.state import preserved
from scpl_compile.cost import DEVICES, op_work
from scpl_compile.inputs import example_inputs
from scpl_compile.ir import InputSpec

__all__ = ["Piece", "best_max_us", "item_costs", "opaque_share", "pieces_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Operations that ran one after another in the forward of one module.

    path: of that module. is_leaf: it has no children. call: counts the calls of leaf modules.
    cost_us: forward and backward, by the formulas of scpl_compile.cost.
    """

    path: str
    is_leaf: bool
    call: int
    cost_us: float


def pieces_of(model: nn.Module, inputs: Sequence[InputSpec], batch_size: int) -> tuple[Piece, ...]:
    """What `model` does on a batch, in order; on real random inputs where it looks at data."""
    try:
        return _Run(model).on(inputs, batch_size, fake=True)
    except Exception:  # code that reads data fails on fake tensors in many ways
        return _Run(model).on(inputs, batch_size, fake=False)


class _Run:
    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
        self._stack = [("", False)]
        self._recorder = OpRecorder()
        self._pieces: list[Piece] = []
        self._calls = 0

    def on(self, inputs: Sequence[InputSpec], batch_size: int, *, fake: bool) -> tuple[Piece, ...]:
        mode: Any = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
        with preserved(self._model), torch.enable_grad(), mode:
            self._model.train()
            feed = _fake_inputs(inputs, batch_size) if fake else example_inputs(inputs, batch_size)
            named = {spec.name: tensor for spec, tensor in zip(inputs, feed, strict=True)}
            with quiet(), self._watching(), self._recorder:
                self._model(**named)
        self._flush()
        return tuple(self._pieces)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        before = register_module_forward_pre_hook(self._enter)
        after = register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._flush()
        is_leaf = next(module.children(), None) is None
        self._calls += is_leaf
        self._stack.append((self._paths.get(id(module), self._stack[-1][0]), is_leaf))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._flush(isinstance(output, torch.Tensor) and output.requires_grad)
        self._stack.pop()

    def _flush(self, has_gradient: bool = False) -> None:
        path, is_leaf = self._stack[-1]
        ops, self._recorder.ops = self._recorder.ops, []
        if ops:
            cost_us = sum(map(_op_us, ops))
            if is_leaf and has_gradient and not any(op.has_backward for op in ops):
                cost_us *= 3  # a custom autograd.Function, for which the cost model does the same
            piece = Piece(path=path, is_leaf=is_leaf, call=self._calls, cost_us=cost_us)
            self._pieces.append(piece)


def _fake_inputs(inputs: Sequence[InputSpec], batch_size: int) -> list[torch.Tensor]:
    return [torch.empty((batch_size, *s.shape), dtype=getattr(torch, s.dtype)) for s in inputs]


def _op_us(op: Op) -> float:
    work = op_work(op)
    return work.forward_us(DEVICES["cpu"]) + work.backward_us(DEVICES["cpu"])


def item_costs(pieces: Sequence[Piece]) -> list[float]:
    """The cost of every call of a leaf module, with the operations before it that are in none."""
    items: list[float] = []
    waiting_us, last_call = 0.0, 0
    for piece in pieces:
        if not piece.is_leaf:
            waiting_us += piece.cost_us
        elif piece.call == last_call:
            items[-1] += piece.cost_us
        else:
            items.append(waiting_us + piece.cost_us)
            waiting_us, last_call = 0.0, piece.call
    if waiting_us:
        items = [*items[:-1], (items[-1] if items else 0.0) + waiting_us]
    return items


def opaque_share(pieces: Sequence[Piece], opaque: Sequence[str]) -> float:
    """Which share of the cost lies in the modules with these paths: 0.05 is 5 %."""
    total_us = sum(piece.cost_us for piece in pieces)
    closed = tuple(f"{path}." if path else "" for path in opaque)
    inside_us = sum(p.cost_us for p in pieces if f"{p.path}.".startswith(closed)) if closed else 0
    return inside_us / total_us if total_us else 0.0


def best_max_us(items: Sequence[float], num_stages: int) -> float:
    """The least cost of the costliest of `num_stages` consecutive runs of items."""
    before = np.concatenate([[0.0], np.cumsum(items)])
    best = before.copy()  # of one stage: everything up to each place
    for _ in range(num_stages - 1):
        best = np.array([
            np.maximum(best[: end + 1], before[end] - before[: end + 1]).min()
            for end in range(len(before))
        ])  # fmt: skip
    return float(best[-1])
