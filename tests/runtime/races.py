"""A simulated GPU on the CPU, which finds what the streams of a program leave unordered.

The lanes call it in place of CUDA (lane.GPU). Every operation counts as a kernel on the stream that
its thread has at that moment, and every stream carries a vector clock: how far it has come, and how
far of every other stream it knows for certain, by events and by the host's waits. An operation
races where it touches memory that another stream has written, or writes what another one has
touched, and its clock does not know that access.

Freeing counts too. As in CUDA's caching allocator, memory belongs to the stream that was current
when it was made, and is at once free for that stream's next kernel; but what another stream does
with it is waited for if that stream was told by record_stream.

What the host does in order, such as handing a message to another thread, orders no streams: a
kernel runs later than its launch. But the host knows what it has waited for (synchronize, a copy to
the CPU), and passes that on with the locks of the board.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scpl_compile.runtime.gpu import Gpu

Clock = dict["Stream", int]
"""How many operations of each stream are known to have ended."""


def join(clock: Clock, other: Clock) -> None:
    for stream, tick in other.items():
        clock[stream] = max(tick, clock.get(stream, 0))


@dataclass(frozen=True, slots=True)
class Access:
    """One operation that reads or writes some memory."""

    stream: "Stream"
    tick: int
    verb: str
    operation: str

    def __str__(self) -> str:
        return f"{self.stream} {self.verb} it in {self.operation}"

    def is_before(self, clock: Clock) -> bool:
        return self.tick <= clock.get(self.stream, 0)


@dataclass(frozen=True, slots=True)
class Race:
    """Two accesses to a tensor of which either may come first."""

    tensor: str
    first: Access
    second: Access

    def __str__(self) -> str:
        return f"{self.tensor}: {self.first}; {self.second}, and nothing orders the two"


@dataclass(eq=False, slots=True)
class Memory:
    """What is known of a storage. home: the stream that made it; None: it was there before."""

    gpu: "SimulatedGpu"
    home: "Stream | None"
    name: str
    is_on_host: bool = False
    write: Access | None = None
    reads: dict["Stream", Access] = field(default_factory=dict)  # since the last write
    last: dict["Stream", Access] = field(default_factory=dict)
    kept_for: set["Stream"] = field(default_factory=set)


class Event:
    """A point in a stream."""

    def __init__(self, stream: "Stream") -> None:
        self.gpu, self.clock = stream.gpu, dict(stream.clock)
        join(self.clock, stream.gpu.thread.knows)

    def synchronize(self) -> None:
        self.gpu.host_waits(self.clock)


class Stream:
    """The calls of torch.cuda.Stream that lanes make."""

    def __init__(self, gpu: "SimulatedGpu", name: str) -> None:
        self.gpu, self.name = gpu, name
        self.clock: Clock = {self: 0}

    def __str__(self) -> str:
        return self.name

    def record_event(self) -> Event:
        with self.gpu.lock:
            return Event(self)

    def wait_event(self, event: Event) -> None:
        with self.gpu.lock:
            join(self.clock, event.clock)

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self.gpu.host_waits(self.clock)


class _Thread(threading.local):
    """What every host thread has of its own."""

    def __init__(self, caller: Stream) -> None:
        self.stream = caller
        self.action = ""
        self.knows: Clock = {}
        self.is_seen = False


class SimulatedGpu(Gpu):
    """The calls of Gpu, for tensors on the CPU. All that is made under `watching` lies on it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.races: list[Race] = []
        self.num_launches = 0
        self.caller = Stream(self, "the caller")
        self._num_streams = 0
        self.thread = _Thread(self.caller)

    # ------------------------------------------------------------------ the calls of lanes

    def stream(self, device: torch.device, *, is_new: bool) -> Stream:  # type: ignore[override]
        """A new stream; the trainer makes them in the order of the stages."""
        if not is_new:
            return self.thread.stream
        self._num_streams += 1
        return Stream(self, f"stage {self._num_streams - 1}")

    def current_stream(self, device: torch.device) -> Stream:  # type: ignore[override]
        return self.thread.stream

    @contextmanager
    def scope(self, device: torch.device, stream: Stream) -> Iterator[None]:  # type: ignore[override]
        before, self.thread.stream = self.thread.stream, stream
        try:
            with self.watching():
                yield
        finally:
            self.thread.stream = before

    def holds(self, value: Tensor) -> bool:
        memory = self.known(value)
        return memory is not None and memory.home is not None

    def put_on_host(self, value: Tensor) -> Tensor:
        """`value`, which is no tensor of a GPU; what the caller computes from such ones is none."""
        memory = self.memory(value)
        memory.is_on_host, memory.home, memory.write = True, None, None
        return value

    def is_on_host(self, value: Tensor) -> bool:
        memory = self.known(value)
        return memory is not None and memory.is_on_host

    def keep(self, value: Tensor, stream: Stream) -> None:  # type: ignore[override]
        self.memory(value).kept_for.add(stream)

    # ------------------------------------------------------------------ what the host does

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What the calling thread does inside is seen."""
        if self.thread.is_seen:
            yield
            return
        self.thread.is_seen = True
        try:
            with _Launches(self):
                yield
        finally:
            self.thread.is_seen = False

    def host_waits(self, clock: Clock) -> None:
        with self.lock:
            join(self.thread.knows, clock)

    # ------------------------------------------------------------------ memory and kernels

    def memory(self, value: Tensor) -> Memory:
        """The record of the tensor's storage; it lives as long as the storage."""
        memory = self.known(value)
        if memory is None:
            memory = self._record(value, None)
        return memory

    def known(self, value: Tensor) -> Memory | None:
        """The record of the tensor's storage, if there is one."""
        memory: Memory | None = getattr(value.untyped_storage(), "memory", None)
        return memory if memory is not None and memory.gpu is self else None

    def _record(self, value: Tensor, home: Stream | None) -> Memory:
        storage, kind = value.untyped_storage(), str(value.dtype).removeprefix("torch.")
        memory = Memory(self, home, f"a tensor {kind} {tuple(value.shape)}")
        storage.memory = memory  # type: ignore[attr-defined]
        weakref.finalize(storage, self._free, memory).atexit = False
        return memory

    def name(self, value: Tensor, name: str) -> None:
        """What races on this tensor call it, from now on."""
        self.memory(value).name = f"{name!r}"

    def launch(self, func: Any, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        """A kernel on the current stream, which comes after all that the host has waited for."""
        stream = self.thread.stream
        with self.lock:
            self.num_launches += 1
            join(stream.clock, self.thread.knows)
            stream.clock[stream] += 1
            operation = f"{self.thread.action} {func}".strip()
            written = {id(m): m for m in map(self.memory, writes)}
            read = {id(m): m for m in map(self.memory, reads) if id(m) not in written}
            for memory in read.values():
                access = Access(stream, stream.clock[stream], "reads", operation)
                self._check(memory, access, [memory.write])
                memory.reads[stream] = memory.last[stream] = access
            for memory in written.values():
                access = Access(stream, stream.clock[stream], "writes", operation)
                self._check(memory, access, [memory.write, *memory.reads.values()])
                memory.write = memory.last[stream] = access
                memory.reads = {}

    def _check(self, memory: Memory, access: Access, before: Sequence[Access | None]) -> None:
        for other in before:
            if other is not None and not other.is_before(access.stream.clock):
                self.races.append(Race(memory.name, other, access))

    def made(self, value: Tensor) -> None:
        """`value` is new memory of the current stream."""
        with self.lock:
            self._record(value, self.thread.stream)

    def _free(self, memory: Memory) -> None:
        home = memory.home
        if home is None:
            return
        with self.lock:
            clock = dict(home.clock)
            join(clock, self.thread.knows)
            operation = f"its next kernel, for it was freed in {self.thread.action or 'the host'}"
            reuse = Access(home, home.clock[home] + 1, "may reuse", operation)
            kept = memory.kept_for | {home}
            others = [access for stream, access in memory.last.items() if stream not in kept]
            self.races += [
                Race(memory.name, access, reuse) for access in others if not access.is_before(clock)
            ]


class _Launches(TorchDispatchMode):
    """Tells the GPU what every operation of this thread reads and writes."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        gpu, kwargs = self._gpu, kwargs or {}
        result = func(*args, **kwargs)
        signature = _signature(func)
        given = [*zip(signature.arguments, args, strict=False), *kwargs.items()]
        writes = [t for name, value in given if name in signature.writes for t in _tensors(value)]
        reads = [
            t
            for name, value in given
            if name not in signature.writes and not signature.looks
            for t in _tensors(value)
        ]
        if _is_copy_to_host(func, args, kwargs) and gpu.holds(args[0]):
            gpu.launch(func, reads, writes)
            gpu.host_waits(gpu.thread.stream.clock)
            return result
        if gpu.thread.stream is gpu.caller and (reads or writes):
            if all(map(gpu.is_on_host, (*reads, *writes))):
                for value in _tensors(result):
                    gpu.put_on_host(value)
                return result
        if not func.is_view:
            known = {value.untyped_storage()._cdata for value in (*reads, *writes)}
            for value in _tensors(result):
                if gpu.known(value) is None and value.untyped_storage()._cdata not in known:
                    gpu.made(value)
                    writes.append(value)
        if reads or writes:
            gpu.launch(func, reads, writes)
        return result


@dataclass(frozen=True, slots=True)
class _Signature:
    """arguments: their names, in order; writes: of those written; looks: reads shapes alone."""

    arguments: tuple[str, ...]
    writes: frozenset[str]
    looks: bool


@cache
def _signature(func: Any) -> _Signature:
    schema = func._schema
    aliased = [one for one in schema.arguments if one.alias_info is not None]
    return _Signature(
        arguments=tuple(one.name for one in schema.arguments),
        writes=frozenset(one.name for one in aliased if one.alias_info.is_write),
        looks=func.is_view or schema.name.endswith("_like") or "::new_" in schema.name,
    )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for one in value for t in _tensors(one)] if isinstance(value, (list, tuple)) else []


def _is_copy_to_host(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """`.to("cpu", copy=True)`, or a number that Python reads: the host waits for these."""
    if func is torch.ops.aten._local_scalar_dense.default:
        return True
    if func is not torch.ops.aten._to_copy.default or kwargs.get("non_blocking"):
        return False
    return kwargs.get("device") == torch.device("cpu") and kwargs.get("dtype") == args[0].dtype


def tracked_condition(gpu: SimulatedGpu) -> type[threading.Condition]:
    """A Condition that passes on what its threads have waited for."""

    class Tracked(threading.Condition):
        def __init__(self) -> None:
            super().__init__()
            self.knows: Clock = {}

        def _enters(self) -> None:
            gpu.host_waits(self.knows)

        def _leaves(self) -> None:
            with gpu.lock:
                join(self.knows, gpu.thread.knows)

        def __enter__(self) -> bool:
            entered = super().__enter__()
            self._enters()
            return entered

        def __exit__(self, *exception: Any) -> None:
            self._leaves()
            super().__exit__(*exception)

        def wait(self, timeout: float | None = None) -> bool:
            self._leaves()
            try:
                return super().wait(timeout)
            finally:
                self._enters()

    return Tracked
