"""Tensors between two ranks, in buffers that are made once.

::

    sender     large ─────────────────── isend ─┐              (the stage goes on at once)
               small ─ copied ─▶ slot ── isend ─┤
    receiver   views of ◀─ slot ◀─────── irecv ─┘              (posted before the step at hand)

What crosses in one step is a message: large tensors go from where they lie, the others, labels
among them, packed as bytes. Two slots take turns on either side. What lies where, the Layout,
follows from the shapes of the batch, which every rank knows: it is sent (a header of int64) the
first time that a batch has these shapes, and never again. So the receiver never reads a size from a
device.

Headers travel as CPU tensors (gloo), payloads on the device's own backend. Nothing is pickled.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from scpl_compile.errors import TrainingError

__all__ = ["Entry", "Inbox", "Key", "Layout", "Outbox"]

Key = tuple[object, ...]
"""What a message's layout follows from; equal on both sides."""

_HEADER, _PAYLOAD = 1, 2  # tags, where the backend knows any
_SLOTS = 2
_ALIGNMENT = 64  # bytes; more than any dtype needs, and what vectorised kernels like
_LARGE = 2**18  # bytes from which a tensor is sent from where it lies
_AT_ONCE_S = 2e-4  # to take what is there
_MAX_DIMS = 8
_WORDS = 4 + _MAX_DIMS  # of one tensor in a header: there or not, dtype, gradient, ndim, sizes
_DTYPES = tuple(
    getattr(torch, name)
    for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8",
                 "uint8", "bool", "complex64", "complex128")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a message."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    requires_grad: bool

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}{' with gradient' if self.requires_grad else ''}"

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, rounded up so that the next one is aligned."""
        return -(-prod(self.shape) * self.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True)
class Layout:
    """What a message holds, in order."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, values: Mapping[str, Tensor]) -> "Layout":
        """The layout of these tensors."""
        return cls(
            tuple(
                Entry(name, value.dtype, tuple(value.shape), value.requires_grad)
                for name, value in values.items()
            )
        )

    @property
    def small(self) -> tuple[Entry, ...]:
        """What is packed into one buffer."""
        return tuple(entry for entry in self.entries if entry.nbytes < _LARGE)

    @property
    def large(self) -> tuple[Entry, ...]:
        """What is sent from where it lies: a copy of megabytes costs more than a message."""
        return tuple(entry for entry in self.entries if entry.nbytes >= _LARGE)

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the small tensors; at least one, for empty ones arrive too."""
        return max(1, sum(entry.nbytes for entry in self.small)) if self.small else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.packed_nbytes + sum(entry.nbytes for entry in self.large)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors of a message that lies in `buffer`, uint8 (nbytes,); no copies."""
        return _views((*self.small, *self.large), buffer)

    def packed_views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The small tensors alone, in `buffer`, uint8 (packed_nbytes,)."""
        return _views(self.small, buffer)

    def to_header(self, names: Sequence[str]) -> Tensor:
        """int64 (len(names), 12): a row per name, absent ones too."""
        rows = {}
        for entry in self.entries:
            if len(entry.shape) > _MAX_DIMS or entry.dtype not in _DTYPES:
                raise TrainingError(
                    f"{entry.name!r}, {entry.dtype} of {len(entry.shape)} dimensions, cannot cross "
                    f"between ranks (at most {_MAX_DIMS}); train with --engine threads"
                )
            sizes = [*entry.shape, *([0] * (_MAX_DIMS - len(entry.shape)))]
            kind = _DTYPES.index(entry.dtype)
            rows[entry.name] = [1, kind, int(entry.requires_grad), len(entry.shape), *sizes]
        return torch.tensor([rows.get(name, [0] * _WORDS) for name in names], dtype=torch.int64)

    @classmethod
    def from_header(cls, header: Tensor, names: Sequence[str]) -> "Layout":
        """What `to_header` gave."""
        entries = []
        for name, row in zip(names, header.tolist(), strict=True):
            is_there, kind, requires_grad, ndim, *sizes = row
            if is_there:
                shape = tuple(sizes[:ndim])
                entries.append(Entry(name, _DTYPES[kind], shape, bool(requires_grad)))
        return cls(tuple(entries))


def _views(entries: Sequence[Entry], buffer: Tensor) -> dict[str, Tensor]:
    views, start = {}, 0
    for entry in entries:
        size = prod(entry.shape) * entry.dtype.itemsize
        views[entry.name] = buffer[start : start + size].view(entry.dtype).view(entry.shape)
        start += entry.nbytes
    return views


class _Slots:
    """Buffers that take turns; one grows when a message does not fit."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(_SLOTS)]
        self._works: list[list[dist.Work]] = [[] for _ in range(_SLOTS)]
        self._held: list[list[Tensor]] = [[] for _ in range(_SLOTS)]
        self._next = 0

    def wait(self) -> None:
        """Wait until what the next slot was last used for has ended."""
        for work in self._works[self._next]:
            work.wait()
        self._works[self._next], self._held[self._next] = [], []

    def take(self, nbytes: int) -> tuple[int, Tensor]:
        """(slot, its first `nbytes` bytes), after what it was last used for has ended."""
        self.wait()
        slot, self._next = self._next, (self._next + 1) % _SLOTS
        if self._buffers[slot].numel() < nbytes:
            self._buffers[slot] = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return slot, self._buffers[slot][:nbytes]

    def owns(self, value: Tensor) -> bool:
        """Whether `value` lies in one of the buffers."""
        place = value.untyped_storage().data_ptr()
        return any(place == buffer.untyped_storage().data_ptr() for buffer in self._buffers)

    def uses(self, slot: int, works: list[dist.Work], held: list[Tensor]) -> None:
        """The slot is busy until `works` have ended; `held`, which they send, lives until then."""
        self._works[slot], self._held[slot] = works, held


class Outbox:
    """Sends messages to one rank.

    names: of all tensors that a message may hold. source: where some of them may come from, to be
    sent on.
    """

    def __init__(
        self, to: int, names: Sequence[str], device: torch.device, source: "Inbox | None" = None
    ) -> None:
        self._to = to
        self._source = source
        self._names = tuple(names)
        self._slots = _Slots(device)
        self._layouts: dict[Key, Layout] = {}

    def wait_for_room(self) -> None:
        """Wait while both slots are under way."""
        self._slots.wait()

    def send(self, key: Key, values: Mapping[str, Tensor]) -> None:
        """Send `values`, of which nothing may be written any more; waits while both slots are busy.

        Raises:
            TrainingError: a shape or dtype is another one than at the last batch with this key.
        """
        layout = Layout.of({name: values[name] for name in self._names if name in values})
        known = self._layouts.setdefault(key, layout)
        if known != layout:
            before, now = ({e.name: e for e in one.entries} for one in (known, layout))
            name = next(name for name in self._names if before.get(name) != now.get(name))
            raise TrainingError(
                f"{name!r} crosses as {now.get(name)} and crossed as {before.get(name)} for a "
                "batch of the same shapes; what depends on data cannot cross between ranks: train "
                "with --engine threads"
            )
        if known is layout:
            dist.send(layout.to_header(self._names), self._to, tag=_HEADER)
        slot, buffer = self._slots.take(layout.packed_nbytes)
        with torch.no_grad():
            for name, view in layout.packed_views(buffer).items():
                view.copy_(values[name])
        parts = [buffer] if layout.small else []
        parts += [self._lasting(values[entry.name]) for entry in layout.large]
        works = [dist.isend(part, self._to, tag=_PAYLOAD) for part in parts]
        self._slots.uses(slot, [work for work in works if work is not None], parts)

    def _lasting(self, value: Tensor) -> Tensor:
        """`value` in memory that stays as it is until it is sent: an inbox's is used again."""
        value = value.detach().contiguous()
        is_relayed = self._source is not None and self._source.owns(value)
        return value.clone() if is_relayed else value


class Inbox:
    """Receives messages from one rank, in the order in which they were sent.

    had_arrived: whether the last one that was taken had not to be waited for.
    """

    def __init__(self, source: int, names: Sequence[str], device: torch.device) -> None:
        self._source = source
        self._names = tuple(names)
        self._device = device
        self._slots = _Slots(device)
        self._layouts: dict[Key, Layout] = {}
        self.had_arrived = False
        self._posted: deque[tuple[Layout, dict[str, Tensor], list[dist.Work]]] = deque()

    def knows(self, key: Key) -> bool:
        """Whether `post` would not have to wait for a header."""
        return key in self._layouts

    def owns(self, value: Tensor) -> bool:
        """Whether `value` lies in a buffer of this inbox."""
        return self._slots.owns(value)

    def post(self, key: Key) -> None:
        """Begin to receive the next message, which has this key. At most one may be in use."""
        if (layout := self._layouts.get(key)) is None:
            header = torch.empty(len(self._names), _WORDS, dtype=torch.int64)
            dist.recv(header, self._source, tag=_HEADER)
            layout = self._layouts[key] = Layout.from_header(header, self._names)
        _, buffer = self._slots.take(layout.nbytes)
        views = layout.views(buffer)
        parts = [buffer[: layout.packed_nbytes]] if layout.small else []
        parts += [views[entry.name] for entry in layout.large]
        works = [dist.irecv(part, self._source, tag=_PAYLOAD) for part in parts]
        self._posted.append((layout, views, [work for work in works if work is not None]))

    def take(self) -> dict[str, Tensor]:
        """The oldest message that was posted; its tensors hold until the second `post` from now."""
        layout, views, works = self._posted.popleft()
        self.had_arrived = all(work.is_completed() for work in works)
        start = time.perf_counter()
        for work in works:
            work.wait()
        # gloo does not say whether a message is there; where nobody had to wait for it, it was.
        is_at_once = time.perf_counter() - start < _AT_ONCE_S
        self.had_arrived |= self._device.type == "cpu" and is_at_once
        for entry in layout.entries:
            if entry.requires_grad:
                views[entry.name].requires_grad_()
        return views
