"""Starts the two workers of one case, on this host or in two network namespaces."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import Stats
from scpl_compile import compile_model

__all__ = ["Case", "Host", "compile_case", "run_case"]

WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model and batch. steps: of every timed call (filling the pipeline costs one of them).

    method, preset, options: of the program that streams. trainer: options of all on ranks.
    """

    model: str
    inputs: str
    num_classes: int
    batch_size: int
    steps: int
    config: Mapping[str, Any] = field(default_factory=dict)
    split_at: tuple[str, ...] = ()
    method: str = "scpl"
    preset: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Where the ranks run: what comes before the command of a rank, and its environment."""

    address: str = "127.0.0.1"
    prefix: Callable[[int], list[str]] = lambda rank: []
    environment: Callable[[int], dict[str, str]] = lambda rank: {}


def compile_case(case: Case, folder: Path) -> dict[str, Path]:
    """Two programs in two stages, each cut where it balances best: the case's ("scpl"), "bp"."""
    programs = {}
    methods: dict[str, dict[str, Any]] = {
        "scpl": {"method": case.method, "preset": case.preset, "options": dict(case.options)},
        "bp": {"method": "bp"},
    }
    for name, chosen in methods.items():
        programs[name] = folder / name
        compile_model(
            case.model,
            case.inputs,
            num_classes=case.num_classes,
            config=dict(case.config),
            num_stages=2,
            split_at=case.split_at,
            batch_size=case.batch_size,
            threads_per_stage=1,
            out=programs[name],
            **chosen,
        )
    return programs


def run_case(
    case: Case,
    programs: Mapping[str, Path],
    candidates: Sequence[str],
    *,
    repeats: int,
    host: Host | None = None,
    steps: int | None = None,
) -> dict[str, Stats]:
    """Milliseconds per step of every candidate, measured in turn within one run of two ranks.

    Raises:
        RuntimeError: a rank failed; what it said is on stderr.
    """
    host = host or Host()
    num_steps = steps or case.steps
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        arguments = [
            "--scpl", str(programs["scpl"]), "--bp", str(programs["bp"]),
            "--batch-size", str(case.batch_size), "--steps", str(num_steps),
            "--repeats", str(repeats), "--candidates", ";".join(candidates),
            "--trainer", json.dumps(dict(case.trainer)), "--answer", str(answer),
        ]  # fmt: skip
        port = _free_port()
        ranks = [
            subprocess.Popen(
                [*host.prefix(rank), sys.executable, str(WORKER), *arguments],
                env=_environment(rank, host.address, port) | host.environment(rank),
            )
            for rank in (0, 1)
        ]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise RuntimeError(f"the ranks ended with {codes}; see above")
        found = json.loads(answer.read_text())
    return {name: Stats(**one).per_step(num_steps) for name, one in found.items()}


def _environment(rank: int, address: str, port: int) -> dict[str, str]:
    root = str(WORKER.parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    more = {"MASTER_ADDR": address, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return os.environ | more | {name: str(value) for name, value in place.items()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
