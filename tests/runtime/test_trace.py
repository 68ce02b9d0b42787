"""The trace of recorded events, in the Trace Event Format."""

import json
from typing import Any

import pytest

from scpl_compile.actions import Action
from scpl_compile.runtime.engine import Event
from scpl_compile.runtime.trace import chrome_trace
from stage_nets import batches, make_trainer, submit_all, train_steps


def of_phase(trace: dict[str, Any], phase: str) -> list[dict[str, Any]]:
    return [row for row in trace["traceEvents"] if row["ph"] == phase]


@pytest.mark.parametrize("schedule", ["stream", "sequential"])
def test_every_event_is_a_slice_in_the_row_of_its_stage(schedule: str) -> None:
    _, engine = train_steps(3, schedule, 4, record_events=True)
    events = list(engine.events)
    trace = json.loads(json.dumps(chrome_trace(events)))
    origin = min(event.start_ns for event in events)
    found = {
        Action(row["tid"], row["cat"], row["args"]["step"]): (row["ts"], row["dur"])
        for row in of_phase(trace, "X")
    }
    assert len(of_phase(trace, "X")) == len(events)
    assert found == {
        event.action: ((event.start_ns - origin) / 1000, (event.end_ns - event.start_ns) / 1000)
        for event in events
    }
    names = {row["tid"]: row["args"]["name"] for row in of_phase(trace, "M")}
    assert names == {k: f"stage {k}" for k in range(3)}
    assert {row["name"] for row in of_phase(trace, "X")} >= {"F0", "B3", "SEND2"}


def test_slices_of_a_stage_do_not_overlap() -> None:
    _, engine = train_steps(2, "stream", 5, record_events=True)
    trace = chrome_trace(engine.events)
    for stage in range(2):
        rows = sorted(
            (row["ts"], row["dur"]) for row in of_phase(trace, "X") if row["tid"] == stage
        )
        for (start, duration), (after, _) in zip(rows, rows[1:], strict=False):
            assert start + duration <= after + 1e-3


def test_an_arrow_leads_from_each_send_to_its_receiver() -> None:
    order = ("0SEND0", "1RECV0", "1SEND_B0", "0RECV_B0", "1RECV1", "0SEND2")
    events = [Event(Action.parse(text), 1000 * i, 1000 * i + 500) for i, text in enumerate(order)]
    trace = chrome_trace(events)
    begins = {row["id"]: (row["tid"], row["ts"]) for row in of_phase(trace, "s")}
    ends = {row["id"]: (row["tid"], row["ts"]) for row in of_phase(trace, "f")}
    assert begins == {"0SEND0": (0, 0.0), "1SEND_B0": (1, 2.0)}
    assert ends == {"0SEND0": (1, 1.5), "1SEND_B0": (0, 3.5)}


def test_without_events_there_is_an_empty_trace() -> None:
    assert chrome_trace([])["traceEvents"] == []


def test_a_trainer_keeps_the_events_of_its_last_steps_only() -> None:
    with make_trainer(2, trace_steps=3) as trainer:
        submit_all(trainer, batches(12))
        trainer.drain()
        steps = {event.action.step for event in trainer.events}
        count = len(trainer.events)
    assert count == 3 * 2 * 7  # as many as three steps have at most, in backpropagation
    assert max(steps) == 11 and min(steps) > 4


def test_nothing_is_kept_where_nobody_asked() -> None:
    with make_trainer(2) as trainer:
        submit_all(trainer, batches(2))
        trainer.drain()
        assert trainer.events == ()
