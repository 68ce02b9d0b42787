"""The executed actions as a trace that chrome://tracing and ui.perfetto.dev show."""

from collections.abc import Iterable
from typing import Any

from scpl_compile.actions import Action
from scpl_compile.runtime.engine import Event

__all__ = ["chrome_trace"]

_RECEIVERS = {"SEND": ("RECV", 1), "SEND_B": ("RECV_B", -1)}
"""What receives what is sent, and in which stage beside it."""


def chrome_trace(events: Iterable[Event]) -> dict[str, Any]:
    """A row per stage, a slice per action with its step, an arrow from each SEND to its RECV.

    In the Trace Event Format: microseconds from the first event on. A slice lasts as long as the
    stage's worker was at it: RECV, F under in_step and sequential, and SEND contain their waiting.
    """
    found = sorted(events, key=lambda event: event.start_ns)
    origin = found[0].start_ns if found else 0
    at = {event.action: event for event in found}
    rows: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": k, "args": {"name": f"stage {k}"}}
        for k in sorted({event.action.stage for event in found})
    ]
    for event in found:
        action = event.action
        rows.append(
            {
                "name": f"{action.kind}{action.step}",
                "cat": action.kind,
                "ph": "X",
                "pid": 0,
                "tid": action.stage,
                "ts": (event.start_ns - origin) / 1000,
                "dur": (event.end_ns - event.start_ns) / 1000,
                "args": {"step": action.step},
            }
        )
        if action.kind in _RECEIVERS:
            kind, beside = _RECEIVERS[action.kind]
            receiver = at.get(Action(action.stage + beside, kind, action.step))
            rows += _arrow(event, receiver, origin) if receiver is not None else []
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def _arrow(sender: Event, receiver: Event, origin: int) -> list[dict[str, Any]]:
    """From the beginning of one slice to the end of the other; both have the same id."""
    common = {"name": sender.action.kind, "cat": "flow", "pid": 0, "id": str(sender.action)}
    ends = (
        ({"ph": "s"}, sender.action.stage, sender.start_ns),
        ({"ph": "f", "bp": "e"}, receiver.action.stage, receiver.end_ns),
    )
    return [{**common, **kind, "tid": k, "ts": (ns - origin) / 1000} for kind, k, ns in ends]
