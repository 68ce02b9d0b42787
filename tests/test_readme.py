"""What the README shows works: its commands, with fewer steps, and its Python example."""

import re
import runpy
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
OWN_METHOD = ROOT / "tests" / "own_method.py"
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """The lines that begin with a command of ours, comments left out, in their order."""
    lines = (line for block in blocks("") for line in block.splitlines())
    return [
        shlex.split(ln, comments=True) for ln in lines if ln.startswith(("scpl ", "python out/"))
    ]


def test_every_command_runs(
    scpl: Callable[..., Any],
    train: Callable[..., Any],
    net_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(net_file, "my_model.py")
    shutil.copy(OWN_METHOD, "my_method.py")
    seen = set()
    for program, *arguments in commands():
        name = arguments[0] if program == "scpl" else "train.py"
        seen.add(name)
        if name in ("compile", "plan", "evaluate"):
            extra = ["--no-verify"] if name == "compile" else []
            result = scpl(*arguments, *extra)
            assert result.exit_code == 0, result.output
            continue
        directory, options = (
            (Path(arguments[1]), arguments[2:])
            if name == "train"
            else (Path(arguments[0]).parent, arguments[1:])
        )
        few = [] if "--epochs" in options and "digits" in options else ["--steps", "2"]
        if "--resume" in options:
            few = []
        ran = train(directory, *options, *few)
        assert ran.code in (0, None), ran.err
    assert seen == {"compile", "plan", "evaluate", "train", "train.py"}


def test_the_method_of_ones_own_is_the_one_that_the_suites_run() -> None:
    assert OWN_METHOD.read_text("utf-8") in blocks("python")
    assert len(OWN_METHOD.read_text("utf-8").splitlines()) < 60


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    example = tmp_path / "example.py"
    example.write_text(next(block for block in blocks("python") if "resnet18(" in block))
    runpy.run_path(str(example))
    assert "classifier" in capsys.readouterr().out
