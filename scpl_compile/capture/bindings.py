"""Which node of a recorded graph stands for which value, and nodes for values in arguments."""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from sympy import Symbol  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves, tree_map_only

from scpl_compile.capture.opening import LOOKS_AT_DATA, Frame, Untraceable
from scpl_compile.capture.symbols import data_symbols, expression_nodes
from scpl_compile.capture.torch_calls import writes_first_argument
from scpl_compile.capture.values import (
    Fields,
    is_constant,
    leaves,
    parts,
    plain_fields,
    plain_tensors,
)

__all__ = ["WRITES_UNDER_NO_GRAD", "Bindings"]

WRITES_UNDER_NO_GRAD = "writes a tensor with a gradient in place under no_grad"


class Bindings:
    """The graph of a recording, and the node that stands for each tensor and symbolic number.

    frames: the modules that are open now. quietly: calls a function without recording it.
    size, device: the nodes that give the batch size and the inputs' device.
    kept, names: names of the buffers and of plain tensors, and of parameters too, by id.
    """

    size: Node
    device: Node

    def __init__(
        self,
        model: nn.Module,
        frames: list[Frame],
        quietly: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor],
    ) -> None:
        self.graph = Graph()
        self.kept = {id(value): name for name, value in plain_tensors(model)}
        self.kept |= {id(b): name for name, b in model.named_buffers()}
        self.names = self.kept | {id(p): name for name, p in model.named_parameters()}
        self._frames = frames
        self._quietly = quietly
        # The node that gave a tensor, by the tensor's id; what has an id here stays alive, and
        # _bound remembers what each id stood for before, so that a rolled back module leaves none.
        self._node_of: dict[int, Node] = {}
        self._bound: list[tuple[Tensor, Node | None]] = []
        # The node and the dimension (None: the number itself) that a number from data comes from.
        self._data: dict[Symbol, tuple[Node, int | None]] = {}

    def finish_inputs(self) -> None:
        """Make the nodes that every input is asked for, after the placeholders."""
        first = next(iter(self.graph.nodes))
        create = self.graph.create_node
        self.size = create("call_method", "size", (first, 0), {}, "batch_size")
        self.device = create("call_function", getattr, (first, "device"), {}, "input_device")
        for node in self.graph.nodes:
            node.meta["scope"] = ()

    def mark(self) -> tuple[Node, int, int]:
        """Where the recording stands."""
        return next(iter(reversed(self.graph.nodes))), len(self._bound), len(self._data)

    def roll_back(self, mark: tuple[Node, int, int]) -> None:
        """Forget what was recorded since `mark`."""
        tail, num_bound, num_data = mark
        for node in reversed(self.graph.nodes):
            if node is tail:
                break
            self.graph.erase_node(node)
        self._data = dict(islice(self._data.items(), num_data))
        while len(self._bound) > num_bound:
            value, before = self._bound.pop()
            if before is None:
                self._node_of.pop(id(value), None)
            else:
                self._node_of[id(value)] = before

    def is_new(self, result: Any) -> bool:
        """Whether `result` is or holds a number from data that no node gives yet."""
        return not data_symbols(result) <= self._data.keys()

    def node(self, op: str, target: Any, args: Any, kwargs: Any) -> Node:
        """A new node that knows the module calls around it."""
        node: Node = self.graph.create_node(op, target, args, kwargs)
        node.meta["scope"] = tuple(frame.key for frame in self._frames[1:])
        return node

    def bind(self, value: Any, node: Node) -> Any:
        """Let `node` stand for the tensors in `value`; gives what the model's code goes on with.

        A function that gives back the very tensor that it was given (dropout in evaluation) gets
        an object of its own: otherwise every later use of its argument would read its result.
        """
        if isinstance(value, Tensor):
            is_known = id(value) in self._node_of or id(value) in self.names
            if is_known and not writes_first_argument(node.target):
                value = self._quietly(torch.ops.aten.alias.default, value)
            if symbols := data_symbols(value):
                node.meta["varies"] = True
                self._learn(value, symbols, node)
            return self.stand_for(value, node)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            self._data |= dict.fromkeys(data_symbols(value) - self._data.keys(), (node, None))
            return value
        for key, item, read in parts(value):
            if any(isinstance(leaf, Tensor) for leaf in leaves(item)):
                self.bind(item, self.node("call_function", read, (node, key), {}))
        return value

    def stand_for(self, value: Tensor, node: Node) -> Tensor:
        """Let `node` stand for `value` itself, which is given back."""
        self._bound.append((value, self._node_of.get(id(value))))
        self._node_of[id(value)] = node
        return value

    def _learn(self, value: Tensor, symbols: set[Symbol], node: Node) -> None:
        """Remember that sizes of `value`, which `node` gives, are numbers from data."""
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and size.node.expr in symbols - self._data.keys():
                self._data[size.node.expr] = node, dim

    def argument(self, value: Any) -> Any:
        """`value` with nodes for tensors and for what depends on the batch or the device.

        Raises:
            Untraceable: it holds something that has no place in a graph.
        """
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.expression(value.node.expr)
        if isinstance(value, slice):
            return slice(*map(self.argument, (value.start, value.stop, value.step)))
        if isinstance(value, Mapping):
            return {key: self.argument(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(self.argument(item) for item in value)
        if isinstance(value, list):
            return [self.argument(item) for item in value]
        if isinstance(value, torch.device):
            return self.device
        if is_constant(value):
            return value
        raise Untraceable(f"passes a {type(value).__name__} on")

    def expression(self, expression: Any) -> Any:
        """The nodes that compute a sympy expression in the batch size and numbers from data."""
        return expression_nodes(expression, self._symbol, self.operation)

    def _symbol(self, symbol: Symbol) -> Node:
        """The node that gives the batch size, or a number from data.

        Raises:
            Untraceable: such a number was made inside a call.
        """
        if symbol == self.batch.node.expr:
            return self.size
        if symbol not in self._data:
            raise Untraceable(LOOKS_AT_DATA)
        node, dim = self._data[symbol]
        return node if dim is None else self.node("call_method", "size", (node, dim), {})

    def operation(self, function: Callable[..., Any], *args: Any) -> Node:
        """A new node that calls `function`."""
        return self.node("call_function", function, args, {})

    @property
    def batch(self) -> torch.SymInt:
        """The batch size, as a symbol."""
        size = self._bound[0][0].shape[0]
        assert isinstance(size, torch.SymInt)
        return size

    def tensor(self, value: Tensor) -> Node:
        """The node that gives `value`.

        Raises:
            Untraceable: there is none, and the model does not hold it.
        """
        if id(value) in self._node_of:
            return self._node_of[id(value)]
        if id(value) not in self.names:
            raise Untraceable("uses a tensor that is neither parameter nor buffer")
        return self.node("get_attr", self.names[id(value)], (), {})

    def nodes(self, value: Any) -> Any:
        """`value` with nodes in place of known tensors, what else it holds left as it is."""
        if isinstance(value, Tensor):
            is_known = id(value) in self._node_of or id(value) in self.names
            return self.tensor(value) if is_known else value
        if isinstance(value, slice):
            return slice(*map(self.nodes, (value.start, value.stop, value.step)))
        fields = plain_fields(value)
        if isinstance(fields, Mapping):
            items = {key: self.nodes(item) for key, item in fields.items()}
            return items if fields is value else Fields(items)
        if isinstance(value, (tuple, list)):
            nodes = [self.nodes(item) for item in value]
            return nodes if isinstance(value, list) else tuple(nodes)
        return value

    # --- no_grad

    def without_gradient(self, args: Any, kwargs: Any, is_write: bool) -> tuple[Any, Any]:
        """The arguments of a call under no_grad, cut off from the gradient.

        Raises:
            Untraceable: the call writes one that has a gradient.
        """
        if is_write and args[0].requires_grad:
            raise Untraceable(WRITES_UNDER_NO_GRAD)

        def detached(value: Tensor) -> Tensor:
            return self._cut_off(value) if value.requires_grad else value

        found: tuple[Any, Any] = tree_map_only(Tensor, detached, (args, kwargs))
        return found

    def bind_detached(self, result: Any, given: Any, node: Node) -> Any:
        """Bind what a module gave under no_grad, from these arguments and parameters.

        Raises:
            Untraceable: it gave tensors in a dataclass.
        """
        bound = self.bind(result, node)
        in_containers = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
        if sum(isinstance(leaf, Tensor) for leaf in leaves(result)) > in_containers:
            raise Untraceable("a module gives a dataclass under no_grad")
        if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(given)):
            return bound
        return tree_map_only(Tensor, self._cut_off, bound)

    def _cut_off(self, value: Tensor) -> Tensor:
        if not (value.is_floating_point() or value.is_complex()):
            return value
        node = self.node("call_method", "detach", (self.tensor(value),), {})
        return self.stand_for(self._quietly(Tensor.detach, value), node)
