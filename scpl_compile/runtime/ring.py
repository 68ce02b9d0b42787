"""Notices a rank that ends without a word, wherever the others are: killed, or out of memory.

::

    rank 0 ◀─ rank 1 ◀─ rank 2 ◀─┐      each waits for the goodbye of the next one,
      └──────────────────────────┘      which comes when all leave, or never

The kernel closes the connections of a process that has ended, and a receive that waits on one of
them fails at once. A rank that waits for another's checkpoint, or reads its data, waits on none; so
a thread of every rank always does. A process that is slow or stopped keeps its connections: that is
what the timeout is for.
"""

import threading
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

__all__ = ["Ring"]

_FOR_EVER = timedelta(days=3650)
_GOODBYE_S = 2.0


class Ring:
    """Made by all ranks together.

    notice: called in a thread of this rank, with the rank that has ended.
    """

    def __init__(self, rank: int, world_size: int, notice: Callable[[int], None]) -> None:
        group = dist.new_group(backend="gloo", timeout=_FOR_EVER)
        assert isinstance(group, dist.ProcessGroup), "this rank is in it"
        self._group = group
        self._rank = rank
        self._world_size = world_size
        self._notice = notice
        self._thread = threading.Thread(target=self._wait, daemon=True, name="ring")
        if world_size > 1:
            self._thread.start()

    def _wait(self) -> None:
        other = (self._rank + 1) % self._world_size
        try:
            dist.recv(torch.empty(1), other, group=self._group)
        except (dist.DistError, RuntimeError):
            self._notice(other)

    def close(self) -> None:
        """Say goodbye; all ranks do."""
        if self._world_size > 1:
            goodbye, before = torch.zeros(1), (self._rank - 1) % self._world_size
            # Both live as long as the ring: gloo reads them when the other one receives.
            self._sent = goodbye, dist.isend(goodbye, before, group=self._group)
            self._thread.join(_GOODBYE_S)
