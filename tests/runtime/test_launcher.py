"""torchrun without its own report of a failure."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, time
rank, what = os.environ["RANK"], sys.argv[1]
os.write(1, f"rank {rank} of {os.environ['WORLD_SIZE']}\\n".encode())  # in one piece
if what == "fails" and rank == "1":
    os.write(2, b"error: a sentence\\n")
    sys.exit(3)
if what == "dies" and rank == "1":
    os.kill(os.getpid(), 9)
if what != "ends":
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("what", "code", "told"),
    [
        ("ends", 0, ""),
        ("fails", 3, "error: a sentence\n"),
        ("dies", 1, "error: rank 1 was ended by SIGKILL\n"),
    ],
)
def test_all_ranks_end_and_what_they_said_is_all_that_is_said(
    what: str, code: int, told: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "scpl_compile.runtime.launcher", "2", str(script), what]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]
    assert (done.returncode, done.stderr) == (code, told)
