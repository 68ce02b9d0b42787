"""The order of actions, asserted as pictures."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleZBVZeroBubble

from scpl_compile.actions import (
    KINDS,
    PIPELINES,
    SCHEDULES,
    Action,
    gates,
    picture,
    pipeline_actions,
    pipeline_timeline,
    placement,
    stage_actions,
    step_kinds,
    timeline,
)
from scpl_compile.errors import MethodError


def draw(schedule: str, num_stages: int, num_steps: int) -> list[str]:
    return picture(timeline(schedule, num_stages, num_steps)).splitlines()


def test_stream_has_no_bubble_between_batches() -> None:
    assert draw("stream", 3, 3) == [
        "F0 B0 F1 B1 F2 B2 .  .",
        ".  F0 B0 F1 B1 F2 B2 .",
        ".  .  F0 B0 F1 B1 F2 B2",
    ]


def test_in_step_overlaps_within_a_batch_only() -> None:
    assert draw("in_step", 3, 2) == [
        "F0 B0 .  .  F1 B1 .  .",
        ".  F0 B0 .  .  F1 B1 .",
        ".  .  F0 B0 .  .  F1 B1",
    ]


def test_sequential_runs_one_stage_at_a_time() -> None:
    assert draw("sequential", 2, 2) == [
        "F0 B0 .  .  F1 B1 .  .",
        ".  .  F0 B0 .  .  F1 B1",
    ]


def test_bp_waits_for_the_gradient_of_all_later_stages() -> None:
    assert draw("bp", 3, 2) == [
        "F0 .  .  .  .  B0 F1 .  .  .  .  B1",
        ".  F0 .  .  B0 .  .  F1 .  .  B1 .",
        ".  .  F0 B0 .  .  .  .  F1 B1 .  .",
    ]


def test_a_slow_stage_sets_the_period_of_stream() -> None:
    times = timeline("stream", 2, 4, duration={"F": 1, "B": 2})
    assert times[Action(1, "U", 3)][1] == 1 + 4 * 3


@given(st.integers(0, 99), st.sampled_from(KINDS), st.integers(0, 10**6))
def test_an_action_reads_back_from_its_text(stage: int, kind: str, step: int) -> None:
    action = Action(stage, kind, step)
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "1G2", "1F", "1F0 ", "-1F0"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(MethodError, match="is no action"):
        Action.parse(text)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_every_stage_updates_once_a_step_after_its_backward(schedule: str, num_stages: int) -> None:
    for stage in range(num_stages):
        kinds = step_kinds(schedule, stage, num_stages)
        assert kinds.index("F") < kinds.index("B") < kinds.index("U") == len(kinds) - 1
        assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_gate_is_an_update_that_the_plain_order_has_before(schedule: str) -> None:
    for stage in range(4):
        for step in range(3):
            for gate in gates(schedule, Action(stage, "F", step), 4):
                assert gate.kind == "U"
                assert (gate.step, gate.stage) < (step, stage)


def test_actions_go_on_from_the_first_step() -> None:
    actions = stage_actions("stream", 1, 2, first_step=7)
    assert [str(next(actions)) for _ in range(5)] == ["1RECV7", "1F7", "1B7", "1U7", "1RECV8"]


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(MethodError, match="'gipe' is not one of stream, in_step, sequential, bp"):
        gates("gipe", Action(0, "F", 0), 2)


# ---------------------------------------------------------------------- micro-batches


def draw_pipeline(schedule: str, num_stages: int, num_microbatches: int) -> list[str]:
    return picture(pipeline_timeline(schedule, num_stages, num_microbatches)).splitlines()


def test_gpipe_runs_all_forwards_first() -> None:
    assert draw_pipeline("gpipe", 3, 2) == [
        "F0 F1 .  .  .  .  .  .  B0 B0 B1 B1",
        ".  F0 F1 .  .  .  B0 B0 B1 B1 .  .",
        ".  .  F0 F1 B0 B0 B1 B1 .  .  .  .",
    ]


def test_1f1b_goes_back_as_soon_as_it_can() -> None:
    assert draw_pipeline("1f1b", 2, 3) == [
        "F0 F1 .  .  B0 B0 F2 B1 B1 .  B2 B2",
        ".  F0 B0 B0 F1 B1 B1 F2 B2 B2 .  .",
    ]


def test_zb_goes_down_and_up_the_ranks_and_leaves_the_weights_for_the_end() -> None:
    """Rank 0 holds the first row and the last, rank 1 the two between."""
    assert draw_pipeline("zb", 4, 3) == [
        "F0 F1 F2 .  .  .  .  .  .  I0 W0 .  .  .  I1 W1 I2 W2 .",
        ".  F0 .  F1 .  .  .  F2 I0 W0 .  .  .  I1 .  I2 W1 .  W2",
        ".  .  F0 .  F1 I0 W0 .  .  .  F2 I1 W1 .  I2 .  .  W2 .",
        ".  .  .  F0 I0 W0 F1 I1 W1 .  .  F2 I2 W2 .  .  .  .  .",
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 5, 8])
def test_the_orders_are_those_of_torch(num_ranks: int, num_microbatches: int) -> None:
    known: Any = SimpleNamespace(
        _num_stages=num_ranks, pp_group_size=num_ranks, num_stages=2 * num_ranks,
        _n_microbatches=num_microbatches,
    )  # fmt: skip
    gpipe: Any = ScheduleGPipe._get_pipeline_order(known)
    one_each: Any = Schedule1F1B._get_pipeline_order(known)
    for rank in range(num_ranks):
        zb: Any = ScheduleZBVZeroBubble._calculate_single_rank_operations(known, rank)
        theirs = {"gpipe": gpipe[rank], "zb": zb}
        if rank < num_ranks - 1 <= num_microbatches:  # theirs of the last rank begins with F1
            theirs["1f1b"] = one_each[rank]
        for schedule, order in theirs.items():
            ours = pipeline_actions(schedule, rank, num_ranks, num_microbatches)
            assert list(map(str, ours)) == [str(a) for a in order if a and "REDUCE" not in str(a)]


@pytest.mark.parametrize("schedule", PIPELINES)
@given(st.integers(1, 5), st.integers(1, 12))
def test_every_micro_batch_goes_through_every_stage_once(
    schedule: str, half: int, num_microbatches: int
) -> None:
    times = pipeline_timeline(schedule, 2 * half, num_microbatches)
    kinds = "FIW" if schedule == "zb" else "FB"
    assert set(times) == {
        Action(k, kind, m)
        for k in range(2 * half)
        for kind in kinds
        for m in range(num_microbatches)
    }


def test_zb_is_placed_along_a_v() -> None:
    assert placement("zb", 6) == (0, 1, 2, 2, 1, 0)
    assert placement("1f1b", 3) == placement("gpipe", 3) == (0, 1, 2)
    with pytest.raises(MethodError, match="cannot place 3; compile again with --stages 4"):
        placement("zb", 3)
    with pytest.raises(MethodError, match="'stream' is not one of gpipe, 1f1b, zb"):
        placement("stream", 2)
