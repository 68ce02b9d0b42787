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
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ring"]

_FOR_EVER = timedelta(days=3650)
_GOODBYE_S = 30.0
"""How long a rank waits for one that leaves more slowly; one that has ended is not waited for."""


class Ring:
    """Made by all ranks together.

    notice: called in a thread of this rank, with the rank that has ended. timeout_s: how long the
    ranks wait for each other to make it.
    """

    def __init__(
        self, rank: int, world_size: int, notice: Callable[[int], None], timeout_s: float
    ) -> None:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        assert isinstance(group, dist.ProcessGroup), "this rank is in it"
        self._group = group
        self._rank = rank
        self._world_size = world_size
        self._notice = notice
        self._is_over = False
        self._thread = threading.Thread(target=self._wait, daemon=True, name="ring")
        if world_size > 1:
            self._thread.start()

    def _wait(self) -> None:
        other = (self._rank + 1) % self._world_size
        try:
            work = dist.irecv(_goodbye(), other, group=self._group)
            assert work is not None, "this rank is in the group"
            work.wait(_FOR_EVER)
        except (dist.DistError, RuntimeError):
            if not self._is_over:
                self._notice(other)

    def close(self) -> None:
        """Say goodbye; all ranks do, and a rank that has ended since is nobody's concern."""
        self._is_over = True
        if self._world_size == 1:
            return
        goodbye, before = _goodbye(), (self._rank - 1) % self._world_size
        with suppress(dist.DistError, RuntimeError):
            # Both live as long as the ring: gloo reads them when the other one receives.
            self._sent = goodbye, dist.isend(goodbye, before, group=self._group)
        self._thread.join(_GOODBYE_S)


def _goodbye() -> Tensor:
    """Whatever the model's code has made the default dtype and device."""
    return torch.zeros(1, dtype=torch.uint8, device="cpu")
