"""Noticing constructs that run while a model is traced but leave no trace in the graph.

Tracing calls the model's Python code once. Entering autocast or no_grad, a custom backward,
checkpoint() or print() has its effect then, and is absent from the graph. Names cannot be patched
for this (`from torch.utils.checkpoint import checkpoint`, `swish = Swish.apply` hold the original
object), so every call is compared with these functions' code objects in a profile hook
(`sys.setprofile`).
"""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, Final

import torch
import torch.utils.checkpoint

__all__ = ["GRADIENT_MODES", "unwatched", "watched"]

GRADIENT_MODES: Final = frozenset({"no_grad", "enable_grad", "set_grad_enabled"})
"""What `watched` reports of a region in which gradients are recorded or not."""


def _code(function: Any) -> CodeType:
    code: CodeType = inspect.unwrap(function).__code__
    return code


_REASONS: Final = {
    _code(torch.amp.autocast_mode.autocast.__enter__): "autocast",
    _code(torch.no_grad.__enter__): "no_grad",
    _code(torch.enable_grad.__enter__): "enable_grad",
    _code(torch.set_grad_enabled.__init__): "set_grad_enabled",
    _code(torch.inference_mode.__enter__): "inference_mode",
    _code(torch.utils.checkpoint.checkpoint): "checkpoint()",
    _code(torch.autograd.graph.saved_tensors_hooks.__enter__): "saved_tensors_hooks",
    _code(torch.nn.attention.sdpa_kernel): "sdpa_kernel",
    _code(torch.random.fork_rng): "fork_rng",
    _code(logging.Logger._log): "logs",
}
# Hashing a code object walks all of it; the objects above live as long as this module.
_REASON_OF_ID: Final = {id(code): reason for code, reason in _REASONS.items()}


@contextmanager
def watched(report: Callable[[str], None]) -> Iterator[None]:
    """Call `report` with a phrase whenever one of the constructs runs in this thread."""

    def on_event(frame: FrameType, event: str, called: Any) -> None:
        if event == "call":
            if reason := _REASON_OF_ID.get(id(frame.f_code)):
                report(reason)
        elif event == "c_call" and called.__name__ == "apply" and _is_function(called.__self__):
            report("custom autograd.Function")
        elif event == "c_call" and called is print:
            report("prints")

    with _profiling(on_event):
        yield


@contextmanager
def unwatched() -> Iterator[None]:
    """Report nothing of what runs inside."""
    with _profiling(None):
        yield


@contextmanager
def _profiling(on_event: Callable[[FrameType, str, Any], None] | None) -> Iterator[None]:
    previous = sys.getprofile()
    sys.setprofile(on_event)
    try:
        yield
    finally:
        sys.setprofile(None)
        if callable(previous):
            sys.setprofile(previous)
        elif previous is not None:  # cProfile, which is no Python function
            previous.enable()


def _is_function(owner: Any) -> bool:
    return isinstance(owner, type) and issubclass(owner, torch.autograd.Function)
