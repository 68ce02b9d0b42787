"""The engine of one process: a long-lived worker thread per stage that executes its actions.

::

    trainer.step ──▶ inbox 0 ──▶ worker 0 ──SEND──▶ inbox 1 ──▶ worker 1 ──▶ …
                                    │                             │
                                 F B U                         F B U

The threads and streams are made once; a step makes none. What differs between the schedules is the
list of actions and its gates (actions.py), not the code here.
"""

import atexit
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from scpl_compile.actions import Action, gates, num_active, stage_actions
from scpl_compile.errors import MethodError, TrainingError
from scpl_compile.runtime.board import Board, Message, Stopped
from scpl_compile.runtime.lane import caller_mark
from scpl_compile.runtime.memory import remedy
from scpl_compile.runtime.randomness import is_held, own_draws
from scpl_compile.runtime.stage_step import StageStep

__all__ = ["Engine", "Event", "StageEngine", "StageState", "while_all_rest"]

StageState = tuple[dict[str, Tensor], dict[str, Any]]
"""What StageStep.state gives."""


@dataclass(frozen=True, slots=True)
class Event:
    """One executed action: when it began and ended on the host (time.perf_counter_ns)."""

    action: Action
    start_ns: int
    end_ns: int


class StageEngine(Protocol):
    """What a trainer and a saver need of an engine; see Engine for what each does."""

    num_steps: int
    events: deque[Event]

    def submit(self, values: dict[str, Tensor], labels: Tensor) -> None:
        """Give the batch of the next step."""

    def drain(self) -> None:
        """Wait until every stage has finished every submitted step."""

    def snapshot(self, deliver: Callable[[int, StageState], None]) -> None:
        """Call `deliver(stage, state)` with each own stage's state after the last step."""

    def check(self) -> None:
        """Raises TrainingError if a stage has failed or the engine is closed."""

    def close(self) -> None:
        """Stop; steps that were not drained are lost."""


class Engine:
    """Runs the stages of one process side by side.

    threads_per_stage: intra-op threads of every worker, the same in every schedule: sums of floats
    depend on it. depth: batches that may wait before each stage. max_events: of the
    recorded events the last so many stay. starts: the first step of every stage. actions: the
    endless list of each stage; given by tests that plant faults.

    Raises:
        MethodError: depth or threads_per_stage is below 1.
    """

    def __init__(
        self,
        stages: Sequence[StageStep],
        *,
        schedule: str,
        threads_per_stage: int,
        first_step: int = 0,
        depth: int = 2,
        record_events: bool = False,
        max_events: int | None = None,
        starts: Sequence[int] = (),
        actions: Sequence[Iterator[Action]] | None = None,
    ) -> None:
        if min(depth, threads_per_stage) < 1:
            raise MethodError(
                f"queue depth {depth} and {threads_per_stage} threads per stage: give at least 1"
            )
        self.stages = tuple(stages)
        self.num_steps = first_step
        self.events: deque[Event] = deque(maxlen=max_events)
        starts = tuple(starts) or (0,) * len(self.stages)
        self._board = Board(len(self.stages), depth, first_step, starts)
        lists = actions or [
            stage_actions(schedule, k, len(self.stages), first_step=first_step, starts=starts)
            for k in range(len(self.stages))
        ]
        for stage in self.stages:
            stage.adopt()
        self._workers = _Workers(
            self.stages,
            lists,
            self._board,
            schedule=schedule,
            starts=starts,
            threads_per_stage=threads_per_stage,
            events=self.events if record_events else None,
        )
        # Nobody closes an engine that nobody holds. Without a join: this may run in any thread.
        weakref.finalize(self, self._board.close).atexit = False
        _ENGINES.add(self)

    def submit(self, values: dict[str, Tensor], labels: Tensor) -> None:
        """Give the batch of the next step to stage 0; waits while its inbox is full.

        Raises:
            TrainingError: a stage has failed; its exception is the cause.
        """
        mark = caller_mark([*values.values(), labels])
        with self._telling_failures():
            self._board.send(0, Message(self.num_steps, values, labels, mark))
        self.num_steps += 1

    @property
    def is_busy(self) -> bool:
        """Whether a submitted step is not finished, and may be."""
        return not self._board.is_stopped and min(self._board.num_updates) < self.num_steps

    def drain(self) -> None:
        """Wait until every stage has finished every submitted step."""
        with self._telling_failures():
            self._board.drain(self.num_steps)
        for stage in self.stages:
            stage.lane.synchronize()

    def snapshot(self, deliver: Callable[[int, StageState], None]) -> None:
        """Call `deliver(stage, state)` with each stage's state after the last submitted step.

        Nothing is drained: a stage that is still at work copies its own state between its U(t) and
        F(t+1). One that has finished waits for a batch that nobody has submitted yet, so its state
        is still, and is copied here.
        """

        def serve(stage: int) -> None:
            deliver(stage, self.stages[stage].state())

        with self._telling_failures():
            for stage in self._board.request_after(self.num_steps - 1, serve):
                serve(stage)

    def check(self) -> None:
        """Raises TrainingError if a stage has failed or the engine is closed."""
        if self._board.is_stopped:
            with self._telling_failures():
                raise Stopped

    def close(self) -> None:
        """Stop the workers after the actions at hand; steps that were not drained are lost."""
        self._workers.stop()
        if self._board.failure is None:
            for stage in self.stages:
                stage.lane.synchronize()

    def _telling_failures(self) -> "_TellFailures":
        return _TellFailures(self._board)


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()
"""Those of this process. Tracing patches torch for the process, so it must know who works there."""


@contextmanager
def while_all_rest() -> Iterator[None]:
    """The engines of this process finish what was submitted; then the block runs.

    What another thread submits meanwhile is not held back.

    Raises:
        MethodError: inside own_draws(), where steps that are under way could not end.
    """
    if is_held() and any(engine.is_busy for engine in _ENGINES):
        raise MethodError(
            "a trainer is at work, and inside own_draws() its steps cannot end; build the model "
            "inside, and compile it outside"
        )
    for engine in tuple(_ENGINES):
        with suppress(TrainingError):  # it has failed, or is closed: its trainer tells of it
            engine.drain()
    with own_draws():
        yield


class _Workers:
    """The threads. They do not know the engine, so that one which nobody holds can end.

    A program may end without close(): a thread inside torch at that moment would abort it, so the
    threads are stopped then too.
    """

    def __init__(
        self,
        stages: Sequence[StageStep],
        actions: Sequence[Iterator[Action]],
        board: Board,
        *,
        schedule: str,
        starts: Sequence[int],
        threads_per_stage: int,
        events: deque[Event] | None,
    ) -> None:
        self._board = board
        self._starts = starts
        self._schedule = schedule
        self._threads_per_stage = threads_per_stage
        self._events = events
        self._num_running = len(stages)
        self._lock = threading.Lock()
        self.threads = [
            threading.Thread(
                target=self._work, args=(stage, todo), name=f"stage-{stage.index}", daemon=True
            )
            for stage, todo in zip(stages, actions, strict=True)
        ]
        atexit.register(self.stop)
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Stop after the actions at hand."""
        self._board.close()
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join()

    def _work(self, stage: StageStep, actions: Iterator[Action]) -> None:
        torch.get_num_threads()  # a thread takes the process's number once; ask before it is set
        try:
            torch.set_num_threads(self._threads_per_stage)
            with stage.lane.scope():
                for action in actions:
                    start = time.perf_counter_ns()
                    self._execute(stage, action)
                    if self._events is not None:
                        self._events.append(Event(action, start, time.perf_counter_ns()))
        except Stopped:
            pass
        except BaseException as error:
            self._board.fail(stage.index, error)
        finally:
            self._end()

    def _end(self) -> None:
        with self._lock:
            self._num_running -= 1
            if self._num_running == 0:
                atexit.unregister(self.stop)

    def _execute(self, stage: StageStep, action: Action) -> None:
        board, k, step = self._board, stage.index, action.step
        match action.kind:
            case "RECV":
                stage.activity.saw_queue(board.fill(k))
                with stage.activity.waiting():
                    message = board.receive(k)
                assert message.labels is not None
                stage.receive(message.step, message.values, message.labels, message.mark)
            case "F":
                before = gates(self._schedule, action, num_active(self._starts, step - 1))
                with stage.activity.waiting():
                    board.pass_gates(before)
                stage.forward(step)
            case "SEND":
                values, labels, mark = stage.outgoing(step)
                with stage.activity.waiting():
                    board.send(k + 1, Message(step, values, labels, mark))
            case "RECV_B":
                with stage.activity.waiting():
                    message = board.receive_gradients(k)
                stage.take_gradients(step, message.values, message.mark)
            case "B":
                stage.backward(step)
            case "SEND_B":
                gradients, mark = stage.input_gradients(step)
                board.send_gradients(k - 1, Message(step, gradients, None, mark))
            case "U":
                stage.update(step)
                while (request := board.finish(k, step)) is not None:
                    request()


class _TellFailures:
    """Turns a stopped wait of the caller into the failing stage's error."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, Stopped):
            return
        failure = self._board.failure
        if failure is None:
            raise TrainingError("the trainer is closed; build a new one") from None
        stage, cause = failure
        raise TrainingError(
            f"stage {stage} failed: {type(cause).__name__}: {cause}{remedy(cause)}; "
            "all stages are stopped"
        ) from cause
