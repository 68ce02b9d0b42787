"""The workers: exact in every schedule, side by side in stream, and none outlives a failure."""

import gc
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scpl_compile.actions import SCHEDULES, Action, gates, timeline
from scpl_compile.errors import MethodError, TrainingError
from scpl_compile.runtime.engine import Engine, StageState
from stage_nets import (
    BATCH_SIZE,
    SECONDS,
    BlockStage,
    batches,
    block_stages,
    differences,
    stage_steps,
    state_of,
    submit_steps,
    train_steps,
)

pytestmark = pytest.mark.timeout(60)

# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_the_schedules_leave_the_same_bits(num_stages: int) -> None:
    expected, _ = train_steps(num_stages, "sequential")
    for schedule, depth in [("stream", 1), ("stream", 2), ("stream", 5), ("in_step", 2)]:
        found, _ = train_steps(num_stages, schedule, depth=depth)
        assert differences(found, expected) == []


def test_the_comparison_would_see_another_run() -> None:
    expected, _ = train_steps(2, "sequential")
    other = train_steps(2, "sequential", steps=stage_steps(2, seed=1))[0]
    shorter = train_steps(2, "sequential", 19)[0]
    kinds = ("norm.running_var", "mean", "linear.weight")
    for name in (
        *(f"1 module.blocks.1.{kind}" for kind in kinds),
        "0 optimizer.1.exp_avg_sq",
        "0 random.torch",
        "0 losses",
    ):
        assert name in differences(expected, other) and name in differences(expected, shorter)


# ---------------------------------------------------------------------- what runs when


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_recorded_events_are_the_picture_of_the_schedule(num_stages: int, schedule: str) -> None:
    """Every stage executes the timeline's actions in the timeline's order."""
    times = timeline(schedule, num_stages, 4)
    _, engine = train_steps(num_stages, schedule, 4, record_events=True)
    for k in range(num_stages):
        found = [event.action for event in engine.events if event.action.stage == k]
        assert found == [action for action in times if action.stage == k]
    at = {event.action: event for event in engine.events}
    for action in times:
        for need in gates(schedule, action, num_stages):
            assert at[need].start_ns < at[action].end_ns


def test_of_the_events_the_last_ones_stay() -> None:
    _, engine = train_steps(1, "stream", 5, record_events=True, max_events=6)
    found = [str(event.action) for event in engine.events]
    assert found == ["0B3", "0U3", "0RECV4", "0F4", "0B4", "0U4"]


def test_sequential_runs_one_stage_after_another() -> None:
    _, engine = train_steps(3, "sequential", 5, record_events=True)
    work = sorted((e for e in engine.events if e.action.kind in "BU"), key=lambda e: e.start_ns)
    order = [(event.action.step, event.action.stage, event.action.kind) for event in work]
    assert order == [(t, k, kind) for t in range(5) for k in range(3) for kind in "BU"]


@pytest.mark.parametrize(("schedule", "expected"), [("stream", True), ("sequential", False)])
def test_with_real_work_a_stage_goes_on_while_the_next_is_at_the_batch_before(
    schedule: str, expected: bool
) -> None:
    """In stream, F of stage 0 for t + 1 begins before U of stage 1 for t ends."""

    class Large(BlockStage):
        def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
            large = torch.ones(300, 300)
            for _ in range(10 if self.index else 2):
                large = large @ large / 300
            return super().training_step(x, labels=labels)

    stages = block_stages(2, stage0=Large, stage1=Large)
    steps = stage_steps(2, stages=stages, draws=False, dropout=0)
    _, engine = train_steps(2, schedule, 12, steps=steps, record_events=True)
    at = {event.action: event for event in engine.events}
    # B, because F's own time begins with the wait at its gate.
    assert expected == any(
        at[Action(0, "B", t + 1)].start_ns < at[Action(1, "U", t)].start_ns for t in range(11)
    )


class Meeting(BlockStage):
    """Stage 1 begins F(t) only after stage 0 has begun F(t + 1): possible in stream alone."""

    def __init__(self, model: Any, index: int) -> None:
        super().__init__(model, index)
        self.step = -1
        self.begun: list[threading.Event] = []

    def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
        self.step += 1
        if self.index == 0:
            self.begun[self.step].set()
        elif not self.begun[self.step + 1].wait(SECONDS if self.patient else 0.2):
            raise TimeoutError(f"stage 0 has not begun batch {self.step + 1}")
        return super().training_step(x, labels=labels)


@pytest.mark.parametrize("schedule", ["stream", "in_step", "sequential"])
def test_only_stream_has_two_batches_at_work(schedule: str) -> None:
    steps = stage_steps(
        2, stages=block_stages(2, stage0=Meeting, stage1=Meeting), draws=False, dropout=0
    )
    begun = [threading.Event() for _ in range(9)]
    begun[8].set()
    for stage in steps:
        stage.module.begun, stage.module.patient = begun, schedule == "stream"
    if schedule == "stream":
        train_steps(2, schedule, 8, steps=steps)
    else:
        with pytest.raises(TrainingError, match="stage 1 failed: TimeoutError: .* batch 1"):
            train_steps(2, schedule, 8, steps=steps)


def test_a_slow_last_stage_bounds_the_batches_in_flight() -> None:
    go_on = threading.Event()

    class Held(BlockStage):
        def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
            assert go_on.wait(SECONDS)
            return super().training_step(x, labels=labels)

    num_stages, depth = 3, 2
    bound = num_stages * (1 + depth)  # one at work and `depth` before it, in every stage
    steps = stage_steps(
        num_stages, stages=block_stages(num_stages, stage2=Held), draws=False, dropout=0
    )
    engine = Engine(steps, schedule="stream", threads_per_stage=1, depth=depth)
    producer = threading.Thread(target=submit_steps, args=(engine, bound + 3), daemon=True)
    producer.start()
    deadline = time.monotonic() + SECONDS
    while engine.num_steps < bound and time.monotonic() < deadline:
        time.sleep(0.01)
    producer.join(0.1)
    assert producer.is_alive() and engine.num_steps == bound
    go_on.set()
    producer.join(SECONDS)
    engine.drain()
    assert engine.num_steps == bound + 3
    assert [len(stage.take_losses()) for stage in steps] == [bound + 3] * 3
    engine.close()


def test_the_workers_compute_with_their_number_of_threads() -> None:
    found: list[int] = []

    class Counts(BlockStage):
        def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
            found.append(torch.get_num_threads())
            return super().training_step(x, labels=labels)

    before = torch.get_num_threads()
    for threads in (1, 2):
        steps = stage_steps(2, stages=block_stages(2, stage0=Counts, stage1=Counts))
        train_steps(2, "stream", 3, steps=steps, threads_per_stage=threads)
    assert found == [1] * 6 + [2] * 6
    assert torch.get_num_threads() == before


# ---------------------------------------------------------------------- the end


def test_closing_stops_the_workers_where_they_are() -> None:
    engine = Engine(stage_steps(3), schedule="stream", threads_per_stage=1)
    submit_steps(engine, 12)
    engine.close()
    engine.close()
    assert not any(thread.is_alive() for thread in engine._workers.threads)
    for call in (lambda: submit_steps(engine, 1), engine.check):
        with pytest.raises(TrainingError, match="the trainer is closed; build a new one"):
            call()
    assert engine.num_steps == 12


def test_what_was_drained_before_the_end_counts_as_drained() -> None:
    _, engine = train_steps(2, "stream", 3)
    engine.drain()


def test_an_engine_that_nobody_holds_ends() -> None:
    """In the middle of its work, and without a word to the other threads' owners."""
    steps = stage_steps(3)
    engine = Engine(steps, schedule="stream", threads_per_stage=1)
    submit_steps(engine, 6)
    threads, stage = engine._workers.threads, weakref.ref(steps[2])
    del engine, steps
    gc.collect()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    gc.collect()
    assert stage() is None


@pytest.mark.parametrize(("depth", "threads"), [(0, 1), (2, 0), (2, -1)])
def test_a_queue_or_threads_of_nothing_are_refused(depth: int, threads: int) -> None:
    before = set(threading.enumerate())
    with pytest.raises(MethodError, match=f"queue depth {depth} and {threads} threads"):
        Engine(stage_steps(1), schedule="stream", threads_per_stage=threads, depth=depth)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("end", ["", "del engine, steps"])
def test_a_program_that_ends_without_closing_ends_cleanly(end: str) -> None:
    """A daemon thread inside torch while python ends would abort the process."""
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch
        from stage_nets import BlockStage, batches, block_stages, stage_steps
        from scpl_compile.runtime.engine import Engine

        class Slow(BlockStage):
            def training_step(self, x, *, labels):
                torch.ones(1500, 1500) @ torch.ones(1500, 1500)
                return super().training_step(x, labels=labels)

        steps = stage_steps(1, stages=block_stages(1, stage0=Slow))
        engine = Engine(steps, schedule="stream", threads_per_stage=1)
        for x, labels in batches(3):
            engine.submit({{"x": x}}, labels)
        {end}
        print("end")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


# ---------------------------------------------------------------------- snapshots


def snapshot_of(states: dict[int, StageState]) -> dict[str, object]:
    found: dict[str, object] = {}
    for stage, (tensors, values) in states.items():
        found |= {f"{stage} {name}": value.numpy().tobytes() for name, value in tensors.items()}
        found |= {f"{stage} {name}": value for name, value in values.items()}
    return found


@pytest.mark.parametrize("schedule", ["stream", "in_step", "sequential"])
def test_a_snapshot_while_streaming_is_the_drained_state_of_that_step(schedule: str) -> None:
    go_on = threading.Event()

    class Held(BlockStage):
        def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
            assert go_on.wait(SECONDS)
            return super().training_step(x, labels=labels)

    steps = stage_steps(3, stages=block_stages(3, stage1=Held), draws=False, dropout=0)
    engine = Engine(steps, schedule=schedule, threads_per_stage=1, depth=4)
    snapshots: list[dict[int, StageState]] = [{}, {}, {}]
    engine.snapshot(snapshots[0].__setitem__)  # before the first step
    submit_steps(engine, 4)
    engine.snapshot(snapshots[1].__setitem__)  # while stage 1 stands still
    engine.snapshot(snapshots[2].__setitem__)  # twice
    assert 1 not in snapshots[1] and 2 not in snapshots[1]
    submit_steps(engine, 6, first=4)
    go_on.set()
    submit_steps(engine, 12, first=6)
    engine.drain()
    engine.close()
    fresh = stage_steps(3, draws=False, dropout=0)
    assert differences(snapshot_of(snapshots[0]), state_of(fresh)) == []
    drained, _ = train_steps(3, "sequential", 4, steps=fresh)
    for taken in snapshots[1:]:
        assert differences(snapshot_of(taken), without_losses(drained)) == []


def without_losses(state: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in state.items() if not name.endswith("losses")}


def test_an_engine_goes_on_from_a_later_step() -> None:
    rates: list[int] = []
    steps = stage_steps(2, learning_rate=lambda step: rates.append(step) or 1e-2)
    engine = Engine(
        steps, schedule="in_step", threads_per_stage=1, first_step=7, record_events=True
    )
    submit_steps(engine, 2)
    engine.drain()
    engine.close()
    assert engine.num_steps == 9 and sorted(rates) == [7, 7, 8, 8]
    assert [step for step, _ in steps[1].take_losses()] == [7, 8]


def test_labels_travel_with_their_batch() -> None:
    seen: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}

    class Looks(BlockStage):
        def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
            seen[self.index].append(labels.clone())
            return super().training_step(x, labels=labels)

    stages = block_stages(3, stage0=Looks, stage1=Looks, stage2=Looks)
    train_steps(3, "stream", 6, steps=stage_steps(3, stages=stages, draws=False, dropout=0))
    for k in range(3):
        assert all(torch.equal(a, b) for a, (_, b) in zip(seen[k], batches(6), strict=True))
    assert seen[0][0].shape == (BATCH_SIZE,)
