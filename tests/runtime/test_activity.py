"""The share of its time that a stage waits, and how full its queue is."""

import threading
import time
from types import SimpleNamespace

import pytest

from scpl_compile.runtime import activity
from scpl_compile.runtime.activity import Activity, Usage
from stage_nets import SECONDS, batches, make_trainer, submit_all


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until a test moves `now`."""
    clock = SimpleNamespace(now=1000)
    monkeypatch.setattr(activity.time, "perf_counter_ns", lambda: clock.now)
    return clock


def test_waits_are_added_up_until_they_are_taken(clock: SimpleNamespace) -> None:
    stage = Activity()
    for wait, work in ((10, 20), (30, 40)):
        with stage.waiting():
            clock.now += wait
        clock.now += work
    for fill in (0.5, 1.0, 0.0):
        stage.saw_queue(fill)
    assert stage.take() == Usage(waiting=0.4, queue_fill=0.5)
    clock.now += 10
    assert stage.take() == Usage(waiting=0.0, queue_fill=0.0)


def test_a_wait_that_goes_on_counts_on_both_sides(clock: SimpleNamespace) -> None:
    stage = Activity()
    clock.now += 30
    with stage.waiting():
        clock.now += 10
        assert stage.take().waiting == 0.25
        clock.now += 5
    clock.now += 15
    assert stage.take().waiting == 0.25


def test_a_wait_that_fails_ends(clock: SimpleNamespace) -> None:
    stage = Activity()
    with pytest.raises(KeyError), stage.waiting():
        clock.now += 10
        raise KeyError
    clock.now += 10
    assert stage.take().waiting == 0.5


def test_without_time_nothing_is_divided_by_zero(clock: SimpleNamespace) -> None:
    assert Activity().take() == Usage(waiting=0.0, queue_fill=0.0)


def test_a_trainer_tells_who_waits_for_whom() -> None:
    """Stage 1 is held back: the one before it waits for room, the one after it for a batch."""
    with make_trainer(3, queue_depth=2) as trainer:
        forward = trainer._stages[1].forward

        def slow(step: int) -> None:
            time.sleep(0.05)
            forward(step)

        trainer._stages[1].forward = slow  # type: ignore[method-assign]
        trainer.take_usage()
        submit_all(trainer, batches(10))
        trainer.drain()
        first, second, third = trainer.take_usage()
    assert second.waiting < 0.5 < min(first.waiting, third.waiting)
    assert second.queue_fill > 0.5 > third.queue_fill
    assert max(first.waiting, third.waiting) <= 1


def test_asking_while_a_stage_waits_disturbs_nothing() -> None:
    stage, done = Activity(), threading.Event()

    def work() -> None:
        while not done.is_set():
            with stage.waiting():
                pass

    worker = threading.Thread(target=work)
    worker.start()
    try:
        shares = [stage.take().waiting for _ in range(2000)]
    finally:
        done.set()
        worker.join(SECONDS)
    assert all(0 <= share <= 1 for share in shares)
