"""The engine of one rank for schedules that torch executes: one whole batch at a time.

::

    submit ─▶ run(values, labels)   gpipe, 1f1b, zb: micro-batches over the ranks (pipelined.py)
                    │               ddp: the unsplit model on this rank's share (whole.py)
                    └─▶ the optimizer of every stage of this rank
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scpl_compile.runtime.engine import Event, StageState
from scpl_compile.runtime.meeting import telling_lost_ranks
from scpl_compile.runtime.ranks import Ranks
from scpl_compile.runtime.stage_step import StageStep

__all__ = ["BatchEngine"]

Run = Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]
"""Forward and backward of a batch; gives the losses by name where the last stage is, else none."""


class BatchEngine:
    """Runs batches one after another; the calls are those of engine.Engine.

    stages: of this rank. run: forward and backward of one batch over all ranks.
    """

    def __init__(
        self, stages: Sequence[StageStep], ranks: Ranks, run: Run, first_step: int
    ) -> None:
        self.num_steps = first_step
        self.events: deque[Event] = deque()
        self._stages = tuple(stages)
        self._ranks = ranks
        self._run = run

    def submit(self, values: dict[str, Tensor], labels: Tensor) -> None:
        """One step on this batch.

        Raises:
            TrainingError: another rank does not answer.
        """
        num_samples = next(iter(values.values())).shape[0]
        with telling_lost_ranks(f"rank {self._ranks.rank}"):
            losses = self._run(values, torch.cat([labels] * (num_samples // labels.shape[0])))
        for stage in self._stages:
            stage.update_after(self.num_steps, losses if stage is self._stages[-1] else {})
        self.num_steps += 1

    def finish(self) -> None:
        """Nothing waits here."""

    def drain(self) -> None:
        """Wait for all ranks."""
        for stage in self._stages:
            stage.lane.synchronize()
        with telling_lost_ranks(f"rank {self._ranks.rank}"):
            self._ranks.barrier()

    def snapshot(self, deliver: Callable[[int, StageState], None]) -> None:
        """Call `deliver(stage, state)` with each own stage's state after the last step."""
        for stage in self._stages:
            deliver(stage.index, stage.state())

    def check(self) -> None:
        """Nothing: what fails here, fails in this thread."""

    def close(self) -> None:
        """Nothing runs between two calls."""
