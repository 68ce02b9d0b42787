"""The engine of one rank: one stage, in this process's main thread, between its neighbours.

::

    rank 0   step ─▶ F0 SEND0 B0 U0   F1 SEND1 B1 U1 …
                         │                │
    rank 1               └─▶ RECV0 ─▶ F0 SEND0 B0 U0 …      torch.distributed moves the bytes

Every rank calls `submit` for every batch. A stage that receives runs one batch behind: submit(t)
first posts the receive of batch t, whose shapes it knows by now, and then runs batch t - 1, so that
what the stage before has sent travels while this one computes. `drain` runs the last one.

The lists of actions and their gates are those of actions.py, as in the engine of one process.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from scpl_compile.actions import Action, active_kinds, gates, num_active
from scpl_compile.runtime.engine import Event, StageState
from scpl_compile.runtime.meeting import telling_lost_ranks
from scpl_compile.runtime.ranks import Ranks
from scpl_compile.runtime.stage_step import StageStep
from scpl_compile.runtime.wire import Inbox, Key, Outbox

__all__ = ["LABELS", "RankEngine"]

LABELS = "labels "
"""The labels' name in a message; no name of a tensor of a model ends in a space."""
_TOKENS = 16
"""Tags from here on are of the tokens that open gates: that of step t is 16 + t."""


class RankEngine:
    """Runs the stage of this rank.

    Args:
        stage: of this rank.
        ranks: this rank's place.
        schedule, first_step, starts, record_events, max_events: as of engine.Engine.
        crossings: for the cut before and the one after this stage, the names of what may cross,
            LABELS among them.
    """

    def __init__(
        self,
        stage: StageStep,
        ranks: Ranks,
        *,
        schedule: str,
        crossings: tuple[tuple[str, ...], tuple[str, ...]],
        first_step: int = 0,
        starts: Sequence[int] = (),
        record_events: bool = False,
        max_events: int | None = None,
    ) -> None:
        self.stage = stage
        self.num_steps = first_step
        self.events: deque[Event] = deque(maxlen=max_events)
        self._ranks = ranks
        self._name = f"stage {stage.index} (rank {ranks.rank})"
        self._schedule = schedule
        self._first_step = first_step
        self._starts = tuple(starts) or (0,) * len(ranks.columns)
        self._records = record_events
        self._pending: tuple[int, dict[str, Tensor], Tensor, Key] | None = None
        self._resting_step: int | None = None
        self._tokens: deque[tuple[int, dist.Work | None]] = deque()
        self._passed: set[Action] = set()
        before, after = crossings
        device, k = stage.lane.device, stage.index
        is_first, is_last = k == 0, k == len(ranks.columns) - 1
        gradients = schedule == "bp"
        with telling_lost_ranks(self._name):
            self._inbox = None if is_first else Inbox(ranks.rank_of(k - 1), before, device)
            self._outbox = (
                None if is_last else Outbox(ranks.rank_of(k + 1), after, device, self._inbox)
            )
            self._gradients_in = (
                Inbox(ranks.rank_of(k + 1), after, device) if gradients and not is_last else None
            )
            self._gradients_out = (
                Outbox(ranks.rank_of(k - 1), before, device) if gradients and not is_first else None
            )

    def submit(self, values: dict[str, Tensor], labels: Tensor) -> None:
        """The next step's batch: used by stage 0; of the others' only the shapes are looked at.

        Raises:
            TrainingError: another rank does not answer, or what crosses changes its shape.
        """
        step, key = self.num_steps, batch_key(values, labels)
        self.num_steps += 1
        if step < self._starts[self.stage.index]:
            self.finish()
            self._resting_step = step
            return
        if self._inbox is None:
            self._run(step, values, labels, key)
            return
        if not self._inbox.knows(key):
            self.finish()  # to wait for a header while a batch waits here could be for ever
        # The stage's stream: after what reads that slot now.
        with telling_lost_ranks(self._name), self.stage.lane.scope():
            self._inbox.post(key)
        self.finish()
        self._pending = (step, values, labels, key)

    def finish(self) -> None:
        """Run, or rest through, the step that waits; the other ranks may still be at work."""
        resting, self._resting_step = self._resting_step, None
        if resting is not None:
            self._rest(resting)
        pending, self._pending = self._pending, None
        if pending is not None:
            self._run(*pending)

    def drain(self) -> None:
        """Run what waits here, then wait until every rank has finished what was submitted."""
        self.finish()
        self.stage.lane.synchronize()
        with telling_lost_ranks(self._name):
            # Nothing stays under way: another engine among these ranks would take it for its own.
            self._pass_gates(self.num_steps)
            self._ranks.barrier()

    def snapshot(self, deliver: Callable[[int, StageState], None]) -> None:
        """Call `deliver(stage, state)` with this stage's state after the last submitted step."""
        self.finish()
        deliver(self.stage.index, self.stage.state())

    def check(self) -> None:
        """Nothing: what fails here, fails in this thread."""

    def close(self) -> None:
        """Nothing runs between two calls; what was submitted and not drained is lost."""
        self._pending = self._resting_step = None

    def _rest(self, step: int) -> None:
        """Wait for the update of the stage before: who rests is at most a step before who trains.

        Like a batch, a step of rest waits for the next call: the stage before may run it then.
        """
        before = self._ranks.rank_of(self.stage.index - 1)
        with telling_lost_ranks(self._name):
            with self.stage.activity.waiting():
                dist.recv(torch.empty(1, dtype=torch.int64), before, tag=_TOKENS + step)
            self._send_tokens(step, self._resting(step))

    # ------------------------------------------------------------------ one step

    def _run(self, step: int, values: dict[str, Tensor], labels: Tensor, key: Key) -> None:
        stage, num_stages = self.stage, len(self._ranks.columns)
        with stage.lane.scope():
            for kind in active_kinds(self._schedule, stage.index, num_stages, self._starts, step):
                start = time.perf_counter_ns()
                with telling_lost_ranks(self._name):
                    self._execute(kind, step, values, labels, key)
                if self._records:
                    action = Action(stage.index, kind, step)
                    self.events.append(Event(action, start, time.perf_counter_ns()))

    def _execute(
        self, kind: str, step: int, values: dict[str, Tensor], labels: Tensor, key: Key
    ) -> None:
        stage = self.stage
        match kind:
            case "RECV":
                if self._inbox is not None:
                    with stage.activity.waiting():
                        values = self._inbox.take()
                    stage.activity.saw_queue(float(self._inbox.had_arrived))
                    labels = values.pop(LABELS)
                stage.receive(step, values, labels, None)
            case "F":
                with stage.activity.waiting():
                    self._pass_gates(step)
                stage.forward(step)
            case "SEND":
                assert self._outbox is not None
                sent, labels, _ = stage.outgoing(step)
                with stage.activity.waiting():
                    self._outbox.wait_for_room()
                self._outbox.send(key, {**sent, LABELS: labels})
            case "RECV_B":
                assert self._gradients_in is not None
                with stage.activity.waiting():
                    self._gradients_in.post(key)
                    gradients = self._gradients_in.take()
                stage.take_gradients(step, gradients, None)
            case "B":
                stage.backward(step)
            case "SEND_B":
                assert self._gradients_out is not None
                gradients, _ = stage.input_gradients(step)
                self._gradients_out.send(key, gradients)
            case "U":
                stage.update(step)
                self._open_gates(step)

    def _pass_gates(self, step: int) -> None:
        """Wait for the updates of other ranks that F(step) comes after, if they are submitted."""
        awaited = {
            gate
            for gate in self._gates(self.stage.index, step)
            if gate.stage != self.stage.index and self._first_step <= gate.step < self.num_steps
        }
        for gate in sorted(awaited - self._passed):
            source, tag = self._ranks.rank_of(gate.stage), _TOKENS + gate.step
            dist.recv(torch.empty(1, dtype=torch.int64), source, tag=tag)
        self._passed = awaited

    def _open_gates(self, step: int) -> None:
        """Tell every rank whose F waits for this update, and the next one if it rests."""
        mine = Action(self.stage.index, "U", step)
        waiting = [
            other
            for other in range(len(self._ranks.columns))
            if other != mine.stage
            and any(mine in self._gates(other, later) for later in (step, step + 1))
        ]
        self._send_tokens(step, [*waiting, *self._resting(step)])

    def _resting(self, step: int) -> list[int]:
        """The stage behind this one, if it rests in this step."""
        after = self.stage.index + 1
        return [after] if after < len(self._starts) and step < self._starts[after] else []

    def _send_tokens(self, step: int, stages: Sequence[int]) -> None:
        """Messages of one number."""
        for stage in stages:
            token, to = torch.tensor([step]), self._ranks.rank_of(stage)
            self._tokens.append((step, dist.isend(token, to, tag=_TOKENS + step)))
        while self._tokens and self._tokens[0][0] < step - 1:
            _, work = self._tokens.popleft()
            if work is not None:
                # At once: this step began when all had received the one before; who rests may lag.
                work.wait()

    def _gates(self, stage: int, step: int) -> tuple[Action, ...]:
        if step < self._starts[stage]:
            return ()
        return gates(self._schedule, Action(stage, "F", step), num_active(self._starts, step - 1))


def batch_key(values: dict[str, Tensor], labels: Tensor) -> Key:
    """What the shapes of all that crosses follow from; the same on every rank."""
    return (*(tuple(value.shape) for value in values.values()), tuple(labels.shape))
