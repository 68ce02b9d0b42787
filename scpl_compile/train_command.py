"""The command that runs an emitted train.py: one process, or one per stage where that pays."""

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scpl_compile.errors import ProgramError
from scpl_compile.ir import Plan
from scpl_compile.runtime.lane import split_devices
from scpl_compile.runtime.program import read_plan
from scpl_compile.runtime.schedules import is_parallel, num_ranks

__all__ = ["run_command", "train_command"]


def train_command(directory: Path, arguments: Sequence[str]) -> list[str]:
    """How `scpl train` runs the program in `directory` with these arguments of its train.py.

    Ranks, a process per stage, where stages run at the same time: Python's lock does not let the
    threads of one process overlap in small steps. `--engine` among the arguments overrides. Stages
    that share GPUs stay in one process, with a stream each.

    Raises:
        ProgramError: there is no program.
    """
    script = directory / "train.py"
    if not script.is_file():
        raise ProgramError(f"{script} is missing; write it with: scpl compile MODEL -o {directory}")
    is_ours = (directory / "plan.json").is_file()
    count = _count(read_plan(directory), arguments) if is_ours else 1
    if count == 1:
        return [sys.executable, str(script), *arguments]
    launcher = [sys.executable, "-m", "scpl_compile.runtime.launcher", str(count)]
    return [*launcher, str(script), *arguments]


def _count(plan: Plan, arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--schedule", default=plan.schedule)
    parser.add_argument("--devices", default=",".join(plan.placement))
    parser.add_argument("-h", "--help", action="store_true")
    options, _ = parser.parse_known_args(list(arguments))
    if options.help or options.engine == "threads":
        return 1
    if options.engine != "ranks" and not is_parallel(options.schedule):
        return 1
    count = num_ranks(options.schedule, plan.num_stages)
    names = split_devices(options.devices, plan.num_stages)
    gpus = {name for name in names if name.partition(":")[0] == "cuda"}  # others are refused later
    return count if not gpus or len(gpus) >= count else 1


def run_command(command: Sequence[str]) -> int:
    """Its exit code. SIGTERM goes on to it, which then ends with a checkpoint (termination.py).

    Ctrl-C reaches it by itself: the terminal sends it to both, and this one waits for its end.
    """
    with subprocess.Popen(command) as process:
        before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
            signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        }
        try:
            return process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
