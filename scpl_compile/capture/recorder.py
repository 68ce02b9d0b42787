"""The second frontend: a model runs once on fake tensors, and what it does is written down.

The fx tracer hands the model's code stand-ins for tensors, and code that asks these for more than
they know (`**kwargs` that are passed on, a mask whose shape decides what is built) fails. Here the
code gets tensors without data (torch's FakeTensor), so all of it runs, and two things are recorded:
the calls of modules, and between them the calls of torch's functions, as the user wrote them::

    bert.embeddings(input_ids)          call_module    of a module that stays whole
    bert.encoder.layer.0(x, mask)         opened: what happens inside is recorded
    torch.cat([cls, x], 1)              call_function
    x.size(0) * 4                       the batch is a symbol: becomes size(input, 0) * 4

The batch size is a symbol (torch's ShapeEnv, the machinery of torch.export), the other sizes are
numbers. Code that looks at data raises, code that branches on the batch size is noticed: as in the
fx tracer, the module where that happens is then taken back and kept whole. Only where most of the
model is in that module, numbers that depend on data are followed too: what only makes sure of
something (`assert lengths.max() <= n`) is recorded as torch._assert. Unlike a graph of
torch.export, which consists of aten operations, this one says `F.softmax(x, -1)` where the user
did, and knows with which arguments each module was called.
"""

import dataclasses
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from sympy.logic.boolalg import Boolean  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from scpl_compile.capture.arguments import without_defaults
from scpl_compile.capture.bindings import WRITES_UNDER_NO_GRAD, Bindings
from scpl_compile.capture.captured import ModuleCall
from scpl_compile.capture.claims import claimed_answer
from scpl_compile.capture.on_data import at_any_batch_size, run_on_data
from scpl_compile.capture.opening import (
    LOOKS_AT_DATA,
    Frame,
    Trace,
    Untraceable,
    calls_through,
    check_model,
    here,
    is_library_leaf,
    large_modules,
    never_opened,
    phrase,
    place,
    root_error,
    single_call,
    user_frame,
    why_closed,
)
from scpl_compile.capture.quiet import quiet
from scpl_compile.capture.state import ModelState, RandomState
from scpl_compile.capture.symbols import BatchSymbols, data_symbols
from scpl_compile.capture.torch_calls import property_name, torch_call, writes_first_argument
from scpl_compile.capture.values import (
    is_alike,
    only_nodes,
    plain_fields,
    plain_tensors,
)
from scpl_compile.capture.watch import GRADIENT_MODES, unwatched, watched
from scpl_compile.ir import InputSpec

__all__ = ["record_mode"]


def record_mode(
    model: nn.Module,
    inputs: tuple[InputSpec, ...],
    opaque: dict[str, str],
    training: bool,
    batch_size: int = 8,
) -> Trace:
    """Record `model` in training or evaluation mode; arguments and result as tracer.trace_mode.

    Raises:
        CaptureError: the model's own forward cannot be recorded, or the inputs do not fit it.
    """
    model.train(training)
    check_model(model, inputs)
    if is_library_leaf(model):
        return single_call(model, inputs)
    return _Recorder(model, inputs, opaque, batch_size).run()


@dataclasses.dataclass(slots=True)
class _Mark:
    """Where recording stood when a module was opened."""

    values: tuple[Node, int, int]
    state: ModelState
    randomness: RandomState


class _Recorder(TorchFunctionMode):
    """See the module docstring."""

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[InputSpec, ...],
        opaque: dict[str, str],
        batch_size: int,
    ) -> None:
        super().__init__()
        self._model = model
        self._inputs = inputs
        self._opaque = opaque
        self._batch_size = batch_size
        self._frames = [Frame("")]
        self._values = Bindings(model, self._frames, self._quietly)
        self._counts: Counter[str] = Counter()
        self._calls: dict[str, ModuleCall] = {}
        self._guess = ""
        self._asked_data = False
        self._symbols = BatchSymbols(self._on_guess, self._on_data)
        self._fake = FakeTensorMode(shape_env=self._symbols, allow_non_fake_inputs=True)
        self._fake.cache_enabled = False  # what it remembers of a call, it asks nothing about
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._paths = {id(m): path for path, m in model.named_modules()}
        self._plain = list(plain_tensors(model))
        self._is_large = large_modules(model)
        self._is_paused = False

    # --- the whole model

    def run(self) -> Trace:
        """Record the model's forward on the declared inputs."""
        model = self._model
        with quiet(), self._fake:
            values = {spec.name: self._placeholder(spec) for spec in self._inputs}
        self._values.finish_inputs()
        self._state = ModelState.of(model)
        mark = self._mark(model)
        try:
            with quiet(), self._fake, watched(self.report), calls_through(self.call_module), self:
                result = model.forward(**values)
            reason = self._why_closed(self._frames[0], mark)
        except Exception as error:
            reason = self._frames[0].reason
            raise root_error(model, reason or phrase(error), place(error)) from error
        if reason:
            raise root_error(model, reason, "")
        outputs = only_nodes(self._values.nodes(plain_fields(result)))
        self._values.node("output", "output", (outputs,), {})
        return Trace(graph=self._values.graph, calls=self._calls)

    def _placeholder(self, spec: InputSpec) -> Tensor:
        """A fake tensor (batch, *shape) whose first size is the symbol of the batch."""
        shape = (self._batch_size, *spec.shape)
        sizes = [DimDynamic.DUCK, *(DimDynamic.STATIC for _ in spec.shape)]
        with unset_fake_temporarily():
            real = torch.empty(shape, dtype=getattr(torch, spec.dtype), device=self._device)
        value = self._fake.from_tensor(
            real, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)
        )
        node = self._values.graph.placeholder(spec.name)
        self._values.bind(value, node)
        return value

    # --- modules

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Call `m` whole, or record what it does and take that back where it would lose something.

        forward: m.__call__ as torch defines it.
        """
        if self._is_paused:
            return forward(m, *args, **kwargs)
        path = self._paths.get(id(m))
        if path is None:  # made in forward, or held in a list: it has no name to be called by
            if next(m.parameters(), None) is not None or next(m.buffers(), None) is not None:
                raise Untraceable(f"calls a {type(m).__name__} that is no submodule of the model")
            return forward(m, *args, **kwargs)
        if path not in self._opaque and (reason := never_opened(m)):
            self._opaque[path] = reason
        how = self._call_whole if path in self._opaque or is_library_leaf(m) else self._open
        return how(m, path, forward, args, kwargs)

    def _call_whole(
        self, m: nn.Module, path: str, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        given = without_defaults(m, tuple(args), kwargs)
        tracked = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        versions = [t._version for t in tracked if t.requires_grad]
        node_args = self._values.argument(given[0]), self._values.argument(given[1])
        mark = self._mark(m)
        with self._paused():
            try:
                result = forward(m, *args, **kwargs)
                if self._guess:
                    raise Untraceable(self._guess)
            except Exception:
                call = partial(forward, m)
                result = run_on_data(call, args, kwargs, self._values.batch, self._batch_size)
            with unset_fake_temporarily():
                mark.state.restore()  # what it keeps and draws, it does when it runs on data
                mark.randomness.restore()
        node = self._values.node("call_module", path, *node_args)
        if not torch.is_grad_enabled():
            if versions != [t._version for t in tracked if t.requires_grad]:
                self.report(WRITES_UNDER_NO_GRAD)
            inputs = (args, kwargs, list(m.parameters()))
            return self._values.bind_detached(result, inputs, node)
        return self._values.bind(result, node)

    def _open(
        self, m: nn.Module, path: str, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        mark = self._mark(m)
        count = self._counts[path]
        key = f"{path}@{count}" if count else path
        self._counts[path] += 1
        given = self._values.nodes((tuple(args), kwargs))
        frame = Frame(key)
        has_gradient = torch.is_grad_enabled()
        self._frames.append(frame)
        try:
            result = forward(m, *args, **kwargs)
            reason = self._why_closed(frame, mark)
        except Exception as error:
            reason = frame.reason or phrase(error)
        finally:
            self._frames.pop()
        if reason:
            self._roll_back(mark)
            self._opaque[path] = reason
            return self._call_whole(m, path, forward, args, kwargs)
        self._frames[-1].opens = True
        self._calls[key] = ModuleCall(
            path=path,
            args=given[0],
            kwargs=given[1],
            result=self._values.nodes(result),
            has_gradient=has_gradient,
        )
        return result

    def _mark(self, module: nn.Module) -> _Mark:
        with self._paused(), unset_fake_temporarily():
            return _Mark(
                values=self._values.mark(),
                state=self._state.part(module),
                randomness=RandomState.now(),
            )

    def _why_closed(self, frame: Frame, mark: _Mark) -> str:
        with self._paused(), unset_fake_temporarily():
            return why_closed(frame, mark.state, mark.randomness)

    def _roll_back(self, mark: _Mark) -> None:
        self._values.roll_back(mark.values)
        with self._paused(), unset_fake_temporarily():
            mark.state.restore()
            mark.randomness.restore()

    def report(self, reason: str) -> None:
        """Close the innermost opened module, because of `reason`."""
        if not self._is_paused and reason not in GRADIENT_MODES:
            self._frames[-1].close(reason)

    def _on_guess(self, question: str, fixes: bool) -> None:
        """What the model's code asks decides what it does; what torch's own asks may not matter."""
        reason = f"depends on the batch size ({question})"
        if not self._is_paused:
            self.report(reason)
        elif fixes:
            self._guess = self._guess or reason

    def _on_data(self, question: Any, is_claimed: bool) -> bool | None:
        """Answer a question about numbers that depend on data; what only claims, is checked."""
        if self._is_paused:
            self._asked_data = True
            return True if is_claimed else None
        is_truth = isinstance(question, Boolean)
        answer = True if is_claimed else claimed_answer(user_frame()) if is_truth else None
        if answer is None:
            self.report(f"{LOOKS_AT_DATA} at {here(user_frame())}")
        else:
            self._check(self._values.expression(question), answer)
        return answer

    def _check(self, condition: Any, answer: bool) -> None:
        """Record that `condition` must be `answer`."""
        if not answer:
            condition = self._values.operation(operator.not_, condition)
        where = here(user_frame())
        text = f"what {where} makes sure of does not hold"
        self._values.operation(torch._assert, condition, text)

    @contextmanager
    def _paused(self, follow: bool = False) -> Iterator[None]:
        """Record nothing: what runs belongs to one node.

        follow: numbers that depend on data may come out of it, instead of an exception.
        """
        self._is_paused, self._guess, self._asked_data = True, "", False
        self._symbols.follows_data = follow
        try:
            with unwatched():  # what torch's own code does is none of the user's
                yield
        finally:
            self._is_paused = False

    # --- torch's functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func`; a node, if it gives tensors or writes one."""
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        with self._paused(follow=self._is_large[self._frames[-1].key.split("@")[0]]):
            result = func(*args, **kwargs)
        if self._asked_data and isinstance(result, (bool, int, float)):
            return self._truth(func, args, result)
        if self._has_structure_of_data(func, args, kwargs, result):
            self.report(f"{LOOKS_AT_DATA} at {here(user_frame())}")
        if guess := self._guess:  # often of a fast path, or whether memory lies in order
            size = self._values.batch, self._batch_size
            try:
                with self._paused():
                    result = at_any_batch_size(result, func, args, kwargs, *size)
            except Exception:
                self.report(guess)
        is_write = writes_first_argument(func, args)
        if not is_write and not self._is_recorded(result):
            return result  # a size, a dtype, …: a number, or an expression in the batch size
        if not torch.is_grad_enabled():
            args, kwargs = self._values.without_gradient(args, kwargs, is_write)
        name = property_name(func)
        if getattr(func, "__name__", "") == "__set__":
            self.report(f"assigns the attribute {name!r} of a tensor")
        values = self._values
        if name:
            kind, target, args, kwargs = "call_function", getattr, (args[0], name), {}
        else:
            kind, target, args, kwargs = torch_call(func, args, kwargs)
        node = values.node(kind, target, values.argument(tuple(args)), values.argument(kwargs))
        if is_write and node.all_input_nodes and node.all_input_nodes[0].op == "get_attr":
            self.report(f"writes {node.all_input_nodes[0].target!r} in place")
        elif is_write and (written := self._plain_name(args[0])):
            self.report(f"writes {written!r} in place")
        if func is Tensor.to and id(args[0]) in values.kept and is_alike(result, args[0]):
            return values.stand_for(args[0], node)  # `self.table = self.table.to(…)` may keep it
        return values.bind(result, node)

    def _is_recorded(self, result: Any) -> bool:
        """Whether a function made something new: a tensor, or a number from data."""
        found = tree_leaves(result)
        if any(isinstance(leaf, Tensor) for leaf in found):
            return True
        return any(map(self._values.is_new, found))

    def _has_structure_of_data(self, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
        """Whether how many tensors `result` is, or how many dimensions it has, depends on data."""
        single = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, type(None))
        if self._asked_data and not isinstance(result, single):
            return True
        if not getattr(func, "__name__", "").startswith("squeeze"):
            return False
        value, *dims = args or (kwargs["input"],)
        asked: Any = dims if dims and isinstance(dims[0], int) else range(value.dim())
        return any(data_symbols(value.shape[dim]) for dim in asked)

    def _plain_name(self, value: Tensor) -> str:
        """The name of the plain tensor whose memory `value` is a view of, or ""."""
        with self._paused():
            key = value.untyped_storage()._cdata
            for name, plain in self._plain:
                if self._fake.from_tensor(plain).untyped_storage()._cdata == key:
                    return str(name)
        return ""

    def _truth(self, func: Any, args: Any, example: bool | int | float) -> Any:
        """What `func` makes of data for Python's own use: `if mask.any():`, `float(x)`."""
        answer = claimed_answer(user_frame()) if func is Tensor.__bool__ else None
        if answer is None:
            self.report(f"{LOOKS_AT_DATA} at {here(user_frame())}")
            return example
        self._check(self._values.argument(args[0]), answer)
        return answer

    def _quietly(self, function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        with self._paused():
            return function(value)
