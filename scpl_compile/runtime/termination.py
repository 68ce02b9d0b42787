"""SIGTERM: a run ends after the step at hand, with a checkpoint from which --resume goes on.

Slurm, Kubernetes and torchrun's agent send it some seconds before they kill.
"""

import signal
import threading
from types import FrameType

from scpl_compile.runtime.ranks import Ranks
from scpl_compile.runtime.trainer import Trainer

__all__ = ["EXIT_CODE", "Termination"]

EXIT_CODE = 128 + signal.SIGTERM
"""What a shell gives for a process that SIGTERM has ended."""


class Termination:
    """Notes SIGTERM from its making until `restore`; outside the main thread it notes nothing."""

    def __init__(self) -> None:
        self.is_asked = False
        self._last_step: int | None = None
        self._is_set = threading.current_thread() is threading.main_thread()
        self._before = signal.signal(signal.SIGTERM, self._note) if self._is_set else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True

    def is_due(self, trainer: Trainer, ranks: Ranks | None) -> bool:
        """Whether the run ends with this step: the ranks hear of it in different ones, and the
        furthest rank's is the last.

        Raises:
            TrainingError: another rank was not told.
        """
        if not self.is_asked:
            return False
        if self._last_step is None:
            trainer.finish_own()  # what waits here, other ranks wait for
            step = trainer.num_steps
            self._last_step = step if ranks is None else ranks.furthest(step)
        return trainer.num_steps >= self._last_step

    def restore(self) -> None:
        """Let SIGTERM do again what it did before."""
        if self._is_set:
            signal.signal(signal.SIGTERM, self._before)
            self._is_set = False
