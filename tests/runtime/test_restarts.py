"""Ended at any moment, a run goes on from its last complete checkpoint to the same bits."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from processes import Ended, free_port, start_programs, train_ranks, wait_all
from run_files import QUICK, loss_rows, same_bits
from scpl_compile.errors import ProgramError
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime.attempt import Attempt
from scpl_compile.runtime.run_directory import RunDirectory
from scpl_compile.runtime.run_lock import RunLock
from test_run_directory import options

pytestmark = pytest.mark.timeout(180)

LONG = (*QUICK, "--epochs", "4", "--save-every", "4")  # 16 steps
NUM_STEPS = 16
KILLER = Path(__file__).parents[2] / "benchmarks" / "faults" / "killer.py"


def test_killed_ranks_are_started_again_and_end_with_the_same_bits(program: Path) -> None:
    """Before the first checkpoint, and each of the ranks after one."""
    train_ranks(program, *LONG, "--run-dir", "whole")
    kills = [(1, 2), (0, 9), (1, 13)]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", "3", "--monitor-interval", "0.1", str(KILLER), str(program / "train.py"),
        *LONG, "--run-dir", "restarted",
    ]  # fmt: skip
    environment = os.environ | {"KILLS": json.dumps(kills), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, restarted = program / "whole", program / "restarted"
    assert same_bits(whole, restarted)
    assert loss_rows(whole) == loss_rows(restarted)
    resumed = [line for line in done.stderr.splitlines() if line.startswith("resumed after step")]
    steps = [int(line.split()[3]) for line in resumed]
    # The newest that was complete: it is written while the ranks go on.
    assert steps and all(step % 4 == 0 and step <= 12 for step in steps)


def test_a_rank_of_another_host_is_started_again_too(program: Path, tmp_path: Path) -> None:
    """Two agents, as on two hosts: only that of the rank that failed counts the restart."""
    train_ranks(program, *LONG, "--run-dir", "whole")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}",
        "--max-restarts", "2", "--monitor-interval", "0.1", str(KILLER), str(program / "train.py"),
        *LONG, "--run-dir", "restarted", "--force",
    ]  # fmt: skip
    environment = os.environ | {"KILLS": json.dumps([(1, 13)]), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "told").open("w+") as told:
        agents = [subprocess.Popen(command, env=environment, stderr=told) for _ in range(2)]
        codes = [agent.wait(150) for agent in agents]
        told.seek(0)
        text = told.read()
    assert codes == [0, 0], text
    assert re.search(r"^resumed after step (4|8|12) from", text, re.MULTILINE), text
    assert same_bits(program / "whole", program / "restarted")


# ---------------------------------------------------------------------- whose run it is

AGAIN = Attempt(launch="a", number=1)


def begun(path: Path, attempt: Attempt) -> RunDirectory:
    run = RunDirectory(path, "digest", options(), attempt)
    run.begin(0, {})
    return run


def test_another_attempt_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", Attempt(launch="a"))
    assert RunDirectory(run.path, "digest", options(), AGAIN).resume_from is None  # from the start
    checkpoint.save_stage(run.path / "step-00000003", 0, {}, {})
    checkpoint.complete(run.path / "step-00000003", {"step": 3}, 1)
    for chosen in (options(), options(force=True), options(resume=True)):
        again = RunDirectory(run.path, "digest", chosen, AGAIN)
        assert again.resume_from == run.path / "step-00000003"


@pytest.mark.parametrize("launch", ["", "b"])
def test_a_run_of_another_launch_stays(tmp_path: Path, launch: str) -> None:
    run = begun(tmp_path / "run", Attempt(launch=launch))
    with pytest.raises(ProgramError, match="exists; add --resume, --force"):
        RunDirectory(run.path, "digest", options(), AGAIN)
    with pytest.raises(ProgramError, match="exists; add --resume, --force"):
        RunDirectory(run.path, "digest", options(), Attempt(launch=launch))  # not another attempt


def test_the_attempt_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert Attempt.current() == Attempt()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert Attempt.current() == Attempt(launch="job", number=2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # nobody named it
    assert Attempt.current() == Attempt(launch=f"none/{os.getppid()}", number=2)


# ---------------------------------------------------------------------- SIGTERM


def terminated(program: Path, tmp_path: Path, run: str, num_ranks: int) -> list[Ended]:
    """How the ranks end that are all told to, in the middle of training; 0: one process."""
    options = (*QUICK, "--epochs", "5000", "--run-dir", run)
    engine = ("--engine", "threads") if num_ranks == 1 else ()
    ranks = start_programs(program, tmp_path / "logs", *options, *engine, num_ranks=num_ranks)
    end = time.monotonic() + 60
    while not (program / run / "metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.05)
    for rank in ranks:
        assert rank.process.pid is not None
        os.kill(rank.process.pid, signal.SIGTERM)
    return wait_all(ranks)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_sigterm_ends_with_a_checkpoint(program: Path, tmp_path: Path, num_ranks: int) -> None:
    """And with the losses of every step up to it."""
    ended = terminated(program, tmp_path, "run", num_ranks)
    assert [one.code for one in ended] == [143] * num_ranks, ended
    assert not any("Traceback" in one.stderr or one.errors for one in ended)
    (told,) = [line for line in ended[0].stderr.splitlines() if line.startswith("ended by SIGTERM")]
    step = int(told.split()[5].rstrip(";"))
    newest = checkpoint.latest(program / "run")
    assert newest == checkpoint.step_directory(program / "run", step)
    assert checkpoint.read_manifest(newest, 2)["step"] == step
    rows = loss_rows(program / "run")
    assert set(rows) == {(stage, at) for stage in (0, 1) for at in range(step)}


def test_sigterm_to_one_rank_alone_is_told(program: Path, tmp_path: Path) -> None:
    options = (*QUICK, "--epochs", "5000", "--save-every", "2")
    ranks = start_programs(program, tmp_path / "logs", *options)
    end = time.monotonic() + 60
    while checkpoint.latest(program / "run") is None and time.monotonic() < end:
        time.sleep(0.05)
    assert ranks[1].process.pid is not None
    os.kill(ranks[1].process.pid, signal.SIGTERM)
    ended = wait_all(ranks)
    assert all(one.code not in (0, None) for one in ended)
    (told,) = ended[0].errors
    assert "rank 1 was ended by SIGTERM, rank 0 was not" in told and "--resume" in told
    newest = checkpoint.latest(program / "run")
    assert newest is not None and checkpoint.read_manifest(newest, 2)["step"] % 2 == 0


@pytest.mark.parametrize("engine", ["threads", "ranks"])
def test_scpl_train_hands_sigterm_on(program: Path, engine: str) -> None:
    """And nothing is left that runs, or holds the run directory."""
    command = [sys.executable, "-c", "from scpl_compile.cli import main; main()", "train",
               str(program), *QUICK, "--epochs", "5000", "--engine", engine]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 100
        while not (program / "run" / "metrics.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.05)
        process.terminate()
        _, told = process.communicate()
    assert process.returncode == 143 and "Traceback" not in told, told
    assert told.count("ended by SIGTERM after step") == 1
    assert checkpoint.latest(program / "run") is not None
    RunLock(program / "run").release()
