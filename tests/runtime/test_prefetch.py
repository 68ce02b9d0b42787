"""An iterator that works ahead in a thread, and leaves none behind."""

import itertools
import threading
import time

import pytest

from scpl_compile.runtime.prefetch import prefetch


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_the_items_and_their_order_are_the_sources():
    assert list(prefetch(iter(range(100)))) == list(range(100))
    assert list(prefetch(iter(()))) == []
    assert prefetch_threads() == []


def test_it_works_ahead_but_not_further_than_its_depth():
    made = []

    def source():
        for i in itertools.count():
            made.append(i)
            yield i

    items = prefetch(source(), depth=2)
    assert made == []  # the thread begins with the first item asked for
    assert next(items) == 0
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]  # 0 is used, 1 and 2 wait, 3 is made and has no room yet
    items.close()


def test_an_exception_of_the_source_arrives_in_its_turn_with_its_traceback():
    def source():
        yield 1
        raise KeyError("image 7")

    items = prefetch(source())
    assert next(items) == 1
    with pytest.raises(KeyError, match="image 7") as raised:
        next(items)
    assert "source" in [entry.name for entry in raised.traceback]
    assert prefetch_threads() == []


@pytest.mark.parametrize("num_used", [1, 5])
def test_a_closed_or_dropped_iterator_ends_its_thread(num_used):
    closed = prefetch(itertools.count())
    dropped = prefetch(itertools.count())
    for _ in range(num_used):
        next(closed), next(dropped)
    assert len(prefetch_threads()) == 2
    closed.close()
    del dropped
    assert prefetch_threads() == []


def test_a_consumer_that_stops_at_an_error_ends_the_thread():
    def consume():
        for item in prefetch(itertools.count()):
            if item == 3:
                raise ValueError("consumer")

    with pytest.raises(ValueError, match="consumer") as raised:
        consume()
    del raised  # the traceback holds the loop's iterator
    assert prefetch_threads() == []
