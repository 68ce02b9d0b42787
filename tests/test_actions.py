"""The order of actions, asserted as pictures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scpl_compile.actions import (
    KINDS,
    SCHEDULES,
    Action,
    gates,
    picture,
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
