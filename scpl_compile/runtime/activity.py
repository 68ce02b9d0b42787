"""How a stage spends its time: what share of it waiting, and how full its queue is."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Activity", "Usage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Of one stage over some time.

    waiting: share of the time in which its worker waited for others: for a batch or a gradient,
    for the gates of its schedule, for room in the queue behind it. On a GPU it is the worker's
    time on the host. queue_fill: batches waiting before it as it took the next one, over those that
    fit; the mean, 0 where it took none.
    """

    waiting: float
    queue_fill: float


class Activity:
    """Adds up what one worker does; any thread may take the sum."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: int | None = None
        self._restart(time.perf_counter_ns())

    def _restart(self, now: int) -> None:
        self._start = now
        self._waited_ns = 0
        self._fills: list[float] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time inside counts as waiting."""
        with self._lock:
            self._since = time.perf_counter_ns()
        try:
            yield
        finally:
            with self._lock:
                self._waited_ns += time.perf_counter_ns() - self._since
                self._since = None

    def saw_queue(self, fill: float) -> None:
        """The queue, full at 1, as the stage takes its next batch."""
        with self._lock:
            self._fills.append(fill)

    def take(self) -> Usage:
        """Since the last call; a wait that goes on counts up to now."""
        with self._lock:
            now = time.perf_counter_ns()
            if self._since is not None:
                self._waited_ns += now - self._since
                self._since = now
            usage = Usage(
                waiting=self._waited_ns / max(now - self._start, 1),
                queue_fill=sum(self._fills) / max(len(self._fills), 1),
            )
            self._restart(now)
            return usage
