"""Ends a rank when another one has failed, or when nobody can be reached any more."""

import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import torch.distributed as dist
from torch._C._distributed_c10d import Store

__all__ = ["Watch", "lost_store", "wait_for_keys"]

_FAILURE, _TOLD = "failure", "told"
_POLL_S = 0.2
_PATIENCE_S = 5.0
"""How long a failed rank waits until rank 0 has told it; then it tells it itself."""
_GOODBYE_S = 2.0
"""How long rank 0, which may hold the store, then waits for the others to end."""


class Watch:
    """Ends this process when another rank has failed: its own thread may wait for that rank in
    torch.distributed, where no exception reaches it.

    It has a connection of its own to the store: torch keeps the other one to itself while it waits.
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

    def accuse(self, failure: str) -> None:
        """Have every rank end with this failure, if there was none before; in any thread.

        Raises:
            DistError, RuntimeError: the store is gone.
        """
        if self._store.add("failures", 1) == 1:
            self._store.set(_FAILURE, failure)

    def conclude(self) -> None:
        """Tell the failure: rank 0 does, the others wait for that, and tell it if it does not.

        Raises:
            DistError, RuntimeError: the store is gone.
        """
        store, rank = self._store, self._rank
        line = f"error: {store.get(_FAILURE).decode(errors='replace')}"
        if rank == 0:
            self.tell(line)
            store.set(_TOLD, "")
        else:
            is_told = wait_for_keys(store, [_TOLD], _PATIENCE_S)
            self.tell(f"rank {rank} ends: rank 0 has told the error" if is_told else line)
        store.set(f"ended/{rank}", "")
        if rank == 0:
            ended = [f"ended/{other}" for other in range(self._world_size)]
            wait_for_keys(store, ended, _GOODBYE_S)

    def tell(self, line: str) -> None:
        """Print why this process ends, if nothing was told yet and somebody reads it."""
        if self._voice.acquire(blocking=False):
            with suppress(OSError, ValueError):
                print(line, file=sys.stderr, flush=True)

    def exit(self, line: str = "", code: int = 1) -> NoReturn:
        """Tell it, if there is anything, and end this process, whatever its threads wait for."""
        if line:
            self.tell(line)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    def _ask(self) -> None:
        while not self._is_over.wait(_POLL_S):
            try:
                has_failed = self._store.check([_FAILURE])
                self._silent_s = 0.0
                if not has_failed:
                    continue
                self._silent_s = -_PATIENCE_S - _GOODBYE_S
                self.conclude()
                self.exit()
            except (dist.DistError, RuntimeError):
                line = f"error: {lost_store(self._rank)}"
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


def wait_for_keys(store: Store, keys: Sequence[str], seconds: float) -> bool:
    """Whether they are there in time."""
    end = time.monotonic() + seconds
    while not (is_there := bool(store.check(list(keys)))) and time.monotonic() < end:
        time.sleep(_POLL_S / 10)
    return is_there


def lost_store(rank: int) -> str:
    """What to say of it."""
    return (
        f"rank {rank} has lost the store of the ranks: rank 0 has ended, or the launcher; see what "
        "they said"
    )
