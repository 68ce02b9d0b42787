"""What a module gives that cannot run on fake tensors, because it looks at its data.

It runs on random data at two batch sizes; a size that differs between the two is taken to grow
with the batch in a straight line.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten

from scpl_compile.capture.opening import Untraceable, phrase, place, root_error
from scpl_compile.capture.state import RandomState
from scpl_compile.ir import InputSpec

__all__ = ["at_any_batch_size", "random_input", "run_on_data", "run_once"]


def run_on_data(
    call: Callable[..., Any], args: Any, kwargs: Any, batch: torch.SymInt, batch_size: int
) -> Any:
    """What `call(*args, **kwargs)` gives, as fake tensors of the mode that is active.

    args, kwargs: with fake tensors, some sizes of which are expressions in `batch`.

    Raises:
        Untraceable: sizes or numbers in the results depend on data, or the results have another
            structure at another batch size.
    """
    with unset_fake_temporarily():
        randomness = RandomState.now()
        symbol = batch.node.expr
        first, again, second = (
            call(*tree_map(fill, tuple(args)), **tree_map(fill, kwargs))
            for fill in (_Fill(symbol, size) for size in (batch_size, batch_size, batch_size + 1))
        )
        randomness.restore()
    if _facts(first) != _facts(again):
        raise Untraceable("gives sizes or numbers that depend on values")
    if tree_structure(first) != tree_structure(second):
        raise Untraceable("gives results of another structure at another batch size")
    leaves = [
        _fake(one, other, batch, batch_size)
        for one, other in zip(tree_leaves(first), tree_leaves(second), strict=True)
    ]
    return tree_unflatten(leaves, tree_structure(first))


def at_any_batch_size(
    result: Any,
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    batch: torch.SymInt,
    batch_size: int,
) -> Any:
    """`result`, which `call` gave on fake tensors, or what it should have given.

    Some functions of torch give, on fake tensors, sizes at the example batch size (F.pad).

    Raises:
        Untraceable: the number of results depends on the batch size, or `result` is a view.
    """
    found = run_on_data(call, args, kwargs, batch, batch_size)
    if _shapes(found) == _shapes(result):
        return result
    if not set(_memory(result)).isdisjoint(_memory((args, kwargs))):
        raise Untraceable("gives a view that depends on the batch size")
    return found


def _facts(value: Any) -> tuple[Any, list[Any]]:
    """What must not depend on data: the structure, the shapes of tensors, and numbers."""
    leaves = tree_leaves(value)
    return tree_structure(value), [getattr(leaf, "shape", leaf) for leaf in leaves]


def _shapes(value: Any) -> list[str]:
    return [str(getattr(leaf, "shape", leaf)) for leaf in tree_leaves(value)]


def _memory(value: Any) -> list[int]:
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return [tensor.untyped_storage()._cdata for tensor in tensors]


class _Fill:
    """Random data in place of fake tensors, at one batch size."""

    def __init__(self, symbol: Any, batch_size: int) -> None:
        self._symbol = symbol
        self._batch_size = batch_size

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            size = value.node.expr.subs(self._symbol, self._batch_size)
            if not size.is_number:
                raise Untraceable("takes a tensor whose size depends on values")
            return int(size)
        if not isinstance(value, Tensor) or isinstance(value, torch.nn.Parameter):
            return value
        shape = [self(size) for size in value.shape]
        if value.is_floating_point() or value.is_complex():
            data = torch.randn(shape, dtype=value.dtype, device=value.device)
        else:  # ones: a mask of all, a length above 0, an index that most tables have
            data = torch.ones(shape, dtype=value.dtype, device=value.device)
        return data.requires_grad_(value.requires_grad)


def _fake(one: Any, other: Any, batch: torch.SymInt, batch_size: int) -> Any:
    """A fake tensor, or a size, for what came out at both batch sizes."""
    if isinstance(one, Tensor):
        pairs = zip(one.shape, other.shape, strict=True)
        shape = [_size(a, b, batch, batch_size) for a, b in pairs]
        made = torch.empty(shape, dtype=one.dtype, device=one.device)
        return made.requires_grad_(one.requires_grad)
    if type(one) is int and type(other) is int:
        return _size(one, other, batch, batch_size)
    return one


def _size(one: int, other: int, batch: torch.SymInt, batch_size: int) -> Any:
    slope = other - one
    return slope * batch + (one - slope * batch_size) if slope else one


def run_once(model: nn.Module, inputs: tuple[InputSpec, ...]) -> None:
    """Run `model` on two random samples in training mode.

    Raises:
        TraceError: it fails.
    """
    model.train()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    values = {spec.name: random_input(spec, 2).to(device) for spec in inputs}
    try:
        with torch.no_grad():
            model(**values)
    except Exception as error:
        raise root_error(model, phrase(error), place(error)) from error


def random_input(spec: InputSpec, batch_size: int) -> Tensor:
    """Random data for one input; 0 is avoided where possible, since a length must not be 0."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    shape = (batch_size, *spec.shape)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=dtype)
    high = spec.high or 2
    return spec.ended(torch.randint(min(1, high - 1), high, shape)).to(dtype)
