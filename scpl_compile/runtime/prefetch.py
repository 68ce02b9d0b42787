"""An iterator that works ahead in a background thread."""

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import TypeVar

__all__ = ["prefetch"]

T = TypeVar("T")


class _End:
    """What the thread puts last: that there is no more, or why not."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetch(source: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The items of `source`, which a thread makes up to `depth` ahead of their use.

    An exception of the source is raised here in its turn. The thread begins with the first item
    asked for and has ended when the iterator is exhausted, closed or dropped. It leaves torch's
    number of threads alone: torch.set_num_threads in one thread changes what the next thread to
    start computes with, and that may be a stage.
    """
    ready: queue.Queue[T | _End] = queue.Queue(depth)
    is_closed = threading.Event()

    def work() -> None:
        end = _End(None)
        try:
            for item in source:
                if is_closed.is_set():
                    return
                ready.put(item)
        except BaseException as error:
            end = _End(error)
        if not is_closed.is_set():
            ready.put(end)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        # After is_closed the thread puts at most one item more, for which this makes room.
        is_closed.set()
        with suppress(queue.Empty):
            while True:
                ready.get_nowait()
        thread.join()
