"""SIGTERM: a run ends after the step at hand, with a checkpoint from which --resume goes on.

Slurm, Kubernetes and torchrun's agent send it some seconds before they kill.
"""

import signal
import threading
import time
from types import FrameType

from scpl_compile.errors import TrainingError
from scpl_compile.runtime.ranks import Ranks

__all__ = ["EXIT_CODE", "Termination"]

EXIT_CODE = 128 + signal.SIGTERM
"""What a shell gives for a process that SIGTERM has ended."""
_PATIENCE_S, _PATIENCE = 5.0, 3
"""Seconds, and own steps, after which every other rank must have been told too."""


class Termination:
    """Notes SIGTERM from its making until `restore`; outside the main thread it notes nothing."""

    def __init__(self) -> None:
        self.is_asked = False
        self._last_step: int | None = None
        self._asked_for = 0
        self._asked_at = 0.0
        self._is_set = threading.current_thread() is threading.main_thread()
        self._before = signal.signal(signal.SIGTERM, self._note) if self._is_set else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True

    def is_due(self, num_steps: int, ranks: Ranks | None) -> bool:
        """Whether the run ends after `num_steps` steps: at once, or where the ranks have agreed.

        Raises:
            TrainingError: another rank was not told.
        """
        if not self.is_asked:
            return False
        if ranks is None:
            return True
        if self._last_step is None:
            self._last_step = self._agreed(num_steps, ranks)
        return self._last_step is not None and num_steps >= self._last_step

    def _agreed(self, num_steps: int, ranks: Ranks) -> int | None:
        """The step after which all ranks end; None as long as it is open.

        They hear of it in different steps, and none may wait here for another one, which may wait
        for it in turn, in a batch or a validation. So they go on, and when all were told, rank 0
        names a step that no rank can have passed: the others have each batch from it, or, in
        replicas, are one step ahead.
        """
        if not self._asked_for:
            self._asked_at = time.monotonic()
            ranks.post(f"ending/{ranks.rank}", True)
        self._asked_for += 1
        missing = [
            rank for rank in range(ranks.world_size) if not ranks.find(f"ending/{rank}", bool)
        ]
        if ranks.rank == 0 and not missing:
            ranks.post("last step", num_steps + 2)
        is_late = time.monotonic() > self._asked_at + _PATIENCE_S and self._asked_for > _PATIENCE
        if missing and is_late:
            raise TrainingError(
                f"rank {ranks.rank} was ended by SIGTERM, rank {missing[0]} was not; the newest "
                "checkpoint is that of --save-every, and --resume goes on from it"
            )
        return ranks.find("last step", int)

    def restore(self) -> None:
        """Let SIGTERM do again what it did before."""
        if self._is_set:
            signal.signal(signal.SIGTERM, self._before)
            self._is_set = False
