"""The values that a model's code works with while it is traced.

Torch's own proxies record `x += y` as `x + y`, which differs where x has another name (a residual,
a view), let assignments such as `x.data = y` pass, and know nothing about the shape of the inputs.
"""

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from torch import Tensor
from torch.fx import Node, Proxy
from torch.fx.proxy import Attribute, TracerBase

__all__ = ["IN_PLACE", "InputProxy", "ParameterProxy", "ValueProxy"]

_OWN = frozenset({"tracer", "node", "root", "attr"})
IN_PLACE: Final[Mapping[Any, Any]] = MappingProxyType(
    {
        operator.iadd: operator.add,
        operator.isub: operator.sub,
        operator.imul: operator.mul,
        operator.itruediv: operator.truediv,
        operator.ifloordiv: operator.floordiv,
        operator.imod: operator.mod,
        operator.ipow: operator.pow,
        operator.imatmul: operator.matmul,
        operator.iand: operator.and_,
        operator.ior: operator.or_,
        operator.ixor: operator.xor,
        operator.ilshift: operator.lshift,
        operator.irshift: operator.rshift,
    }
)
"""The operators that write their first argument -> the ones that make a new tensor."""


class ValueProxy(Proxy):
    """A value of the graph."""

    def __getattr__(self, k: str) -> Attribute:
        """The attribute `k`, which becomes a node only when it is used."""
        return _AttributeProxy(self, k)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what would change the tensor behind the graph's back."""
        if name not in _OWN and not name.startswith("_"):
            raise TypeError(f"a traced value's attribute {name!r} is assigned")
        object.__setattr__(self, name, value)


class _AttributeProxy(Attribute, ValueProxy):
    """`x.name`, called or used."""


class InputProxy(ValueProxy):
    """An input: answers about its shape with ints, so that `assert t <= self.block_size` traces.

    Dimension 0 is the batch and stays symbolic.
    """

    def __init__(self, node: Node, tracer: TracerBase, sample_shape: tuple[int, ...]) -> None:
        super().__init__(node, tracer)
        self._sample_shape = sample_shape

    @property
    def shape(self) -> tuple[Any, ...]:
        """(batch size as a proxy, the other sizes as ints)."""
        return (self.size(0), *self._sample_shape)

    @property
    def ndim(self) -> int:
        """Number of dimensions with the batch."""
        return len(self._sample_shape) + 1

    def dim(self) -> int:
        """Number of dimensions with the batch."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """Size of one dimension, or the whole shape."""
        if dim is None:
            return self.shape
        if dim % self.ndim == 0:
            return self.tracer.create_proxy("call_method", "size", (self, 0), {})
        return self._sample_shape[dim % self.ndim - 1]


class ParameterProxy(ValueProxy):
    """A parameter or buffer: its shape and dtype are those of the tensor itself."""

    def __init__(self, node: Node, tracer: TracerBase, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self._tensor = tensor

    @property
    def shape(self) -> Any:
        """Of the tensor."""
        return self._tensor.shape

    @property
    def ndim(self) -> int:
        """Of the tensor."""
        return self._tensor.ndim

    def dim(self) -> int:
        """Of the tensor."""
        return self._tensor.dim()

    def size(self, *dim: int) -> Any:
        """Of the tensor."""
        return self._tensor.size(*dim)

    def numel(self) -> int:
        """Of the tensor."""
        return self._tensor.numel()


def _recorded(function: Callable[..., Any]) -> Callable[[ValueProxy, Any], Proxy]:
    def method(self: ValueProxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _function in IN_PLACE:
    setattr(ValueProxy, f"__{_function.__name__}__", _recorded(_function))
