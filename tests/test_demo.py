"""`scpl demo`: both methods are compiled, trained and told."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from scpl_compile import demo
from scpl_compile.demo_net import build_net
from scpl_compile.errors import TrainingError
from scpl_compile.runtime.program import read_plan


@pytest.fixture
def in_process(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs the demo's programs in this process, for one epoch; gives their command lines."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        ran = train(Path(command[1]).parent, *command[2:])
        return subprocess.CompletedProcess(command, ran.code, ran.stdout, ran.stderr)

    monkeypatch.setattr(demo.subprocess, "run", run)
    monkeypatch.setattr(demo, "_EPOCHS", 1)
    return commands


def test_the_net_takes_digits() -> None:
    assert build_net()(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_the_demo_compares_two_methods_and_leaves_two_programs(
    in_process: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the second replaces the first
        results = demo.run_demo(tmp_path / "demo")
    assert json.loads(json.dumps(results)) == results
    assert results["seconds"] > 0
    assert [Path(command[1]) for command in in_process[:2]] == [
        tmp_path / "demo" / "train.py", tmp_path / "demo-bp" / "train.py",
    ]  # fmt: skip
    for method, directory in (("scpl", "demo"), ("bp", "demo-bp")):
        assert read_plan(tmp_path / directory).method == method
        assert (tmp_path / directory / "run" / "final.safetensors").is_file()
        assert 0 < results[method]["accuracy"] <= 1
    out, err = capsys.readouterr()
    assert out == ""
    for method, name in (("scpl", "SCPL, 2 stages at once"), ("bp", "backpropagation")):
        row = next(line for line in err.splitlines() if line.startswith(name))
        assert f"{100 * results[method]['accuracy']:.2f} % on the test split" in row
    assert f"python {tmp_path}/demo/train.py --epochs 5" in err


def test_the_command_prints_one_object(
    in_process: list[list[str]],
    scpl: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"scpl": {"accuracy": 0.5}, "bp": {"accuracy": 0.6}, "seconds": 1.0}
    monkeypatch.setattr(demo, "run_demo", lambda out: found | {"out": str(out)})
    result = scpl("demo", "-o", tmp_path / "x", "--json")
    assert json.loads(result.stdout) == found | {"out": str(tmp_path / "x")}


def test_a_program_that_fails_is_told(
    in_process: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_EPOCHS", 0)
    with pytest.raises(TrainingError, match=r"demo/train\.py ended with exit code 2"):
        demo.run_demo(tmp_path / "demo")
