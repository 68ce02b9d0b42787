"""A rank that is gone, or says nothing: the others notice in time, say it, and end."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from processes import Ended, Rank, start_programs
from run_files import QUICK
from scpl_compile import compile_model

pytestmark = pytest.mark.timeout(120)

WITHIN_S = 10.0
"""For a rank that was killed (issue: faults survived)."""
TIMEOUT_S = 3.0
"""What --timeout is set to for a rank that says nothing."""
ENDING_S = 12.0
"""What the end may take beyond it: a rank waits some seconds for rank 0 to tell the error."""


@pytest.fixture(scope="module")
def three(net_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program in three stages: its first and last have no cut in common."""
    out = tmp_path_factory.mktemp("three") / "net"
    compile_model(f"{net_file}:build_model", "1x8x8", num_stages=3, out=out)
    return out


def in_the_middle(program: Path, tmp_path: Path, *options: object, num_ranks: int) -> list[Rank]:
    """The ranks, once all of them train."""
    given = (*QUICK, "--epochs", 100_000, "--log-every", 1, "--run-dir", tmp_path / "run", *options)
    ranks = start_programs(program, tmp_path / "logs", *given, num_ranks=num_ranks)
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < end:
        if metrics.exists() and f'"stage": {num_ranks - 1}' in metrics.read_text():
            return ranks
        time.sleep(0.05)
    raise AssertionError([rank.ended(0) for rank in ranks])


def hit(ranks: list[Rank], victim: int, number: signal.Signals) -> tuple[list[Ended], float]:
    """How the other ranks end, and how long after the victim was sent this signal."""
    target = ranks[victim].process
    assert target.pid is not None
    start = time.monotonic()
    os.kill(target.pid, number)
    others = [rank for index, rank in enumerate(ranks) if index != victim]
    ended = [rank.ended(start + 60 - time.monotonic()) for rank in others]
    seconds = time.monotonic() - start
    target.kill()
    target.join()
    return ended, seconds


def check_told(ended: list[Ended]) -> list[str]:
    """Every rank has ended, with a line that says why, and no traceback; those lines."""
    assert all(one.code not in (0, None) for one in ended), ended
    assert not any("Traceback" in one.stderr for one in ended), ended
    why = [re.findall(r"^(?:error: .*|rank \d ends: .*)$", one.stderr, re.M) for one in ended]
    assert [len(lines) for lines in why] == [1] * len(ended), ended
    return [line for lines in why for line in lines]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_is_noticed_by_all(victim: int, three: Path, tmp_path: Path) -> None:
    """Rank 0 keeps the store; rank 2 has no cut in common with rank 0."""
    ranks = in_the_middle(three, tmp_path, num_ranks=3)
    ended, seconds = hit(ranks, victim, signal.SIGKILL)
    told = check_told(ended)
    assert seconds < WITHIN_S
    assert any("has lost" in line for line in told)
    if victim:
        assert told[0].startswith("error: ") and told[1].endswith("rank 0 has told the error")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_hung_rank_is_noticed_within_the_timeout(
    victim: int, program: Path, tmp_path: Path
) -> None:
    """A stopped process answers nothing, as one behind a cut link; it may be that of the store."""
    ranks = in_the_middle(program, tmp_path, "--timeout", TIMEOUT_S, num_ranks=2)
    ended, seconds = hit(ranks, victim, signal.SIGSTOP)
    (told,) = check_told(ended)
    assert TIMEOUT_S - 0.5 < seconds < TIMEOUT_S + ENDING_S
    assert told.startswith("error: ") and "that the link is up" in told


def test_a_timeout_of_nothing_is_refused(program: Path, train: Callable[..., object]) -> None:
    ran = train(program, *QUICK, "--timeout", 0.5)
    assert "--timeout is 0.5; give at least 1" in ran.stderr  # type: ignore[attr-defined]
