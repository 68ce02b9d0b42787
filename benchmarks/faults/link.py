"""A link that is cut while two ranks stream over it: how long until each has ended, and why."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.links.main import two_hosts

__all__ = ["link_rows"]

RATE = 1e9
"""Bits per second, before the cut."""
TIMEOUT_S = 15
_PORT = "29533"


def link_rows(program: Path, training: Sequence[object]) -> list[dict[str, object]]:
    """Seconds from the cut to the end of every rank, by --timeout; needs root, as links/main.py.

    Raises:
        RuntimeError: a rank has ended well, or has not told an error.
    """
    run = program / "cut-link"
    arguments = [*training, "--epochs", 10**6, "--run-dir", run, "--timeout", TIMEOUT_S]
    with two_hosts(RATE) as host, tempfile.TemporaryFile("w+") as told:
        ranks = [
            subprocess.Popen(
                [*host.prefix(rank), sys.executable, str(program / "train.py"),
                 *map(str, arguments)],
                env=_environment(rank, host.address) | host.environment(rank), stderr=told,
            )
            for rank in (0, 1)
        ]  # fmt: skip
        while not (run / "metrics.jsonl").exists():
            time.sleep(0.1)
        time.sleep(2.0)
        subprocess.run("ip -n scpl0 link set scplv0 down".split(), check=True)
        seconds = _seconds_until_each_ends(ranks)
        told.seek(0)
        lines = [line for line in told.read().splitlines() if line.startswith("error: ")]
    if not all(rank.returncode for rank in ranks) or len(lines) != len(ranks):
        raise RuntimeError(f"the ranks ended with {[r.returncode for r in ranks]}: {lines}")
    print(*lines, sep="\n", file=sys.stderr)
    return [
        {"benchmark": "faults", "case": f"link cut, --timeout {TIMEOUT_S}",
         "candidate": f"rank {rank}", "metric": "ends after", "unit": "s", "value": value,
         "n": 1, "threads": 1, "device": "cpu"}
        for rank, value in enumerate(seconds)
    ]  # fmt: skip


def _seconds_until_each_ends(ranks: Sequence[subprocess.Popen[bytes]]) -> list[float]:
    start, found = time.monotonic(), dict[int, float]()
    while len(found) < len(ranks):
        for index, rank in enumerate(ranks):
            if index not in found and rank.poll() is not None:
                found[index] = time.monotonic() - start
        time.sleep(0.05)
    return [found[index] for index in range(len(ranks))]


def _environment(rank: int, address: str) -> dict[str, str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": _PORT}
    return os.environ | place | {"MASTER_ADDR": address, "OMP_NUM_THREADS": "1"}
