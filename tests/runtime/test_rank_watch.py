"""What ends a rank: another's failure, a store that is gone or silent; and what does not."""

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import DistNetworkError, HashStore

from processes import Ended, start, wait_all
from scpl_compile.runtime.rank_watch import Watch

pytestmark = pytest.mark.timeout(60)

STAYED = 7
"""The code of a process that its watch has left alone."""


class Gone:
    """The store of a process that has ended."""

    def check(self, keys: Sequence[str]) -> bool:
        """Fails."""
        raise DistNetworkError("connection reset")


class Silent:
    """A store behind a link that is cut."""

    def check(self, keys: Sequence[str]) -> bool:
        """Waits for ever."""
        threading.Event().wait()
        return False


class Unread:
    """A stream whose reader has ended."""

    def write(self, text: str) -> int:
        """Fails."""
        raise BrokenPipeError

    def flush(self) -> None:
        """Fails too."""
        raise BrokenPipeError


class Jumping:
    """A clock on which an hour passes between two looks, as for a process that was stopped."""

    def __init__(self) -> None:
        self.num_looks = 0
        self._clock = time.monotonic

    def __call__(self) -> float:
        self.num_looks += 1
        return self._clock() + 3600.0 * self.num_looks


def watched(case: str) -> None:
    """A rank whose main thread waits for something else."""
    store: Any = {"gone": Gone, "gone and unread": Gone, "silent": Silent}.get(case, HashStore)()
    if case == "gone and unread":
        sys.stdout = sys.stderr = Unread()  # type: ignore[assignment]
    jumping = Jumping()
    if case == "stopped for hours":
        time.monotonic = jumping
    watch = Watch(store, 0 if case == "another failed" else 1, 1, timeout_s=2.0)
    if case == "another failed":
        watch.accuse("too hot")
    if case == "stopped for hours":
        while jumping.num_looks < 12:
            time.sleep(0.05)
        watch.stop()
        os._exit(STAYED)
    time.sleep(30.0)
    os._exit(STAYED)


def ended(case: str, tmp_path: Path) -> Ended:
    (one,) = wait_all(start(watched, [(case,)], tmp_path / "logs"))
    return one


@pytest.mark.parametrize(
    ("case", "told"),
    [
        (
            "gone",
            "error: rank 1 has lost the store of the ranks: rank 0 has ended, or the launcher",
        ),
        ("silent", "error: rank 1 has had no answer from the ranks' store, on the host of rank 0"),
        ("another failed", "error: too hot\n"),
        ("gone and unread", ""),
    ],
)
def test_it_ends_the_rank_and_says_why(case: str, told: str, tmp_path: Path) -> None:
    one = ended(case, tmp_path)
    assert one.code == 1 and one.stderr.startswith(told), one
    assert len(one.stderr.splitlines()) == bool(told)


def test_a_pause_of_the_process_is_no_silence_of_the_store(tmp_path: Path) -> None:
    assert ended("stopped for hours", tmp_path).code == STAYED
