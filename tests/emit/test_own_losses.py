"""Losses of one's own in the emitted text: one function per class, as linters want it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from own_files import EXITS, layers, own_file
from scpl_compile import Program, compile_model
from scpl_compile.errors import SourceError
from scpl_compile.runtime.program import load_stages

BOTH = """if view.index == 1:
            return (module_loss(Trainer, view.sends, view, {"a": 1}),)"""


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Of three local losses: the first and the third of one class, the second of another, whose
    name is that of a function of the program.
    """
    folder = tmp_path / "f"
    folder.mkdir()
    method = own_file(
        folder,
        losses=BOTH,
        steps=EXITS,
        options='{"b": 0.5}',
    )
    path = folder / "mine.py"
    path.write_text(
        path.read_text().replace("class Mine", "class Trainer(Loss):\n    pass\n\nclass Mine")
    )
    return compile_model(layers(), "8", split_at=["0", "2", "4"], num_classes=3, method=method)


def text_of(program: Program) -> str:
    return (program.directory / "stages.py").read_text()


def test_a_class_is_loaded_in_one_function(program: Program) -> None:
    text = text_of(program)
    assert text.count("load_callable(") == 2
    assert text.count("= build_loss(num_classes=3") == 2
    assert text.count("= build_trainer_(num_classes=3") == 1
    assert program.verification.is_verified
    with program.trainer() as trainer:
        trainer.step(torch.randn(6, 8), torch.arange(6) % 3)
        names = [type(getattr(s.module, "local_loss", None)).__name__ for s in trainer._stages]
    assert names == ["Loss", "Trainer", "Loss", "NoneType"]


@pytest.mark.parametrize(
    "command", [["check", "--select", "E,F,W,I,B,UP,PIE,C4,RET"], ["format", "--check"]],
    ids=["check", "format"],
)  # fmt: skip
def test_linters_want_it_so(command: list[str], program: Program, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--isolated", "--no-cache", "--line-length=100",
         str(program.directory)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_file_that_has_changed_is_told_when_a_stage_is_built(
    program: Program, tmp_path: Path
) -> None:
    path = tmp_path / "f" / "mine.py"
    path.write_text(path.read_text() + "\n")
    stages = load_stages(program.directory, program.plan)
    with pytest.raises(SourceError, match="mine.py has changed"):
        stages.STAGES[0](layers())
