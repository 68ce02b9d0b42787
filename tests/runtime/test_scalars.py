"""TensorBoard's scalars, read back from its files."""

from pathlib import Path
from typing import Any

import pytest

from run_files import read_scalars
from scpl_compile.errors import ProgramError
from scpl_compile.runtime import scalars
from scpl_compile.runtime.scalars import Scalars, summary_writer, tagged

ROWS: list[dict[str, Any]] = [
    {"step": 0, "stage": 0, "losses": {"contrast": 2.0, "cross_entropy": 1.0}, "lr": 0.5},
    {"step": 0, "stage": 1, "losses": {"cross_entropy": 3.0}, "lr": 0.5},
    {"step": 1, "stage": 0, "losses": {"contrast": 1.5, "cross_entropy": 0.5}, "lr": 0.25},
    {"step": 1, "samples_per_second": 100.0, "waiting": [0.5, 0.25], "queue_fill": [1.0, 0.0]},
    {"step": 1, "epoch": 0, "validation_accuracy": 0.75},
]


EXPECTED = {
    "loss/stage 0/contrast": [(0, 2.0), (1, 1.5)],
    "loss/stage 0/cross_entropy": [(0, 1.0), (1, 0.5)],
    "loss/stage 1/cross_entropy": [(0, 3.0)],
    "lr": [(0, 0.5), (1, 0.25)],
    "samples_per_second": [(1, 100.0)],
    "waiting/stage 0": [(1, 0.5)],
    "waiting/stage 1": [(1, 0.25)],
    "queue_fill/stage 0": [(1, 1.0)],
    "queue_fill/stage 1": [(1, 0.0)],
    "accuracy/validation": [(1, 0.75)],
}


def test_rows_have_tags() -> None:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in ROWS:
        for tag, value in tagged(row).items():
            found.setdefault(tag, []).append((row["step"], value))
    assert found == EXPECTED


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = Scalars(summary_writer(), tmp_path / "tensorboard", 0)
    written.add(ROWS)
    written.close()
    assert read_scalars(tmp_path / "tensorboard") == EXPECTED


def test_without_the_package_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'tensorboard'")

    monkeypatch.setattr(scalars, "import_module", missing)
    with pytest.raises(ProgramError, match="needs the package tensorboard .*pip install tensorb"):
        summary_writer()
