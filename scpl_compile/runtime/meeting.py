"""Where the ranks meet: small facts that all of them find, the first failure, and the end.

::

    meet ─▶ post, find, wait_for, agree ─▶ leave        all goes well: every rank leaves together
                    │
                    └─ fail ─▶ rank 0 prints the first failure, and every rank ends

A rank that cannot reach the others prints its own.

All of it goes through the store of torch.distributed, before there is any process group: so ranks
that cannot form one (other programs, other options, no backend) still tell why.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from scpl_compile.errors import MethodError, ScplError, TrainingError
from scpl_compile.runtime.memory import remedy

__all__ = ["TIMEOUT_S", "Meeting", "Watch", "as_posted", "meet", "reason", "telling_lost_ranks"]

T = TypeVar("T")

TIMEOUT_S = 600.0
"""How long a rank waits for another one that says nothing, where nothing else is asked for."""
_FAILURE, _TOLD = "failure", "told"
_POLL_S = 0.2
_PATIENCE_S = 5.0
"""How long a failed rank waits until rank 0 has told it; then it tells it itself."""
_GOODBYE_S = 2.0
"""How long rank 0, which may hold the store, then waits for the others to end."""


class Watch:
    """Ends this process when another rank has failed: its own thread may wait for that rank in
    torch.distributed, where no exception reaches it.

    One thread asks the store, and where the link to it is cut a question waits for ever; so a
    second one ends the process when there was no answer for `timeout_s`.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout_s: float) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._is_over = threading.Event()
        self._silent_s = 0.0
        self._voice = threading.Lock()
        self._asking = threading.Thread(target=self._ask, daemon=True, name="watch")
        self._asking.start()
        threading.Thread(target=self._guard, daemon=True, name="guard").start()

    def stop(self) -> None:
        """The run is over; a thread that is inside torch when a process ends would abort it."""
        self._is_over.set()
        self._asking.join(_PATIENCE_S)

    def tell(self, line: str) -> None:
        """Print why this process ends, if nothing was told yet."""
        if self._voice.acquire(blocking=False):
            print(line, file=sys.stderr, flush=True)

    def exit(self, line: str = "") -> NoReturn:
        """Tell it, if there is anything, and end this process, whatever its threads wait for."""
        if line:
            self.tell(line)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def _ask(self) -> None:
        while not self._is_over.wait(_POLL_S):
            try:
                has_failed = self._store.check([_FAILURE])
                self._silent_s = 0.0
                if not has_failed:
                    continue
                self._silent_s = -_PATIENCE_S - _GOODBYE_S
                _end(self._store, self._rank, self._world_size, self.tell)
                self.exit()
            except (dist.DistError, RuntimeError):
                line = (
                    f"error: rank {self._rank} has lost the store of the ranks: rank 0 has ended, "
                    "or the launcher; see what they said"
                )
            self.exit(line)

    def _guard(self) -> None:
        while self._asking.is_alive():
            start = time.monotonic()
            self._asking.join(_POLL_S)
            # A process that was stopped in between has not waited all that time.
            self._silent_s += min(time.monotonic() - start, 2 * _POLL_S)
            if self._silent_s > self._timeout_s:
                self.exit(
                    f"error: rank {self._rank} has had no answer from the ranks' store, on the "
                    f"host of rank 0 or of the launcher, for {self._timeout_s:g} s; see that the "
                    "link is up, and what the other ranks say"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """This rank among the others.

    rank, world_size: of torch.distributed. store: of this meeting alone. watch: ends this process
    when another rank fails. owns_group: whether nobody had made a process group before.
    timeout_s: how long it waits for another rank that says nothing.
    """

    rank: int
    world_size: int
    store: Store
    watch: Watch
    owns_group: bool
    timeout_s: float = TIMEOUT_S

    @property
    def place(self) -> str:
        """What stands before a failure of this rank."""
        return ""

    def post(self, key: str, value: Any) -> None:
        """Put a JSON value where every rank finds it."""
        self.store.set(f"fact/{key}", json.dumps(value))

    def find(self, key: str, kind: type[T]) -> T | None:
        """What a rank has posted under `key`, a JSON value of this kind; None where nothing is yet.

        Raises:
            TrainingError: it is another value, so no rank of ours posted it.
        """
        name = f"fact/{key}"
        if not self.store.check([name]):
            return None
        try:
            value = json.loads(self.store.get(name).decode())
        except (ValueError, RecursionError) as error:
            raise _foreign(key) from error
        if not isinstance(value, kind):
            raise _foreign(key)
        return value

    def forget(self, key: str) -> None:
        """Remove what was posted under `key`."""
        self.store.delete_key(f"fact/{key}")

    def wait_for(self, key: str, kind: type[T]) -> T:
        """What `find` gives, once it is there.

        Raises:
            TrainingError: nobody posted it within timeout_s, or it is another value.
        """
        end = time.monotonic() + self.timeout_s
        while (value := self.find(key, kind)) is None:
            if time.monotonic() > end:
                raise TrainingError(
                    f"rank {self.rank} has waited {self.timeout_s:g} s for what another rank "
                    f"tells ({key!r}); see that every rank was started, and what it says"
                )
            time.sleep(_POLL_S / 10)
        return value

    def agree(self, facts: Mapping[str, Any], remedy: str) -> None:
        """All ranks must give the same JSON values.

        Raises:
            MethodError: a rank has another one than rank 0; remedy: what to do then.
        """
        names = sorted(facts)
        self.post(f"{remedy}/{self.rank}", facts)
        everyone = [self.wait_for(f"{remedy}/{rank}", dict) for rank in range(self.world_size)]
        for rank, theirs in enumerate(everyone):
            for name in sorted(theirs.keys() | set(names) | everyone[0].keys()):
                if theirs.get(name) != everyone[0].get(name):
                    raise MethodError(
                        f"rank {rank} has {name} {theirs.get(name)}, rank 0 has "
                        f"{everyone[0].get(name)}; {remedy}"
                    )

    def from_leader(self, key: str, value: T) -> T:
        """The JSON value of rank 0, on every rank; not None."""
        if self.rank == 0:
            self.post(key, value)
        return self.wait_for(key, type(value))

    def largest(self, key: str, value: int) -> int:
        """The largest number that a rank gives, on every rank."""
        self.post(f"{key}/{self.rank}", value)
        return max(self.wait_for(f"{key}/{rank}", int) for rank in range(self.world_size))

    # ------------------------------------------------------------------ the end

    def accuse(self, failure: str) -> None:
        """Have every rank end with this failure, if there was none before; in any thread."""
        try:
            if self.store.add("failures", 1) == 1:
                self.store.set(_FAILURE, failure)
        except (dist.DistError, RuntimeError):
            pass  # the store is gone, which the watch sees

    def fail(self, error: BaseException) -> None:
        """Tell rank 0's user, and end every rank; the first failure is the one that is told.

        Where the others cannot be reached it is told here, and this process ends.
        """
        text = f"{error}" if isinstance(error, ScplError) else f"{type(error).__name__}: {error}"
        told = f"{self.place}{text}{remedy(error)}"

        def tell_all() -> None:
            try:
                if self.store.add("failures", 1) == 1:
                    self.store.set(_FAILURE, told)
                self.watch.stop()
                _end(self.store, self.rank, self.world_size, self.watch.tell)
            except (dist.DistError, RuntimeError):  # the store is gone, and rank 0 with it
                self.watch.tell(f"error: {told}")
                self.watch.stop()

        telling = threading.Thread(target=tell_all, daemon=True)
        telling.start()
        telling.join(2 * _PATIENCE_S)
        if telling.is_alive():  # the link is cut: a question to the store waits for ever
            self.watch.exit(f"error: {told}")

    def leave(self) -> None:
        """Close the connections that were made here, once all ranks are here.

        They meet in the store, not in a barrier: gloo's thread lets go of a barrier's tensors after
        its end, and if Python ends meanwhile, the process is aborted. Rank 0, which may hold the
        store, goes last; for a rank that ends meanwhile it does not wait long.
        """
        self.post(f"left/{self.rank}", True)
        for rank in range(self.world_size):
            self.wait_for(f"left/{rank}", bool)
        self.part()
        self.watch.stop()
        if self.rank != 0:
            self.post(f"gone/{self.rank}", True)
        else:
            gone = [f"fact/gone/{rank}" for rank in range(1, self.world_size)]
            _wait(self.store, gone, _PATIENCE_S)
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def part(self) -> None:
        """What ranks do when all have come to the end."""


@contextmanager
def as_posted(key: str) -> Iterator[None]:
    """Around the reading of a fact.

    Raises:
        TrainingError: it has not the shape that this program posts.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _foreign(key) from error


def _foreign(key: str) -> TrainingError:
    return TrainingError(
        f"what is posted as {key!r} is none of this program's facts; see that nothing else uses "
        "this address and port"
    )


def _end(store: Store, rank: int, world_size: int, tell: Callable[[str], None]) -> None:
    """Rank 0 tells the first failure and the others wait for that; if it does not, they do."""
    line = f"error: {store.get(_FAILURE).decode(errors='replace')}"
    if rank == 0:
        tell(line)
        store.set(_TOLD, "")
    else:
        is_told = _wait(store, [_TOLD], _PATIENCE_S)
        tell(f"rank {rank} ends: rank 0 has told the error" if is_told else line)
    store.set(f"ended/{rank}", "")
    if rank == 0:
        _wait(store, [f"ended/{other}" for other in range(world_size)], _GOODBYE_S)


def _wait(store: Store, keys: list[str], seconds: float) -> bool:
    """Whether they are there in time."""
    end = time.monotonic() + seconds
    while not (is_there := bool(store.check(keys))) and time.monotonic() < end:
        time.sleep(_POLL_S / 10)
    return is_there


def reason(error: BaseException) -> str:
    """What torch.distributed says, without the place in its source and its advice."""
    first = str(error).strip().splitlines()[0]
    return re.sub(r"^\[\S+:\d+\] ", "", first).split(". ")[0]


@contextmanager
def telling_lost_ranks(who: str) -> Iterator[None]:
    """torch.distributed's errors as ours, with who was waiting; other errors pass.

    Raises:
        TrainingError: another rank has ended, or its link.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise TrainingError(f"{who} {_loss(reason(error))}") from error


def _loss(why: str) -> str:
    if "timed out" in why.lower():
        return (
            f"waits for its neighbour, which says nothing ({why}); see whether that rank hangs, "
            "and that the link is up; --timeout waits longer"
        )
    return (
        f"has lost its neighbour: {why}; see the first error of the other ranks, and that the link "
        "is up"
    )


def meet(timeout_s: float = TIMEOUT_S) -> Meeting:
    """Find the other ranks, by a process group that exists or by the launcher's environment.

    timeout_s: how long a rank waits for another one that says nothing.

    Raises:
        TrainingError: the ranks do not find each other.
    """
    owns_group = not dist.is_initialized()
    if owns_group:
        store, rank, world_size = _rendezvous(timeout_s)
    else:
        store = dist.distributed_c10d._get_default_store()
        rank, world_size = dist.get_rank(), dist.get_world_size()
    # Facts of an earlier meeting may be there still.
    count = store.add(f"scpl/meetings/{rank}", 1)
    store = PrefixStore(f"scpl/{count}", store)
    return Meeting(
        rank=rank,
        world_size=world_size,
        store=store,
        watch=Watch(store.clone(), rank, world_size, timeout_s),
        owns_group=owns_group,
        timeout_s=timeout_s,
    )


def _rendezvous(timeout_s: float) -> tuple[Store, int, int]:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    timeout = timedelta(seconds=timeout_s)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    except (dist.DistError, RuntimeError, ValueError) as error:
        hint = (
            "the port is in use: give another one, torchrun --master-port PORT"
            if "EADDRINUSE" in str(error) or "address already in use" in str(error)
            else "see that every rank was started, and that they reach this address"
        )
        raise TrainingError(
            f"the ranks do not meet at {address} ({reason(error)}); {hint}"
        ) from None
    store.set_timeout(timeout)
    return store, rank, world_size
