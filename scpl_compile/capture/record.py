"""The tensor operations that run inside a node of the graph, as the cost model needs them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["Op", "OpRecorder", "OpTensor"]

_NO_DATA = frozenset({"prim", "prims", "profiler"})
_TIMELESS = frozenset(
    {"detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
)


@dataclass(frozen=True, slots=True)
class OpTensor:
    """A tensor argument or result of an operation."""

    shape: tuple[int, ...]
    itemsize: int
    requires_grad: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * self.itemsize


@dataclass(frozen=True, slots=True)
class Op:
    """One operation below autograd ("convolution", "addmm", "relu_").

    args: its arguments in order, then its keyword arguments, with OpTensor for tensors.
    has_backward: autograd recorded it, because a tensor argument requires a gradient.
    random: it draws random numbers.
    """

    name: str
    args: tuple[Any, ...]
    outputs: tuple[OpTensor, ...]
    has_backward: bool
    random: bool

    @property
    def inputs(self) -> tuple[OpTensor, ...]:
        """The tensor arguments, also those inside lists."""
        return tuple(leaf for leaf in tree_leaves(self.args) if isinstance(leaf, OpTensor))


class OpRecorder(TorchDispatchMode):
    """Collects in `ops` the operations that run under it, without those that only make views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func` and record it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace not in _NO_DATA and not func.is_view and name not in _TIMELESS:
            self._record(func, args, kwargs, result)
        return result

    def _record(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        given = (*args, *kwargs.values())
        inputs = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if not func._schema.is_mutable and outputs and _all_views(outputs, inputs):
            return
        self.ops.append(
            Op(
                name=func.overloadpacket.__name__,
                args=tree_map_only(torch.Tensor, _describe, given),
                outputs=tuple(_describe(tensor) for tensor in outputs),
                has_backward=torch.is_grad_enabled() and any(t.requires_grad for t in inputs),
                random=_draws_random_numbers(func, args, kwargs),
            )
        )


def _draws_random_numbers(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation draws (fused attention is tagged so, but with dropout 0 does not)."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    if "attention" in func.overloadpacket.__name__:
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        return bool(given.get("dropout_p", 0.0))
    return True


def _describe(tensor: torch.Tensor) -> OpTensor:
    return OpTensor(tuple(tensor.shape), tensor.element_size(), tensor.requires_grad)


def _all_views(outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> bool:
    """Whether every output shares memory with an input (reshape, _unsafe_view, unsafe_split)."""
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in storages for tensor in outputs)
