"""Where the ranks meet: small facts that all of them find, the first failure, and the end.

::

    meet ─▶ post, find, wait_for, agree ─▶ leave        all goes well: every rank leaves together
                    │
                    └─ fail ─▶ rank 0 prints the first failure, and every rank ends

All of it goes through the store of torch.distributed, before there is any process group: so ranks
that cannot form one (other programs, other options, no backend) still tell why.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from scpl_compile.errors import MethodError, ScplError, TrainingError
from scpl_compile.runtime.memory import remedy

__all__ = ["TIMEOUT_S", "Meeting", "Watch", "meet", "reason", "telling_lost_ranks"]

TIMEOUT_S = 600.0
"""How long a rank waits for another one that says nothing."""
_FAILURE, _TOLD = "failure", "told"
_POLL_S = 0.2
_PATIENCE_S = 10.0
"""How long a failed rank waits until rank 0 has told it."""
_GOODBYE_S = 2.0
"""How long rank 0, which may hold the store, then waits for the others to end."""


class Watch:
    """Ends this process when another rank has failed: its own thread may wait for that rank in
    torch.distributed, where no exception reaches it.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watch")
        self._thread.start()

    def stop(self) -> None:
        """The run is over; a thread that is inside torch when a process ends would abort it."""
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(_POLL_S):
            try:
                if not self._store.check([_FAILURE]):
                    continue
                _end(self._store, self._rank, self._world_size)
            except (dist.DistError, RuntimeError):  # the store is gone, and rank 0 with it
                pass
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """This rank among the others.

    rank, world_size: of torch.distributed. store: of this meeting alone. watch: ends this process
    when another rank fails. owns_group: whether nobody had made a process group before.
    """

    rank: int
    world_size: int
    store: Store
    watch: Watch
    owns_group: bool

    @property
    def place(self) -> str:
        """What stands before a failure of this rank."""
        return ""

    def post(self, key: str, value: Any) -> None:
        """Put a JSON value where every rank finds it."""
        self.store.set(f"fact/{key}", json.dumps(value))

    def find(self, key: str) -> Any:
        """The value that a rank has posted under `key`; None where there is none yet.

        Raises:
            TrainingError: it is no JSON, so no rank of ours posted it.
        """
        name = f"fact/{key}"
        if not self.store.check([name]):
            return None
        try:
            return json.loads(self.store.get(name).decode())
        except (ValueError, RecursionError) as error:
            raise _foreign(key) from error

    def forget(self, key: str) -> None:
        """Remove what was posted under `key`."""
        self.store.delete_key(f"fact/{key}")

    def wait_for(self, key: str) -> Any:
        """The value under `key`, once it is there.

        Raises:
            TrainingError: nobody posted it.
        """
        end = time.monotonic() + TIMEOUT_S
        while (value := self.find(key)) is None:
            if time.monotonic() > end:
                raise TrainingError(
                    f"rank {self.rank} has waited {TIMEOUT_S:.0f} s for what another rank tells "
                    f"({key!r}); see that every rank was started, and what it says"
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
        everyone = [self.wait_for(f"{remedy}/{rank}") for rank in range(self.world_size)]
        if not all(isinstance(theirs, dict) for theirs in everyone):
            raise _foreign(remedy)
        for rank, theirs in enumerate(everyone):
            for name in sorted(theirs.keys() | set(names) | everyone[0].keys()):
                if theirs.get(name) != everyone[0].get(name):
                    raise MethodError(
                        f"rank {rank} has {name} {theirs.get(name)}, rank 0 has "
                        f"{everyone[0].get(name)}; {remedy}"
                    )

    def from_leader(self, key: str, value: Any) -> Any:
        """The JSON value of rank 0, on every rank; not None."""
        if self.rank == 0:
            self.post(key, value)
        return self.wait_for(key)

    # ------------------------------------------------------------------ the end

    def fail(self, error: BaseException) -> None:
        """Tell rank 0's user, and end every rank; the first failure is the one that is told."""
        text = f"{error}" if isinstance(error, ScplError) else f"{type(error).__name__}: {error}"
        try:
            if self.store.add("failures", 1) == 1:
                self.store.set(_FAILURE, f"{self.place}{text}{remedy(error)}")
            self.watch.stop()
            _end(self.store, self.rank, self.world_size)
        except (dist.DistError, RuntimeError):  # the store is gone, and rank 0 with it
            self.watch.stop()

    def leave(self) -> None:
        """Close the connections that were made here, once all ranks are here.

        They meet in the store, not in a barrier: gloo's thread lets go of a barrier's tensors after
        its end, and if Python ends meanwhile, the process is aborted. Rank 0, which may hold the
        store, goes last.
        """
        self.post(f"left/{self.rank}", True)
        for rank in range(self.world_size):
            self.wait_for(f"left/{rank}")
        self.watch.stop()
        if self.rank != 0:
            self.post(f"gone/{self.rank}", True)
        else:
            for rank in range(1, self.world_size):
                self.wait_for(f"gone/{rank}")
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()


def _foreign(key: str) -> TrainingError:
    return TrainingError(
        f"what is posted as {key!r} is none of this program's facts; see that nothing else uses "
        "this address and port"
    )


def _end(store: Store, rank: int, world_size: int) -> None:
    """Rank 0 prints the first failure, once; the others wait for that."""
    if rank == 0 and store.add("tellers", 1) == 1:
        print(f"error: {store.get(_FAILURE).decode(errors='replace')}", file=sys.stderr, flush=True)
        store.set(_TOLD, "")
    _wait(store, [_TOLD], _PATIENCE_S)
    store.set(f"ended/{rank}", "")
    if rank == 0:
        _wait(store, [f"ended/{other}" for other in range(world_size)], _GOODBYE_S)


def _wait(store: Store, keys: list[str], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not store.check(keys) and time.monotonic() < end:
        time.sleep(_POLL_S / 10)


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
        raise TrainingError(
            f"{who} has lost its neighbour: {reason(error)}; see the first error of the other "
            "ranks, and that the link is up"
        ) from error


def meet() -> Meeting:
    """Find the other ranks, by a process group that exists or by the launcher's environment.

    Raises:
        TrainingError: the ranks do not find each other.
    """
    owns_group = not dist.is_initialized()
    if owns_group:
        store, rank, world_size = _rendezvous()
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
        watch=Watch(store.clone(), rank, world_size),
        owns_group=owns_group,
    )


def _rendezvous() -> tuple[Store, int, int]:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    timeout = timedelta(seconds=TIMEOUT_S)
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
