"""Schedules: which a plan allows, where they run, and how the stages lie on the ranks."""

from dataclasses import replace

import pytest

from scpl_compile.errors import MethodError
from scpl_compile.runtime.schedules import (
    WHOLE,
    allowed_schedules,
    check_schedule,
    is_parallel,
    stage_columns,
)
from stage_nets import block_plan

SCPL, BP = block_plan(3), block_plan(3, schedule="bp")
DECOUPLED = ("stream", "in_step", "sequential")
BACKPROPAGATION = ("bp", "gpipe", "1f1b", "zb", "ddp")


def test_where_gradients_stop_streaming_is_the_default() -> None:
    assert allowed_schedules(SCPL) == DECOUPLED
    assert allowed_schedules(replace(SCPL, cuts=SCPL.cuts, method="early_exit")) == DECOUPLED


def test_where_gradients_cross_backpropagation_is() -> None:
    assert allowed_schedules(BP) == BACKPROPAGATION


@pytest.mark.parametrize("schedule", DECOUPLED)
def test_decoupled_schedules_run_anywhere(schedule: str) -> None:
    for on_ranks in (False, True):
        assert check_schedule(SCPL, schedule, on_ranks=on_ranks) == schedule


@pytest.mark.parametrize("schedule", BACKPROPAGATION)
def test_those_that_torch_executes_need_ranks(schedule: str) -> None:
    plan = block_plan(4, schedule="bp")
    assert check_schedule(plan, schedule, on_ranks=True) == schedule
    if schedule == "bp":
        assert check_schedule(plan, schedule, on_ranks=False) == "bp"
        return
    count = {"gpipe": 4, "1f1b": 4, "zb": 2, "ddp": 2}[schedule]
    with pytest.raises(MethodError) as told:
        check_schedule(plan, schedule, on_ranks=False)
    assert str(told.value).endswith(
        f"torchrun --standalone --nproc-per-node {count} train.py --schedule {schedule}"
    )


@pytest.mark.parametrize(
    ("plan", "schedule", "method"),
    [(SCPL, "gpipe", "bp"), (SCPL, "ddp", "bp"), (SCPL, "bp", "bp"), (BP, "stream", "scpl")],
)
def test_another_method_is_named_where_the_schedule_is_not_of_this_one(
    plan: object, schedule: str, method: str
) -> None:
    with pytest.raises(MethodError, match=f"schedule '{schedule}'.*method='{method}'.*stages=3"):
        check_schedule(plan, schedule, on_ranks=True)  # type: ignore[arg-type]


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(MethodError, match="'fast' is not one of stream, in_step, sequential, bp"):
        check_schedule(SCPL, "fast", on_ranks=True)


@pytest.mark.parametrize("schedule", [*DECOUPLED, "bp", "gpipe", "1f1b"])
def test_a_rank_holds_one_stage(schedule: str) -> None:
    assert stage_columns(schedule, 4) == (0, 1, 2, 3)


def test_zb_folds_the_stages_into_a_v_and_ddp_has_all_of_them_everywhere() -> None:
    assert stage_columns("zb", 4) == (0, 1, 1, 0)
    assert stage_columns("zb", 6) == (0, 1, 2, 2, 1, 0)
    assert stage_columns(WHOLE, 4) == (0, 0, 0, 0)
    with pytest.raises(MethodError, match="3"):
        stage_columns("zb", 3)


def test_one_stage_after_another_is_not_parallel() -> None:
    parallel = {s for s in (*DECOUPLED, *BACKPROPAGATION) if is_parallel(s)}
    assert parallel == {"stream", "in_step", "gpipe", "1f1b", "zb", "ddp"}
