"""A call of one of torch's functions, as the mode that intercepts it sees it, as a node's parts.

`x + y` arrives as the method `add` of torch's C tensor class, `x[0]` as `__getitem__`, `x.T` as
the getter of a property. The node says what the user wrote.
"""

import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from torch import Tensor

from scpl_compile.capture.proxies import IN_PLACE

__all__ = ["property_name", "torch_call", "writes_first_argument"]

_INFIX: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
        "matmul": operator.matmul, "pow": operator.pow, "eq": operator.eq, "ne": operator.ne,
        "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
        "add_": operator.iadd, "sub_": operator.isub, "mul_": operator.imul,
        "div_": operator.itruediv,
        "__eq__": operator.eq, "__ne__": operator.ne, "__floordiv__": operator.floordiv,
        "__mod__": operator.mod, "__and__": operator.and_, "__or__": operator.or_,
        "__xor__": operator.xor, "__pow__": operator.pow, "__matmul__": operator.matmul,
        "__lshift__": operator.lshift, "__rshift__": operator.rshift,
        "__getitem__": operator.getitem,
    }
)  # fmt: skip
"""Methods of two operands that are written as operators."""
_SWAPPED: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "__rsub__": operator.sub, "__rpow__": operator.pow, "__rdiv__": operator.truediv,
        "__rtruediv__": operator.truediv, "__rfloordiv__": operator.floordiv,
        "__rmod__": operator.mod, "__rmatmul__": operator.matmul, "__rand__": operator.and_,
        "__ror__": operator.or_, "__rxor__": operator.xor,
    }
)  # fmt: skip
_PREFIX: Final[Mapping[str, Any]] = MappingProxyType(
    {"neg": operator.neg, "__neg__": operator.neg, "__invert__": operator.invert,
     "bitwise_not": operator.invert}
)  # fmt: skip
_IN_PLACE = frozenset({*IN_PLACE, operator.setitem})
_IN_PLACE_NAMES = frozenset(f"__{function.__name__}__" for function in _IN_PLACE) | {"__set__"}


def property_name(function: Any) -> str:
    """The name of the tensor's attribute that `function` reads or sets ("T", "data"), else ""."""
    if getattr(function, "__name__", "") not in ("__get__", "__set__"):
        return ""
    return str(getattr(function.__self__, "__name__", ""))


def _asks_for_gradient(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call is `x.requires_grad = True`, as for reentrant checkpointing: no parameter's
    gradient is another for it.
    """
    is_setter = getattr(function, "__name__", "") == "__set__"
    return is_setter and args[1] is True and function.__self__.__name__ == "requires_grad"


def torch_call(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]]:
    """(op, target, args, kwargs) of the node for a call of `function`."""
    name = str(getattr(function, "__name__", ""))
    if getattr(Tensor, name, None) is not function:
        return "call_function", function, args, dict(kwargs)
    if name == "__setitem__":
        return "call_function", operator.setitem, args, {}
    if len(args) == 2 and not kwargs:
        if name in _INFIX:
            return "call_function", _INFIX[name], args, {}
        if name in _SWAPPED:
            return "call_function", _SWAPPED[name], args[::-1], {}
    if len(args) == 1 and not kwargs and name in _PREFIX:
        return "call_function", _PREFIX[name], args, {}
    return "call_method", name, args, dict(kwargs)


def writes_first_argument(target: Any, args: tuple[Any, ...] = ()) -> bool:
    """Whether a function, or a node's target, writes its first argument in place, by its name."""
    if args and _asks_for_gradient(target, args):
        return False
    name = target if isinstance(target, str) else str(getattr(target, "__name__", ""))
    if target in _IN_PLACE or name in _IN_PLACE_NAMES:
        return True
    return name.endswith("_") and not name.endswith("__")
