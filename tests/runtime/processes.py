"""Ranks as processes of one host, started without a launcher.

They are forked from one server that has imported torch, so that a rank starts in a moment.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

SECONDS = 60.0
"""Within which all ranks must have ended; reached only where a test fails."""
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed.pipelining", "scpl_compile.api"])


@dataclass(frozen=True)
class Ended:
    """How a rank ended (a negative code is a signal's), and what it printed."""

    code: int | None
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The lines that tell an error."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Rank:
    """A process that runs, and where it prints."""

    process: BaseProcess
    log: Path

    def ended(self, seconds: float) -> Ended:
        self.process.join(max(seconds, 0.0))
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        printed = [Path(f"{self.log}.{name}") for name in ("out", "err")]
        texts = [path.read_text() if path.exists() else "" for path in printed]
        return Ended(code, *texts)


def start(work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], logs: Path) -> list[Rank]:
    """A process per element of `arguments`, with the environment of its rank."""
    logs.mkdir(parents=True, exist_ok=True)
    port, count = free_port(), len(arguments)
    ranks = []
    for rank, given in enumerate(arguments):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        log = logs / str(rank)
        process = _CONTEXT.Process(target=_work, args=(work, given, environment, log))
        process.start()
        ranks.append(Rank(process, log))
    return ranks


def wait_all(ranks: Iterable[Rank]) -> list[Ended]:
    """How all of them end; None as a code where one had to be killed here."""
    end = time.monotonic() + SECONDS
    return [rank.ended(end - time.monotonic()) for rank in ranks]


def _work(
    work: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], log: Path
) -> None:
    os.environ.update(environment)
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{log}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644), number)
    torch.set_num_threads(1)
    work(*arguments)
    sys.stdout.flush()


def run_program(directory: Path, options: Sequence[object], before: Callable[[], Any]) -> None:
    """`python DIRECTORY/train.py OPTIONS` in this process; `before` changes it first."""
    before()
    sys.argv = [str(directory / "train.py"), *map(str, options)]
    sys.path.insert(0, str(directory))
    sys.modules.pop("stages", None)
    runpy.run_path(sys.argv[0], run_name="__main__")


def nothing() -> None:
    """Nothing."""


def start_programs(
    directory: Path | Sequence[Path],
    logs: Path,
    *options: object,
    num_ranks: int = 2,
    others: Sequence[object] = (),
    before: Callable[[], Any] = nothing,
) -> list[Rank]:
    """The program in every rank; others: options of all ranks but rank 0, after the rest."""
    homes = [directory] * num_ranks if isinstance(directory, Path) else directory
    given = [
        (home, (*options, *(others if rank else ())), before) for rank, home in enumerate(homes)
    ]
    return start(run_program, given, logs)


def train_ranks(directory: Path | Sequence[Path], *options: object, **how: Any) -> list[Ended]:
    """The program in every rank until all have ended."""
    home = directory if isinstance(directory, Path) else directory[0]
    count = len(list(home.parent.glob("logs*")))
    return wait_all(start_programs(directory, home.parent / f"logs{count}", *options, **how))
