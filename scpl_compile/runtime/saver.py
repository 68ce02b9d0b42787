"""Writing checkpoints in the background while the stages go on."""

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from scpl_compile.errors import TrainingError
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime.engine import StageEngine, StageState
from scpl_compile.runtime.stage_step import StageStep

__all__ = ["Saver"]


class Saver:
    """Writes one checkpoint at a time; the next one waits for it.

    stages: those of this process. num_stages: of the plan. is_ready: called in the writer's thread
    when the files of `stages` are written; whether this process is to complete the checkpoint.
    """

    def __init__(
        self, stages: Sequence[StageStep], num_stages: int, is_ready: Callable[[], bool]
    ) -> None:
        self._stages = {stage.index: stage for stage in stages}
        self._num_stages = num_stages
        self._is_ready = is_ready
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future[None] | None = None

    @property
    def is_pending(self) -> bool:
        """Whether there is a checkpoint of which nobody has asked how it ended."""
        return self._written is not None

    def save(
        self,
        engine: StageEngine,
        run: Path,
        facts: Mapping[str, Any],
        before_complete: Callable[[], None] | None,
    ) -> None:
        """Checkpoint after the last step that was submitted to `engine`.

        before_complete: called in the writer's thread when all stages have given their states and
        their files are written, and before the manifest makes the checkpoint complete.

        Raises:
            TrainingError: the checkpoint before this one could not be written.
        """
        self.join(engine)
        directory = checkpoint.step_directory(run, engine.num_steps)
        states: dict[int, StageState] = {}
        lock = threading.Lock()  # two stages may deliver at the same moment
        written = self._written = Future()

        def write() -> None:
            try:
                for stage, (tensors, values) in states.items():
                    self._stages[stage].check_finite(tensors)
                    checkpoint.save_stage(directory, stage, tensors, values)
                if self._is_ready():
                    if before_complete is not None:
                        before_complete()
                    checkpoint.complete(directory, facts, self._num_stages)
                written.set_result(None)
            except BaseException as error:
                written.set_exception(error)

        def deliver(stage: int, state: StageState) -> None:
            with lock:
                states[stage] = state
                if len(states) == len(self._stages):
                    self._writer.submit(write)

        engine.snapshot(deliver)

    def join(self, engine: StageEngine) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            TrainingError: it could not be written, or a stage of `engine` has failed.
        """
        written, self._written = self._written, None
        if written is None:
            return
        while not wait([written], timeout=0.2).done:
            engine.check()  # a stage that failed delivers no state
        try:
            written.result()
        except OSError as error:
            raise TrainingError(f"the checkpoint could not be written: {error}") from error

    def close(self) -> None:
        """Wait for what is being written; warns where it failed and nobody has been told.

        A warning, because an exception here would hide the one that ends the training.
        """
        self._writer.shutdown()
        written = self._written
        if written is not None and written.done() and (error := written.exception()) is not None:
            self._written = None
            warnings.warn(f"the last checkpoint could not be written: {error}", stacklevel=3)
