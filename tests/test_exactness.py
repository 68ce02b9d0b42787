"""Streaming over batches computes bit for bit what one stage after another computes.

Compared is all that a stage owns (parameters, both kinds of buffers, optimizer state, random
state) and the losses of every step; the cases are those of benchmarks/exactness, which runs them
longer; test_exactness_faults.py shows that the comparison finds faults.
"""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest

from benchmarks.exactness.main import (
    CASES,
    SMALL_CUTS,
    STEPS,
    Batches,
    Outcome,
    differences,
    overlaps,
    run,
)
from scpl_compile import Program
from scpl_compile.actions import SCHEDULES, Action, step_kinds
from scpl_compile.runtime.engine import Event

SMALL = CASES["small_net"]


@cache
def small(num_stages: int) -> tuple[Program, Batches, Outcome]:
    """The small net's program, its batches, and what `sequential` makes of them."""
    places = {"split_at": SMALL_CUTS} if num_stages == len(SMALL_CUTS) + 1 else {}
    program = SMALL.compile(num_stages, **places)
    batches = SMALL.batches(program, [SMALL.batch_size] * STEPS)
    return program, batches, run(program, batches, "sequential")


# ---------------------------------------------------------------------- equal in every bit


@pytest.mark.parametrize("num_stages", range(1, 7))
def test_the_schedules_leave_the_same_bits(num_stages: int) -> None:
    program, batches, expected = small(num_stages)
    for repeat in range(3):
        for schedule in ("stream", "in_step"):
            found = run(program, batches, schedule, jitter=repeat)
            assert differences(found, expected) == []


@pytest.mark.parametrize("num_stages", [2, 4])
def test_stream_is_exact_in_twenty_repeats(num_stages: int) -> None:
    program, batches, expected = small(num_stages)
    for repeat in range(20):
        found = run(program, batches, "stream", jitter=100 + repeat)
        assert differences(found, expected) == []


@pytest.mark.parametrize(
    ("name", "smaller", "optimizer", "num_stages"),
    [
        ("balanced_cnn", {"batch_size": 16}, "adam", 2),
        ("resnet18", {"batch_size": 8, "inputs": "3x32x32"}, "sgd", 2),
        ("text_transformer", {}, "adamw", 4),
    ],
)
def test_larger_models(name: str, smaller: dict[str, Any], optimizer: str, num_stages: int) -> None:
    """The first two are what benchmarks/throughput measures, with smaller batches."""
    case = replace(CASES[name], **smaller)
    program = case.compile(num_stages)
    batches = case.batches(program, [case.batch_size] * STEPS)
    train = partial(run, program, batches, optimizer=optimizer)
    expected = train("sequential")
    for repeat in range(2):
        found = train("stream", jitter=repeat)
        assert differences(found, expected) == []
        assert overlaps(found.events)
    assert differences(train("in_step", jitter=0), expected) == []


@pytest.mark.parametrize("options", [{"queue_depth": 1}, {"random_stages": None}])
def test_whatever_the_queues_hold_and_whoever_takes_the_lock(options: dict[str, Any]) -> None:
    program, batches, expected = small(4)
    assert differences(run(program, batches, "stream", jitter=0, **options), expected) == []


def test_small_batches_and_a_batch_of_one_in_the_stream() -> None:
    program = SMALL.compile(4)
    batches = SMALL.batches(program, [6, 6, 3, 6, 1, 6, 1, 1, 6, 2, 6])
    expected = run(program, batches, "sequential")
    for schedule in ("stream", "in_step"):
        assert differences(run(program, batches, schedule, jitter=0), expected) == []


def test_two_views_of_every_sample() -> None:
    case = replace(SMALL, batch_size=5, views=2)
    program = case.compile(4)
    batches = case.batches(program, [5] * STEPS)
    assert batches[0][0][0].shape[0] == 10 and batches[0][1].shape[0] == 5
    expected = run(program, batches, "sequential")
    assert differences(run(program, batches, "stream", jitter=0), expected) == []


# ---------------------------------------------------------------------- what was compared


def test_the_comparison_covers_all_that_changes() -> None:
    """Every kind of state is there, and was changed by the training."""
    program, batches, trained = small(6)
    untrained = run(program, [], "sequential")
    changed = differences(trained, untrained)
    for kind in (
        "stage 0 module.embed.0.weight",
        "stage 1 module.lstm.lstm.weight_hh_l1",
        "stage 2 module.attention.qkv.bias",
        "stage 3 module.deep.linear.weight",
        "stage 5 module.centered.norm.running_var",
        "stage 5 module.centered.norm.num_batches_tracked",
        "stage 5 module.centered.center",  # non-persistent
        "stage 0 module.local_loss.projection.out.weight",
        "stage 0 optimizer.0.exp_avg_sq",
        "stage 0 random.torch",
        "stage 1 random.torch",
        "stage 2 random.torch",
        "stage 3 random.torch",
        "stage 4 random.torch",
        "stage 4 losses",
    ):
        assert kind in changed
    assert "stage 5 random.torch" not in changed  # it draws nothing
    assert program.plan.stages[5].nodes[0] == "centered"
    assert tuple(cut.after for cut in program.plan.cuts) == SMALL_CUTS


def test_another_seed_is_another_run() -> None:
    program, batches, expected = small(2)
    assert differences(run(program, batches, "stream", seed=1), expected) != []


def test_a_backward_that_draws_holds_the_lock() -> None:
    """checkpoint() puts its old random state into the one generator while it runs again."""
    program, batches, expected = small(4)
    home = [stage.index for stage in program.plan.stages if "checkpointed" in stage.nodes]
    assert list(program.verification.recompute_stages) == home
    careless = partial(run, program, batches, recompute_stages=())
    assert differences(careless("sequential"), expected) == []
    assert any(differences(careless("stream", jitter=seed), expected) for seed in range(40))


# ---------------------------------------------------------------------- what ran when


def by_action(events: tuple[Event, ...]) -> dict[Action, Event]:
    return {event.action: event for event in events}


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_every_stage_keeps_its_own_order(schedule: str) -> None:
    program, batches, _ = small(4)
    at = by_action(run(program, batches, schedule, jitter=0).events)
    for k in range(4):
        kinds = step_kinds(schedule, k, 4)
        order = [at[Action(k, kind, t)] for t in range(STEPS) for kind in kinds]
        for one, other in zip(order, order[1:], strict=False):
            assert one.end_ns <= other.start_ns


def test_in_stream_stages_work_on_different_batches_at_the_same_time() -> None:
    program, batches, _ = small(4)
    pairs = overlaps(run(program, batches, "stream").events)
    assert {one.stage for pair in pairs for one in pair} == {0, 1, 2, 3}
    assert any(one.step != other.step for one, other in pairs)


def test_in_step_stages_overlap_on_one_batch_only() -> None:
    program, batches, _ = small(4)
    pairs = overlaps(run(program, batches, "in_step").events)
    assert pairs and all(one.step == other.step for one, other in pairs)


def test_in_sequential_nothing_overlaps() -> None:
    _, _, outcome = small(4)
    assert overlaps(outcome.events) == []
