"""The lock of a run: one process at a time, gone with its process, and no trace on a clean exit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scpl_compile.errors import ProgramError
from scpl_compile.runtime.run_lock import RunLock

IN_USE = r"run is in use by another process; wait for it, or choose another --run-dir"

HOLDS = """
import sys
from pathlib import Path
from scpl_compile.runtime.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def holder(run: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Another process that holds the lock of `run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(run)], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    first = RunLock(tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "other" / ".." / "run"):
        with pytest.raises(ProgramError, match=IN_USE):
            RunLock(path)
    other = RunLock(tmp_path / "run2")
    first.release()
    first.release()
    RunLock(tmp_path / "run").release()
    other.release()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_blocks_nobody(tmp_path: Path, environment: dict[str, str]) -> None:
    with holder(tmp_path / "run", environment) as process:
        with pytest.raises(ProgramError, match=IN_USE):
            RunLock(tmp_path / "run")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert (tmp_path / ".run.lock").exists()
    RunLock(tmp_path / "run").release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_removed_after_it_was_opened_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner lets go between the open and the flock of another; a third one takes the lock."""
    path = tmp_path / "run"
    owner, third = RunLock(path), []
    opened = os.open

    def open_slowly(*arguments: object, **options: object) -> int:
        monkeypatch.undo()
        file = opened(*arguments, **options)  # type: ignore[arg-type]
        owner.release()
        third.append(RunLock(path))
        return file

    monkeypatch.setattr("scpl_compile.runtime.run_lock.os.open", open_slowly)
    with pytest.raises(ProgramError, match=IN_USE):
        RunLock(path)
    third[0].release()
    assert list(tmp_path.iterdir()) == []


def test_folders_that_were_made_for_it_go_where_nothing_is_in_them(tmp_path: Path) -> None:
    RunLock(tmp_path / "a" / "b" / "run").release()
    assert list(tmp_path.iterdir()) == []
    lock = RunLock(tmp_path / "a" / "b" / "run")
    (tmp_path / "a" / "b" / "run").mkdir()
    lock.release()
    assert list((tmp_path / "a" / "b").iterdir()) == [tmp_path / "a" / "b" / "run"]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ProgramError, match=r"file/a/run cannot be written \(.*\); make room, or"):
        RunLock(tmp_path / "file" / "a" / "run")
    assert (tmp_path / "file").read_text() == "mine"
