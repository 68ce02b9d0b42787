"""The state that running a model's Python code can change, and putting it back.

Covers every module's attributes (one level into lists, dicts and sets: parameters, buffers,
submodules, hooks and training flags live in such dicts), the values of buffers, and random states:
those of Python, numpy and torch, and of generators that are attributes.
"""

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from scpl_compile.capture.values import plain_tensors

__all__ = ["ModelState", "RandomState", "host_random_state", "preserved"]


_REGISTERS = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomState:
    """The global random states of Python, numpy and torch (CPU)."""

    host: tuple[Any, ...]
    torch: bytes

    @classmethod
    def now(cls) -> "RandomState":
        """The states as they are."""
        return cls(host=host_random_state(), torch=bytes(torch.get_rng_state().numpy().data))

    def restore(self) -> None:
        """Put the states back."""
        python, name, keys, *rest = self.host
        random.setstate(python)
        np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(torch.frombuffer(bytearray(self.torch), dtype=torch.uint8))


def host_random_state() -> tuple[Any, ...]:
    """The global random states of Python and numpy, to compare."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return (random.getstate(), name, bytes(np.asarray(keys).data), *rest)


_Source = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def _get_state(source: _Source) -> Any:
    """The state of a source of random numbers that a module owns."""
    if isinstance(source, torch.Generator):
        return source.get_state()
    if isinstance(source, np.random.Generator):
        return source.bit_generator.state
    return source.get_state() if isinstance(source, np.random.RandomState) else source.getstate()


def _set_state(source: _Source, state: Any) -> None:
    if isinstance(source, np.random.Generator):
        source.bit_generator.state = state
    elif isinstance(source, random.Random):
        source.setstate(state)
    else:
        source.set_state(state)


def _plain(state: Any) -> Any:
    """A state in values that can be compared."""
    if isinstance(state, dict):
        return [(key, _plain(value)) for key, value in state.items()]
    if isinstance(state, (tuple, list)):
        return [_plain(value) for value in state]
    return bytes(np.asarray(state).data) if hasattr(state, "__array__") else state


@dataclass(slots=True)
class _Attributes:
    """One module's attributes, with shallow copies of the containers among them, and the states of
    its own sources of random numbers.
    """

    module: nn.Module
    values: dict[str, Any]
    copies: dict[str, Any]
    states: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> "_Attributes":
        values = dict(module.__dict__)
        copies = {
            name: value.copy()
            for name, value in values.items()
            if isinstance(value, (dict, list, set, deque))
        }
        sources = {name: v for name, v in values.items() if isinstance(v, _Source)}
        return cls(module, values, copies, {n: _get_state(v) for n, v in sources.items()})

    def changed(self) -> str:
        """The first attribute that differs, or ""."""
        now = self.module.__dict__
        for name in now.keys() | self.values.keys():
            if name not in now or name not in self.values:
                return name
            before, after = self.values[name], now[name]
            if before is not after and not _equal_scalars(before, after):
                return name
            if name in self.copies and not _same_items(self.copies[name], after):
                return _item_name(self.copies[name], after) if name in _REGISTERS else name
            if name in self.states and _plain(self.states[name]) != _plain(_get_state(after)):
                return name
        return ""

    def restore(self) -> None:
        for name, copy in self.copies.items():
            container = self.values[name]
            if not _same_items(copy, container):
                container.clear()
                (container.update if hasattr(container, "update") else container.extend)(copy)
        for name, state in self.states.items():
            _set_state(self.values[name], state)
        self.module.__dict__.clear()
        self.module.__dict__.update(self.values)


@dataclass(slots=True)
class ModelState:
    """The state of `root` and everything in it at one moment; `values` holds the values of buffers
    and of tensors that are plain attributes.
    """

    root: nn.Module
    values: dict[int, torch.Tensor]
    modules: list[_Attributes] = field(init=False)
    buffers: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.modules = [_Attributes.of(module) for module in self.root.modules()]
        self.buffers = _tensors(self.root)

    @classmethod
    def of(cls, root: nn.Module) -> "ModelState":
        """The state of `root` now, with copies of its buffers and plain tensors."""
        return cls(root, {id(t): t.detach().clone() for t in _tensors(root).values()})

    def part(self, module: nn.Module) -> "ModelState":
        """The state now of one module of the tree, sharing the copies of the buffers."""
        return ModelState(module, self.values)

    def changed(self) -> str:
        """Name of the first attribute or buffer that changed since, or ""."""
        for attributes in self.modules:
            if name := attributes.changed():
                return name
        return next((name for name, _, _ in self._written()), "")

    def _written(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        # Tensor._version would not do: batch_norm writes its statistics without raising it.
        for name, buffer in self.buffers.items():
            value = self.values.get(id(buffer))
            if value is not None and not _same(buffer, value):
                yield name, buffer, value

    def restore(self) -> None:
        """Put attributes and buffer values back, bit for bit."""
        for attributes in self.modules:
            attributes.restore()
        for _, buffer, value in self._written():
            buffer.data.copy_(value)


def _tensors(root: nn.Module) -> dict[str, torch.Tensor]:
    return dict(plain_tensors(root)) | dict(root.named_buffers())


@contextmanager
def preserved(model: nn.Module) -> Iterator[ModelState]:
    """Give `model` and the random states back afterwards as they were."""
    state, randomness = ModelState.of(model), RandomState.now()
    try:
        yield state
    finally:
        state.restore()
        randomness.restore()


def _equal_scalars(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, (bool, int, float, str, bytes)) and a == b


def _same_items(copy: Any, container: Any) -> bool:
    if len(copy) != len(container):
        return False
    if isinstance(copy, dict):
        pairs = zip(copy.items(), container.items(), strict=True)
        return all(k is m and v is w or (k == m and _is(v, w)) for (k, v), (m, w) in pairs)
    if isinstance(copy, (set, frozenset)):
        return bool(copy == container)
    return all(_is(a, b) for a, b in zip(copy, container, strict=True))


def _is(a: Any, b: Any) -> bool:
    return a is b or _equal_scalars(a, b)


def _item_name(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The parameter, buffer or submodule that differs (or the first one, if only the order)."""
    names = before.keys() | after.keys()
    return next((n for n in names if before.get(n) is not after.get(n)), next(iter(names)))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit-for-bit equality (NaN equals NaN)."""
    raw_a, raw_b = a.detach().reshape(-1), b.reshape(-1)
    if raw_a.numel() == 0:
        return True
    return torch.equal(raw_a.view(torch.uint8), raw_b.view(torch.uint8))
