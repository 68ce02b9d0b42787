"""Which modules are opened, and why one is closed again: what both frontends share."""

import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.fx import Graph
from torch.nn.utils.parametrize import is_parametrized

from scpl_compile.capture.captured import ModuleCall
from scpl_compile.capture.state import ModelState, RandomState
from scpl_compile.errors import CaptureError, TraceError
from scpl_compile.ir import InputSpec

__all__ = [
    "LOOKS_AT_DATA",
    "Frame",
    "Trace",
    "Untraceable",
    "calls_through",
    "check_model",
    "here",
    "is_library_leaf",
    "large_modules",
    "never_opened",
    "phrase",
    "place",
    "root_error",
    "single_call",
    "user_frame",
    "why_closed",
]

LOOKS_AT_DATA = "looks at the values of a tensor"

_RANDOM = "random numbers drawn in Python"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MAX_PHRASE = 120
_TORCH = Path(torch.__file__).parent
_OWN = Path(__file__).parent
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One traced graph and the module calls that were traced through, by scope key."""

    graph: Graph
    calls: Mapping[str, ModuleCall]


class Untraceable(Exception):
    """The code being traced holds something that a graph cannot express; text: a phrase."""


@dataclass(slots=True)
class Frame:
    """One opened module call: its scope key, why it must be closed again ("" so far), and whether
    modules were opened in it.

    A log record closes only a module that opens no other: an encoder whose layers cannot be parted
    is too much for a message.
    """

    key: str
    reason: str = ""
    opens: bool = False
    logs: bool = False

    def close(self, reason: str) -> None:
        """Close it because of `reason`; the first one counts."""
        if reason == "logs":
            self.logs = True
        else:
            self.reason = self.reason or reason


def is_library_leaf(module: nn.Module) -> bool:
    """Whether `module` is of torch.nn and not a container: such modules are called whole."""
    name = type(module).__module__
    library = name.startswith(("torch.nn.", "torch.ao.nn."))
    return library and not isinstance(module, _CONTAINERS)


def large_modules(model: nn.Module) -> dict[str, bool]:
    """Whether a module holds more than half of the model's parameters, by path; the model does."""
    half = sum(p.numel() for p in model.parameters()) / 2
    return {
        path: not path or sum(p.numel() for p in module.parameters()) > half
        for path, module in model.named_modules()
    }


@contextmanager
def calls_through(handler: Callable[..., Any]) -> Iterator[None]:
    """Let handler(module, torch's own __call__, args, kwargs) stand for every call of a module."""
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return handler(module, original, args, kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


def check_model(model: nn.Module, inputs: tuple[InputSpec, ...]) -> None:
    """Check that `inputs` name parameters of forward and leave none without a value.

    Raises:
        CaptureError: a name is unknown or missing; the model itself has hooks.
    """
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    kinds = {p.name: p.kind for p in parameters}
    named = {spec.name for spec in inputs}
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = [name for name, kind in kinds.items() if kind not in variable]
    if unknown := sorted(named - set(known)):
        if inspect.Parameter.VAR_KEYWORD not in kinds.values():
            raise CaptureError(
                f"--input {unknown[0]} is not a parameter of {type(model).__name__}.forward, "
                f"which takes {', '.join(known) or 'none'}"
            )
    for parameter in parameters:
        required = parameter.default is inspect.Parameter.empty and parameter.kind not in variable
        if required and parameter.name not in named:
            raise CaptureError(
                f"{type(model).__name__}.forward needs {parameter.name!r}: describe it with --input"
            )
    if any(getattr(model, hooks) for hooks in _HOOKS):
        raise CaptureError(
            f"{type(model).__name__} itself has hooks, which its stages would not run: register "
            "them on its submodules"
        )


def never_opened(module: nn.Module) -> str:
    """Why `module` must not be opened whatever its forward does, or ""."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript"
    if is_parametrized(module) and not type(module).__mro__[1].__module__.startswith("torch.nn."):
        return "parametrization"
    if not is_library_leaf(module) and any(getattr(module, hooks) for hooks in _HOOKS):
        return "hooks"
    return ""


def why_closed(frame: Frame, state: ModelState, randomness: RandomState) -> str:
    """Why what was recorded of a module cannot stand for it, "" if it can."""
    if frame.reason:
        return frame.reason
    if frame.logs and frame.key and not frame.opens:
        return "logs"
    if RandomState.now() != randomness:
        return _RANDOM
    changed = state.changed()
    return f"changes its attribute {changed!r}" if changed else ""


def single_call(model: nn.Module, inputs: tuple[InputSpec, ...]) -> Trace:
    """The graph of a model that is itself one module of torch.nn: one call of it."""
    graph = Graph()
    kwargs: dict[str, Any] = {spec.name: graph.placeholder(spec.name) for spec in inputs}
    call = graph.create_node("call_module", "", (), kwargs, name="model")
    graph.output(call)
    for node in graph.nodes:
        node.meta["scope"] = ()
    return Trace(graph=graph, calls={})


def phrase(error: BaseException) -> str:
    """One line about an exception."""
    if isinstance(error, DataDependentOutputException):
        return f"{LOOKS_AT_DATA} ({error})"
    if isinstance(error, DynamicOutputShapeException):
        return f"makes a tensor whose size depends on values ({error})"
    text = " ".join(str(error).split())
    if len(text) > _MAX_PHRASE:
        text = text[: _MAX_PHRASE - 1] + "…"
    return text if isinstance(error, Untraceable) else f"{type(error).__name__}: {text}"


def place(error: BaseException) -> str:
    """The last line outside of torch that the exception passed, as "net.py:42"."""
    files = [
        (Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)
    ]
    lines = [f"{path.name}:{line}" for path, line in files if not _is_foreign(path)]
    return lines[-1] if lines else ""


def user_frame() -> FrameType:
    """The innermost frame that is neither torch's nor ours."""
    frame = sys._getframe()
    while frame.f_back and _is_foreign(Path(frame.f_code.co_filename)):
        frame = frame.f_back
    return frame


def here(frame: FrameType) -> str:
    """Where a frame is, as "net.py:42"."""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _is_foreign(file: Path) -> bool:
    return file.is_relative_to(_TORCH) or file.is_relative_to(_OWN)


def root_error(model: nn.Module, reason: str, place: str) -> TraceError:
    at = f" at {place}" if place else ""
    return TraceError(
        f"the forward of {type(model).__name__} itself cannot be traced{at} ({reason}): "
        "move that code into a submodule, which is then kept whole"
    )
