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
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from scpl_compile.errors import MethodError, ScplError, TrainingError
from scpl_compile.runtime.memory import remedy
from scpl_compile.runtime.rank_watch import Watch, lost_store, wait_for_keys

__all__ = ["TIMEOUT_S", "Meeting", "as_posted", "meet", "reason", "telling_lost_ranks"]

T = TypeVar("T")

TIMEOUT_S = 600.0
"""How long a rank waits for another one that says nothing, where nothing else is asked for."""
_POLL_S = 0.02
_PATIENCE_S = 5.0
"""How long a failed rank waits until it is told."""
_LEAVING_S = 30.0
"""How long rank 0 waits for the others at the end of a run."""


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
        """Put a JSON value where every rank finds it.

        Raises:
            TrainingError: the store is gone.
        """
        with self._asking():
            self.store.set(f"fact/{key}", json.dumps(value))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except (dist.DistError, RuntimeError):
            raise TrainingError(lost_store(self.rank)) from None

    def find(self, key: str, kind: type[T]) -> T | None:
        """What a rank has posted under `key`, a JSON value of this kind; None where nothing is yet.

        Raises:
            TrainingError: it is another value, so no rank of ours posted it; the store is gone.
        """
        name = f"fact/{key}"
        with self._asking():
            if not self.store.check([name]):
                return None
            posted = self.store.get(name)
        try:
            value = json.loads(posted.decode())
        except (ValueError, RecursionError) as error:
            raise _foreign(key) from error
        if not isinstance(value, kind):
            raise _foreign(key)
        return value

    def forget(self, key: str) -> None:
        """Remove what was posted under `key`."""
        with self._asking():
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
            time.sleep(_POLL_S)
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

    def fail(self, error: BaseException) -> None:
        """Tell rank 0's user, and end every rank; the first failure is the one that is told.

        Where the others cannot be reached it is told here, and this process ends.
        """
        text = f"{error}" if isinstance(error, ScplError) else f"{type(error).__name__}: {error}"
        told = f"{self.place}{text}{remedy(error)}"

        def tell_all() -> None:
            try:
                self.watch.accuse(told)
                self.watch.stop()
                self.watch.conclude()
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
        store, goes last; for a rank that ends meanwhile it waits half a minute at most.
        """
        self.post(f"left/{self.rank}", True)
        for rank in range(self.world_size):
            self.wait_for(f"left/{rank}", bool)
        self.part()
        self.watch.stop()
        gone = [f"fact/gone/{rank}" for rank in range(1, self.world_size)]
        with suppress(dist.DistError, RuntimeError, TrainingError):  # all is done
            if self.rank != 0:
                self.post(f"gone/{self.rank}", True)
            else:
                wait_for_keys(self.store, gone, _LEAVING_S)
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
