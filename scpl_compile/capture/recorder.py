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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from sympy import Symbol  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from scpl_compile.capture.arguments import without_defaults
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
from scpl_compile.capture.symbols import BatchSymbols, data_symbols, expression_nodes
from scpl_compile.capture.torch_calls import property_name, torch_call, writes_first_argument
from scpl_compile.capture.values import (
    Fields,
    is_alike,
    is_constant,
    leaves,
    only_nodes,
    parts,
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

    tail: Node
    num_bound: int
    num_data: int
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
        self._graph = Graph()
        self._frames = [Frame("")]
        self._counts: Counter[str] = Counter()
        self._calls: dict[str, ModuleCall] = {}
        self._guess = ""
        self._asked_data = False
        self._symbols = BatchSymbols(self._on_guess, self._on_data)
        self._fake = FakeTensorMode(shape_env=self._symbols, allow_non_fake_inputs=True)
        self._fake.cache_enabled = False  # what it remembers of a call, it asks nothing about
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._paths = {id(m): path for path, m in model.named_modules()}
        self._kept = {id(value): name for name, value in plain_tensors(model)}
        self._kept |= {id(b): name for name, b in model.named_buffers()}
        self._names = self._kept | {id(p): name for name, p in model.named_parameters()}
        self._is_large = large_modules(model)
        # The node and the dimension (None: the number itself) that a number from data comes from.
        self._data: dict[Symbol, tuple[Node, int | None]] = {}
        # The node that gave a tensor, by the tensor's id; what has an id here stays alive, and
        # _bound remembers what each id stood for before, so that a rolled back module leaves none.
        self._node_of: dict[int, Node] = {}
        self._bound: list[tuple[Tensor, Node | None]] = []
        self._is_paused = False

    # --- the whole model

    def run(self) -> Trace:
        """Record the model's forward on the declared inputs."""
        model = self._model
        with quiet(), self._fake:
            values = {spec.name: self._placeholder(spec) for spec in self._inputs}
        create, first = self._graph.create_node, next(iter(self._graph.nodes))
        self._size = create("call_method", "size", (first, 0), {}, "batch_size")
        self._place = create("call_function", getattr, (first, "device"), {}, "input_device")
        for node in self._graph.nodes:
            node.meta["scope"] = ()
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
        self._node("output", "output", (only_nodes(self._nodes(plain_fields(result))),), {})
        return Trace(graph=self._graph, calls=self._calls)

    def _placeholder(self, spec: InputSpec) -> Tensor:
        """A fake tensor (batch, *shape) whose first size is the symbol of the batch."""
        shape = (self._batch_size, *spec.shape)
        sizes = [DimDynamic.DUCK, *(DimDynamic.STATIC for _ in spec.shape)]
        with unset_fake_temporarily():
            real = torch.empty(shape, dtype=getattr(torch, spec.dtype), device=self._device)
        value = self._fake.from_tensor(
            real, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)
        )
        node = self._graph.placeholder(spec.name)
        self._bind(value, node)
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
        node_args = self._argument(given[0]), self._argument(given[1])
        mark = self._mark(m)
        with self._paused():
            try:
                result = forward(m, *args, **kwargs)
                if self._guess:
                    raise Untraceable(self._guess)
            except Exception:
                call = partial(forward, m)
                result = run_on_data(call, args, kwargs, self._batch, self._batch_size)
            with unset_fake_temporarily():
                mark.state.restore()  # what it keeps and draws, it does when it runs on data
                mark.randomness.restore()
        if not torch.is_grad_enabled():
            inputs = (args, kwargs, list(m.parameters()))
            return self._bind_detached(result, inputs, self._node("call_module", path, *node_args))
        return self._bind(result, self._node("call_module", path, *node_args))

    def _open(
        self, m: nn.Module, path: str, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        mark = self._mark(m)
        count = self._counts[path]
        key = f"{path}@{count}" if count else path
        self._counts[path] += 1
        given = self._nodes((tuple(args), kwargs))
        frame = Frame(key)
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
        self._calls[key] = ModuleCall(
            path=path, args=given[0], kwargs=given[1], result=self._nodes(result)
        )
        return result

    def _mark(self, module: nn.Module) -> _Mark:
        with self._paused(), unset_fake_temporarily():
            return _Mark(
                tail=next(iter(reversed(self._graph.nodes))),
                num_bound=len(self._bound),
                num_data=len(self._data),
                state=self._state.part(module),
                randomness=RandomState.now(),
            )

    def _why_closed(self, frame: Frame, mark: _Mark) -> str:
        with self._paused(), unset_fake_temporarily():
            return why_closed(frame, mark.state, mark.randomness)

    def _roll_back(self, mark: _Mark) -> None:
        for node in reversed(self._graph.nodes):
            if node is mark.tail:
                break
            self._graph.erase_node(node)
        self._data = dict(islice(self._data.items(), mark.num_data))
        while len(self._bound) > mark.num_bound:
            value, before = self._bound.pop()
            if before is None:
                self._node_of.pop(id(value), None)
            else:
                self._node_of[id(value)] = before
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
        answer = True if is_claimed else claimed_answer(user_frame())
        if answer is None:
            self.report(f"{LOOKS_AT_DATA} at {here(user_frame())}")
        else:
            self._check(self._expression(question), answer)
        return answer

    def _check(self, condition: Any, answer: bool) -> None:
        """Record that `condition` must be `answer`."""
        if not answer:
            condition = self._operation(operator.not_, condition)
        where = here(user_frame())
        self._operation(torch._assert, condition, f"what {where} makes sure of does not hold")

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
        if guess := self._guess:  # often of a fast path, or whether memory lies in order
            size = self._batch, self._batch_size
            try:
                with self._paused():
                    result = at_any_batch_size(result, func, args, kwargs, *size)
            except Exception:
                self.report(guess)
        is_write = writes_first_argument(func, args)
        if not is_write and not self._is_recorded(result):
            return result  # a size, a dtype, …: a number, or an expression in the batch size
        if not torch.is_grad_enabled():
            args, kwargs = self._without_gradient(args, kwargs, is_write)
        name = property_name(func)
        if getattr(func, "__name__", "") == "__set__":
            self.report(f"assigns the attribute {name!r} of a tensor")
        if name:
            node = self._node("call_function", getattr, (self._argument(args[0]), name), {})
        else:
            kind, target, args, kwargs = torch_call(func, args, kwargs)
            node = self._node(kind, target, self._argument(tuple(args)), self._argument(kwargs))
        if is_write and node.all_input_nodes and node.all_input_nodes[0].op == "get_attr":
            self.report(f"writes {node.all_input_nodes[0].target!r} in place")
        if func is Tensor.to and id(args[0]) in self._kept and is_alike(result, args[0]):
            return self._stand_for(args[0], node)  # it may be kept: `self.table = self.table.to(…)`
        return self._bind(result, node)

    def _is_recorded(self, result: Any) -> bool:
        """Whether a function made something new: a tensor, or a number from data."""
        leaves = tree_leaves(result)
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            return True
        return not set().union(*map(data_symbols, leaves)) <= self._data.keys()

    def _truth(self, func: Any, args: Any, example: bool | int | float) -> Any:
        """What `func` makes of data for Python's own use: `if mask.any():`, `float(x)`."""
        answer = claimed_answer(user_frame()) if func is Tensor.__bool__ else None
        if answer is None:
            self.report(f"{LOOKS_AT_DATA} at {here(user_frame())}")
            return example
        self._check(self._argument(args[0]), answer)
        return answer

    # --- no_grad

    def _without_gradient(self, args: Any, kwargs: Any, is_write: bool) -> tuple[Any, Any]:
        """The arguments of a call under no_grad, cut off from the gradient."""
        if is_write and args[0].requires_grad:
            self.report("writes a tensor with a gradient in place under no_grad")
        detached: tuple[Any, Any] = tree_map_only(Tensor, self._detached, (args, kwargs))
        return detached

    def _detached(self, value: Tensor) -> Tensor:
        return self._cut_off(value) if value.requires_grad else value

    def _bind_detached(self, result: Any, given: Any, node: Node) -> Any:
        """Bind what a module gave under no_grad, from these arguments and parameters."""
        bound = self._bind(result, node)
        leaves = tree_leaves(given)
        if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            return bound
        return tree_map_only(Tensor, self._cut_off, bound)

    def _cut_off(self, value: Tensor) -> Tensor:
        if not (value.is_floating_point() or value.is_complex()):
            return value
        node = self._node("call_method", "detach", (self._tensor(value),), {})
        with self._paused():
            value = value.detach()
        return self._stand_for(value, node)

    # --- values

    def _node(self, op: str, target: Any, args: Any, kwargs: Any) -> Node:
        node: Node = self._graph.create_node(op, target, args, kwargs)
        node.meta["scope"] = tuple(frame.key for frame in self._frames[1:])
        return node

    def _bind(self, value: Any, node: Node) -> Any:
        """Let `node` stand for the tensors in `value`; gives what the model's code goes on with.

        A function that gives back the very tensor that it was given (dropout in evaluation) gets
        an object of its own: otherwise every later use of its argument would read its result.
        """
        if isinstance(value, Tensor):
            is_known = id(value) in self._node_of or id(value) in self._names
            if is_known and not writes_first_argument(node.target):
                with self._paused():
                    value = torch.ops.aten.alias.default(value)
            if symbols := data_symbols(value):
                node.meta["varies"] = True
                self._learn(value, symbols, node)
            return self._stand_for(value, node)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            self._data |= dict.fromkeys(data_symbols(value) - self._data.keys(), (node, None))
            return value
        for key, item, read in parts(value):
            if any(isinstance(leaf, Tensor) for leaf in leaves(item)):
                self._bind(item, self._node("call_function", read, (node, key), {}))
        return value

    def _stand_for(self, value: Tensor, node: Node) -> Tensor:
        self._bound.append((value, self._node_of.get(id(value))))
        self._node_of[id(value)] = node
        return value

    def _learn(self, value: Tensor, symbols: set[Symbol], node: Node) -> None:
        """Remember that sizes of `value`, which `node` gives, are numbers from data."""
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and size.node.expr in symbols - self._data.keys():
                self._data[size.node.expr] = node, dim

    def _argument(self, value: Any) -> Any:
        """`value` with nodes for tensors and for what depends on the batch or the device.

        Raises:
            Untraceable: it holds something that has no place in a graph.
        """
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._expression(value.node.expr)
        if isinstance(value, slice):
            return slice(*map(self._argument, (value.start, value.stop, value.step)))
        if isinstance(value, Mapping):
            return {key: self._argument(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(self._argument(item) for item in value)
        if isinstance(value, list):
            return [self._argument(item) for item in value]
        if isinstance(value, torch.device):
            return self._place
        if is_constant(value):
            return value
        raise Untraceable(f"passes a {type(value).__name__} on")

    def _expression(self, expression: Any) -> Any:
        return expression_nodes(expression, self._symbol, self._operation)

    def _symbol(self, symbol: Symbol) -> Node:
        """The node that gives the batch size, or a number from data.

        Raises:
            Untraceable: such a number was made inside a call.
        """
        if symbol == self._batch.node.expr:
            return self._size
        if symbol not in self._data:
            raise Untraceable(LOOKS_AT_DATA)
        node, dim = self._data[symbol]
        return node if dim is None else self._node("call_method", "size", (node, dim), {})

    def _operation(self, function: Callable[..., Any], *args: Any) -> Node:
        return self._node("call_function", function, args, {})

    @property
    def _batch(self) -> torch.SymInt:
        """The batch size, as a symbol."""
        size = self._bound[0][0].shape[0]
        assert isinstance(size, torch.SymInt)
        return size

    def _tensor(self, value: Tensor) -> Node:
        if id(value) in self._node_of:
            return self._node_of[id(value)]
        if id(value) not in self._names:
            raise Untraceable("uses a tensor that is neither parameter nor buffer")
        return self._node("get_attr", self._names[id(value)], (), {})

    def _nodes(self, value: Any) -> Any:
        """`value` with nodes in place of known tensors, what else it holds left as it is."""
        if isinstance(value, Tensor):
            is_known = id(value) in self._node_of or id(value) in self._names
            return self._tensor(value) if is_known else value
        if isinstance(value, slice):
            return slice(*map(self._nodes, (value.start, value.stop, value.step)))
        fields = plain_fields(value)
        if isinstance(fields, Mapping):
            items = {key: self._nodes(item) for key, item in fields.items()}
            return items if fields is value else Fields(items)
        if isinstance(value, (tuple, list)):
            nodes = [self._nodes(item) for item in value]
            return nodes if isinstance(value, list) else tuple(nodes)
        return value
