"""Who ends without a word is noticed by the rank before it; who says goodbye is not."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from processes import Ended, start, wait_all
from scpl_compile.runtime.ring import Ring

pytestmark = pytest.mark.timeout(120)

ENDED = 7
"""The code of a rank that has noticed."""


def in_a_ring(does: str) -> None:
    """Rank 1 of three does it; the others wait for nobody but the ring."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank = dist.get_rank()

    def notice(other: int) -> None:
        print(f"{other} has ended", flush=True)
        os._exit(ENDED)

    ring = Ring(rank, 3, notice, 30.0)
    dist.barrier()
    if rank == 1 and does == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "dies":
        time.sleep(3.0)
        os._exit(0)
    if rank == 1 and does == "leaves late":
        time.sleep(3.0)
    if rank == 1 and does == "has another default dtype":
        torch.set_default_dtype(torch.float64)
    ring.close()
    dist.destroy_process_group()


def ended(does: str, tmp_path: Path) -> list[Ended]:
    return wait_all(start(in_a_ring, [(does,)] * 3, tmp_path / "logs"))


def test_the_rank_before_notices(tmp_path: Path) -> None:
    zero, one, two = ended("dies", tmp_path)
    assert one.code == -signal.SIGKILL
    assert (zero.code, zero.stdout) == (ENDED, "1 has ended\n"), zero
    assert two.code in (0, ENDED) and "1 has" not in two.stdout  # it may notice that rank 0 ends


@pytest.mark.parametrize("does", ["leaves", "leaves late", "has another default dtype"])
def test_who_says_goodbye_is_not_missed(does: str, tmp_path: Path) -> None:
    for one in ended(does, tmp_path):
        assert (one.code, one.stdout) == (0, ""), one
        assert "Traceback" not in one.stderr
