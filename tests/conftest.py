"""What several test files share: a small model in a file, its program, and ways to run both."""

import os
import runpy
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from json import loads
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from golden_models import GOLDEN, Compile
from scpl_compile.api import Program, compile_model
from scpl_compile.cli import main

NET = '''
from torch import nn


def build_model(width=8, num_classes=10):
    """(B, 1, 8, 8) to (B, num_classes); random by dropout, with state by BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2),
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, num_classes),
    )
'''


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden with what is emitted now"
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """The programs of golden_models by name, each compiled once; not to be written to."""

    @cache
    def compiled(name: str) -> Program:
        return GOLDEN[name].compile(tmp_path_factory.mktemp("golden") / name)

    return compiled


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Stages have threads of their own; a second one per operator costs small tests more than it
    gives, several times as much on a busy machine.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def net_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with `build_model`."""
    path = tmp_path_factory.mktemp("net") / "net.py"
    path.write_text(NET)
    return path


@pytest.fixture(scope="session")
def compiled(net_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of `net_file` in two stages; not to be written to."""
    out = tmp_path_factory.mktemp("compiled") / "net"
    compile_model(f"{net_file}:build_model", "1x8x8", num_stages=2, out=out)
    return out


@pytest.fixture(scope="session")
def backpropagation(net_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of method bp in two stages."""
    out = tmp_path_factory.mktemp("bp") / "net"
    compile_model(f"{net_file}:build_model", "1x8x8", num_stages=2, method="bp", out=out)
    return out


@pytest.fixture
def program(compiled: Path, tmp_path: Path) -> Path:
    """A copy of that program for one test."""
    return Path(shutil.copytree(compiled, tmp_path / "program"))


@pytest.fixture
def scpl() -> Callable[..., Result]:
    """`scpl ARGUMENTS` in this process."""

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(main, list(map(str, arguments)))
        if not isinstance(result.exception, (SystemExit, type(None))):
            raise result.exception
        return result

    return run


@dataclass
class Ran:
    """How a train.py ended: the exit code, and what it printed."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The last line of stdout."""
        return loads(self.stdout.splitlines()[-1])

    @property
    def error(self) -> str:
        """The last line of stderr."""
        return self.stderr.splitlines()[-1]


@pytest.fixture
def train(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ran]:
    """`python DIRECTORY/train.py OPTIONS` in this process."""

    def run(directory: Path, *options: object) -> Ran:
        capsys.readouterr()
        script = str(directory / "train.py")
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("default")
            patch.setattr(sys, "argv", [script, *map(str, options)])
            patch.syspath_prepend(directory)
            patch.delitem(sys.modules, "stages", raising=False)
            code: Any = 0
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as end:
                code = end.code
            sys.modules.pop("stages", None)
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def environment() -> dict[str, str]:
    """For a process of its own: one thread, and this source tree."""
    root = str(Path(__file__).parent.parent)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
