"""A rank that is gone, or says nothing: the others notice in time, say it, and end."""

import itertools
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from processes import Ended, Rank, start_programs
from run_files import QUICK
from scpl_compile import compile_model
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime import ranks as ranks_module
from scpl_compile.runtime import ring as ring_module
from scpl_compile.runtime import run as run_module
from scpl_compile.runtime.meeting import Meeting

pytestmark = pytest.mark.timeout(120)

WITHIN_S = 10.0
"""For a rank that was killed (issue: faults survived)."""
TIMEOUT_S = 8.0
"""What --timeout is set to for a rank that says nothing."""
ENDING_S = 12.0
"""What the end may take beyond it: a rank waits some seconds for rank 0 to tell the error."""


@pytest.fixture(scope="module")
def three(net_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program in three stages: its first and last have no cut in common."""
    out = tmp_path_factory.mktemp("three") / "net"
    compile_model(f"{net_file}:build_model", "1x8x8", num_stages=3, out=out)
    return out


def as_from_a_terminal() -> None:
    """Whoever runs the tests may ignore Ctrl-C, as a shell does for its background jobs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def in_the_middle(program: Path, tmp_path: Path, *options: object, num_ranks: int) -> list[Rank]:
    """The ranks, once all of them train."""
    given = (*QUICK, "--epochs", 100_000, "--log-every", 1, "--run-dir", tmp_path / "run", *options)
    ranks = start_programs(
        program, tmp_path / "logs", *given, num_ranks=num_ranks, before=as_from_a_terminal
    )
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
    assert any("has lost" in line or f"rank {victim} has ended" in line for line in told)
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
    assert TIMEOUT_S / 2 < seconds < TIMEOUT_S + ENDING_S
    assert told.startswith("error: ") and "that the link is up" in told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.5, "at least 1"), ("nan", "at least 1"), ("inf", "at most 1e+06"), (1e10, "at most 1e+06")],
)
def test_a_timeout_that_is_none_is_refused(
    seconds: object, told: str, program: Path, train: Callable[..., Any]
) -> None:
    ran = train(program, *QUICK, "--timeout", seconds)
    assert ran.code == 2 and f"give {told}" in ran.error


# ---------------------------------------------------------------------- where nobody talks


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def only_on_rank_1(owner: object, name: str, *, at: int = 1) -> None:
    """Rank 1 is killed as it calls this for the `at`th time."""
    original, count = getattr(owner, name), itertools.count(1)

    def fatal(*arguments: Any, **options: Any) -> Any:
        if os.environ["RANK"] == "1" and next(count) == at:
            die()
        return original(*arguments, **options)

    setattr(owner, name, fatal)


def in_data_loading() -> None:
    only_on_rank_1(run_module, "open_loader")


def in_a_checkpoint() -> None:
    only_on_rank_1(checkpoint, "save_stage", at=2)


def before_the_end() -> None:
    only_on_rank_1(Meeting, "leave")


def as_the_ring_is_made() -> None:
    only_on_rank_1(ring_module.Ring, "__init__")


def as_the_mesh_is_made() -> None:
    only_on_rank_1(ranks_module, "init_device_mesh")


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("where", [as_the_ring_is_made, as_the_mesh_is_made])
def test_a_rank_that_is_killed_while_connections_are_made(
    where: Callable[[], None], num_ranks: int, program: Path, tmp_path: Path
) -> None:
    """At the latest by the timeout."""
    given = (*QUICK, "--timeout", TIMEOUT_S)
    ranks = start_programs(program, tmp_path / "logs", *given, before=where, num_ranks=num_ranks)
    ranks[1].process.join(60)
    start = time.monotonic()
    ended = [rank.ended(start + 60 - time.monotonic()) for rank in (ranks[0], *ranks[2:])]
    assert time.monotonic() - start < TIMEOUT_S + ENDING_S
    assert all(one.code not in (0, None) for one in ended), ended


@pytest.mark.parametrize("where", [in_data_loading, in_a_checkpoint, before_the_end])
def test_a_rank_that_is_killed_while_no_message_is_under_way(
    where: Callable[[], None], program: Path, tmp_path: Path
) -> None:
    """The other one reads its data, waits for a file of the checkpoint, has done all there is."""
    given = (*QUICK, "--epochs", 4, "--save-every", 4)
    ranks = start_programs(program, tmp_path / "logs", *given, before=where)
    ranks[1].process.join(60)
    start = time.monotonic()
    (ended,) = [rank.ended(60) for rank in ranks[:1]]
    assert time.monotonic() - start < WITHIN_S
    assert ranks[1].process.exitcode == -signal.SIGKILL
    (told,) = check_told([ended])
    assert "rank 1 has ended without a word" in told or "has lost its neighbour" in told


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "ddp"])
def test_a_killed_rank_of_backpropagation_is_told_as_well(
    schedule: str, backpropagation: Path, tmp_path: Path
) -> None:
    options = ("--schedule", schedule, "--microbatches", 2)
    ranks = in_the_middle(backpropagation, tmp_path, *options, num_ranks=2)
    ended, seconds = hit(ranks, 1, signal.SIGKILL)
    check_told(ended)
    assert seconds < WITHIN_S


def test_a_device_that_is_none_is_told_by_all(program: Path, tmp_path: Path) -> None:
    ranks = start_programs(program, tmp_path / "logs", *QUICK, "--devices", "foo")
    ended = [rank.ended(60) for rank in ranks]
    assert any("'foo' is no device; write cpu, cuda:0" in line for line in check_told(ended))


@pytest.mark.parametrize("target", [[0], [1], [0, 1]])
def test_ctrl_c_ends_all(target: list[int], program: Path, tmp_path: Path) -> None:
    ranks = in_the_middle(program, tmp_path, num_ranks=2)
    start = time.monotonic()
    for rank in target:
        os.kill(ranks[rank].process.pid or 0, signal.SIGINT)
    ended = [rank.ended(60) for rank in ranks]
    assert time.monotonic() - start < WITHIN_S
    for rank in target:
        assert ended[rank].code in (130, 1) and "Traceback" not in ended[rank].stderr, ended
    assert all(one.code not in (0, None) for one in ended)
