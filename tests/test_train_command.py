"""How `scpl train` starts a program: in one process, or on ranks where that pays."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import scpl_compile.train_command
from scpl_compile.errors import ProgramError
from scpl_compile.ir import Plan
from scpl_compile.runtime.program import read_plan
from scpl_compile.train_command import train_command

LAUNCHER = [sys.executable, "-m", "scpl_compile.runtime.launcher"]


@pytest.mark.parametrize(
    ("arguments", "num_ranks"),
    [
        ([], 2),
        (["--epochs", "2"], 2),
        (["--schedule", "in_step"], 2),
        (["--schedule", "sequential"], 1),
        (["--schedule", "sequential", "--engine", "ranks"], 2),
        (["--engine", "threads"], 1),
        (["--devices", "foo"], 2),  # which every rank refuses
        (["--engine=threads"], 1),
        (["--help"], 1),
        (["-h"], 1),
    ],
)
def test_stages_that_work_at_the_same_time_get_a_process_each(
    arguments: list[str], num_ranks: int, program: Path
) -> None:
    script = [str(program / "train.py"), *arguments]
    expected = [sys.executable, *script] if num_ranks == 1 else [*LAUNCHER, str(num_ranks), *script]
    assert train_command(program, arguments) == expected


@pytest.mark.parametrize(
    ("schedule", "num_stages", "num_ranks"),
    [("bp", 2, 1), ("gpipe", 2, 2), ("1f1b", 3, 3), ("zb", 4, 2), ("ddp", 3, 2)],
)
def test_the_schedules_of_backpropagation(
    schedule: str,
    num_stages: int,
    num_ranks: int,
    program: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = read_plan(program)
    plan = replace(
        found,
        method="bp",
        stages=tuple(replace(found.stages[0], index=k) for k in range(num_stages)),
        cuts=tuple(replace(found.cuts[0], index=k) for k in range(num_stages - 1)),
        edges=tuple((k, k + 1) for k in range(num_stages - 1)),
        placement=("cpu",) * num_stages,
        schedule=schedule,
    )

    def read(directory: Path) -> Plan:
        return plan

    monkeypatch.setattr(scpl_compile.train_command, "read_plan", read)
    command = train_command(program, [])
    assert command[:-1] == ([sys.executable] if num_ranks == 1 else [*LAUNCHER, str(num_ranks)])


def test_stages_that_share_a_gpu_stay_in_one_process(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(train_command(program, ["--devices", "cuda:0"])) == 4
    assert train_command(program, ["--devices", "cuda:0,cuda:1"])[1] == "-m"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert train_command(program, ["--devices", "auto"])[1] != "-m"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert train_command(program, ["--devices", "auto"])[1] == "-m"


def test_what_is_no_program(program: Path, tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"train.py is missing; write it with: scpl compile"):
        train_command(tmp_path / "nothing", [])
    (program / "plan.json").write_text("{}")
    with pytest.raises(ProgramError, match="compile again with --force"):
        train_command(program, [])


def test_ctrl_c_waits_for_the_end_of_what_was_started(environment: dict[str, str]) -> None:
    """As from a terminal, whose SIGINT reaches the whole process group."""
    child = (
        "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: sys.exit(end())); "
        "end = lambda: time.sleep(0.6) or print('ended', flush=True) or 7; "
        "print('ready', flush=True); time.sleep(60)"
    )
    code = (
        "import sys; from scpl_compile.train_command import run_command; "
        f"sys.exit(run_command([sys.executable, '-c', {child!r}]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 7
        assert process.stdout.read() == "ended\n"
