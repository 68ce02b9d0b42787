"""Ranks: whether this process is one of several, and which stages of which replica it holds.

That they work together is in test_ranks_train.py and test_ranks_program.py.
"""

from typing import Any

import pytest
import torch

from scpl_compile.errors import MethodError
from scpl_compile.runtime.progress import leads
from scpl_compile.runtime.ranks import Ranks, wants_ranks
from scpl_compile.runtime.schedules import stage_columns

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def launched(patch: pytest.MonkeyPatch, **changes: str) -> None:
    for name, value in {**LAUNCHED, **changes}.items():
        patch.setenv(name, value)


def test_alone_a_process_runs_all_stages(alone: pytest.MonkeyPatch) -> None:
    assert not wants_ranks("auto") and not wants_ranks("threads") and leads()


def test_started_by_a_launcher_it_is_a_rank(alone: pytest.MonkeyPatch) -> None:
    launched(alone)
    assert wants_ranks("auto") and wants_ranks("ranks") and not leads()
    launched(alone, RANK="0", WORLD_SIZE="1")
    assert wants_ranks("auto") and leads()
    assert not wants_ranks("threads")


def test_threads_in_several_processes_are_refused(alone: pytest.MonkeyPatch) -> None:
    launched(alone)
    with pytest.raises(MethodError, match="2 were started; leave out torchrun, or --engine thr"):
        wants_ranks("threads")


@pytest.mark.parametrize("missing", LAUNCHED)
def test_ranks_without_a_launcher_name_it(alone: pytest.MonkeyPatch, missing: str) -> None:
    launched(alone)
    alone.delenv(missing)
    with pytest.raises(MethodError, match=f"{missing} is not set.*torchrun --standalone --nproc"):
        wants_ranks("ranks")
    assert not wants_ranks("auto")


def test_another_engine_is_refused(alone: pytest.MonkeyPatch) -> None:
    with pytest.raises(MethodError, match="engine 'fast' is not one of auto, threads, ranks"):
        wants_ranks("fast")


def place(rank: int, world_size: int, columns: tuple[int, ...]) -> Ranks:
    nothing: Any = None
    return Ranks(
        rank=rank, world_size=world_size, columns=columns, device=torch.device("cpu"),
        mesh=nothing, store=nothing, watch=nothing, ring=nothing, owns_group=False,
    )  # fmt: skip


def test_replicas_are_rows_and_stages_are_columns() -> None:
    ranks = [place(rank, 6, (0, 1, 2)) for rank in range(6)]
    assert [r.stages for r in ranks] == [(0,), (1,), (2,)] * 2
    assert [r.replica for r in ranks] == [0, 0, 0, 1, 1, 1]
    assert ranks[4].rank_of(0) == 3 and ranks[4].rank_of(2) == 5
    assert {(r.num_replicas, r.num_columns) for r in ranks} == {(2, 3)}


def test_a_v_holds_two_stages_and_ddp_all() -> None:
    assert [place(r, 2, stage_columns("zb", 4)).stages for r in range(2)] == [(0, 3), (1, 2)]
    ranks = [place(r, 2, stage_columns("ddp", 4)) for r in range(2)]
    assert [r.stages for r in ranks] == [(0, 1, 2, 3)] * 2
    assert [r.replica for r in ranks] == [0, 1]


def test_a_failure_is_told_with_its_rank_and_stage() -> None:
    assert place(0, 2, (0, 1)).place == ""
    assert place(1, 2, (0, 1)).place == "rank 1 (stage 1): "
    assert place(1, 2, (0, 1, 1, 0)).place == "rank 1 (stage 1, 2): "
