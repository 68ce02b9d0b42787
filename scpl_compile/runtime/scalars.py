"""The rows of metrics.jsonl as TensorBoard's scalars."""

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from scpl_compile.errors import ProgramError

__all__ = ["Scalars", "summary_writer", "tagged"]


def summary_writer() -> Any:
    """The class torch.utils.tensorboard.SummaryWriter, imported where somebody wants it.

    Raises:
        ProgramError: the package tensorboard is missing.
    """
    try:
        return import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise ProgramError(
            f"--tensorboard needs the package tensorboard ({error}); pip install tensorboard"
        ) from error


def tagged(row: Mapping[str, Any]) -> dict[str, float]:
    """The scalars of one row by tag, as in "loss/stage 0/contrast" and "waiting/stage 1"."""
    found: dict[str, float] = {}
    if "losses" in row:
        stage = row["stage"]
        found |= {f"loss/stage {stage}/{name}": value for name, value in row["losses"].items()}
        if stage == 0:  # it is the same in all
            found["lr"] = row["lr"]
    if "validation_accuracy" in row:
        found["accuracy/validation"] = row["validation_accuracy"]
    if "samples_per_second" in row:
        found["samples_per_second"] = row["samples_per_second"]
        for name in ("waiting", "queue_fill"):
            found |= {f"{name}/stage {k}": value for k, value in enumerate(row[name])}
    return found


class Scalars:
    """Writes into `directory`; a resumed run hides what an earlier one wrote from `step` on."""

    def __init__(self, writer: Any, directory: Path, step: int) -> None:
        self._writer = writer(str(directory), purge_step=step)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows of metrics.jsonl."""
        for row in rows:
            for tag, value in tagged(row).items():
                self._writer.add_scalar(tag, value, row["step"])

    def close(self) -> None:
        """Write out what waits."""
        self._writer.close()
