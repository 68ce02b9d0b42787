"""Where the stages of one process hand each other their work: bounded, interruptible, one lock."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from scpl_compile.actions import Action
from scpl_compile.runtime.lane import Mark

__all__ = ["Board", "Message", "Stopped"]


class Stopped(Exception):
    """A wait that ended because another stage failed or the engine was closed."""


@dataclass(frozen=True, slots=True)
class Message:
    """What travels: the tensors by name, the labels of the same batch, and when they are there."""

    step: int
    values: dict[str, Tensor]
    labels: Tensor | None
    mark: Mark


class Board:
    """Inboxes of all stages, which updates are finished, and the first failure.

    depth bounds every inbox: a sender waits while the receiver has that many batches before it, so
    a fast stage cannot fill the memory. starts: the first step of every stage; those before count
    as finished.
    """

    def __init__(
        self, num_stages: int, depth: int, first_step: int, starts: Sequence[int] = ()
    ) -> None:
        self._condition = threading.Condition()
        self._depth = depth
        self._inboxes: list[deque[Message]] = [deque() for _ in range(num_stages)]
        self._gradients: list[deque[Message]] = [deque() for _ in range(num_stages)]
        self.num_updates = [max(first_step, k) for k in starts or [0] * num_stages]
        self._requests: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self._failure: tuple[int, BaseException] | None = None
        self._is_closed = False

    @property
    def failure(self) -> tuple[int, BaseException] | None:
        """(stage, exception) of the first stage that failed."""
        return self._failure

    @property
    def is_stopped(self) -> bool:
        """Whether a stage has failed or the board was closed: nothing is handed over any more."""
        return self._is_closed or self._failure is not None

    def _wait(self, ready: Callable[[], bool]) -> None:
        self._condition.wait_for(lambda: ready() or self.is_stopped)
        if self.is_stopped:
            raise Stopped

    def send(self, stage: int, message: Message) -> None:
        """Put `message` before `stage`; waits while its inbox is full."""
        with self._condition:
            self._wait(lambda: len(self._inboxes[stage]) < self._depth)
            self._inboxes[stage].append(message)
            self._condition.notify_all()

    def fill(self, stage: int) -> float:
        """Messages before `stage` over those that fit."""
        with self._condition:
            return len(self._inboxes[stage]) / self._depth

    def receive(self, stage: int) -> Message:
        """The next message for `stage`."""
        with self._condition:
            self._wait(lambda: bool(self._inboxes[stage]))
            message = self._inboxes[stage].popleft()
            self._condition.notify_all()
            return message

    def send_gradients(self, stage: int, message: Message) -> None:
        """Put gradients before `stage`; there is at most one step of them."""
        with self._condition:
            self._gradients[stage].append(message)
            self._condition.notify_all()

    def receive_gradients(self, stage: int) -> Message:
        """The gradients of what `stage` sent."""
        with self._condition:
            self._wait(lambda: bool(self._gradients[stage]))
            return self._gradients[stage].popleft()

    def pass_gates(self, gates: tuple[Action, ...]) -> None:
        """Wait until all these updates are finished."""
        if gates:
            with self._condition:
                self._wait(lambda: all(self.num_updates[g.stage] > g.step for g in gates))

    def finish(self, stage: int, step: int) -> Callable[[], None] | None:
        """The update of `step` is finished in `stage`.

        Where somebody asked for the stage's state after this step, that request is returned
        instead, and `finish` must be called again once it is served.
        """
        with self._condition:
            if requests := self._requests.get((stage, step)):
                return requests.pop(0)
            self._requests.pop((stage, step), None)
            self.num_updates[stage] = step + 1
            self._condition.notify_all()
            return None

    def drain(self, num_steps: int) -> None:
        """Wait until every stage has finished `num_steps` updates; after close() they may have."""
        with self._condition:
            if self._failure or min(self.num_updates) < num_steps:
                self._wait(lambda: min(self.num_updates) >= num_steps)

    def request_after(self, step: int, serve: Callable[[int], None]) -> list[int]:
        """The stages that have finished `step`; the others call serve(stage) when they have.

        Both happen under the lock, so that no stage finishes in between.
        """
        with self._condition:
            if self.is_stopped:
                raise Stopped
            finished = []
            for stage, count in enumerate(self.num_updates):
                if count > step:
                    finished.append(stage)
                else:
                    self._requests.setdefault((stage, step), []).append(partial(serve, stage))
            return finished

    def fail(self, stage: int, error: BaseException) -> None:
        """Stop every stage; the first failure is the one that is told."""
        with self._condition:
            if self._failure is None:
                self._failure = (stage, error)
            self._condition.notify_all()

    def close(self) -> None:
        """End all waits."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()
