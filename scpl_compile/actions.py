"""What each stage does, in which order, for every schedule: one list that the runtime executes.

Letters: K stages, k one stage, t one step (one batch). One step of one stage is::

    RECV  take the batch, or what the stage before has sent
    F     forward of the stage, its heads and its local losses
    SEND  pass the crossing tensors and the labels on
    B     backward of the local losses
    U     update of the stage's parameters

The schedules of a method that stops gradients at the cuts differ in what F(t) must wait for
(`gates`), and in nothing else::

    stream       stage 0  F0 B0 F1 B1 F2 B2            nothing: each stage goes on as soon as
                 stage 1     F0 B0 F1 B1 F2 B2         its input is there

    in_step      stage 0  F0 B0    F1 B1    F2 B2      the batch before, in all stages
                 stage 1     F0 B0    F1 B1    F2 B2

    sequential   stage 0  F0 B0       F1 B1            all that comes before in the plain order
                 stage 1        F0 B0       F1 B1

Backpropagation has one schedule here, `bp`: its gradient crosses the cuts too (RECV_B, SEND_B), so
no stage can update before all later ones have run::

    bp           stage 0  F0       B0 F1       B1
                 stage 1     F0 B0       F1 B1

Why `stream` computes bit for bit what `sequential` computes: F(t) of stage k reads the stage's
weights after U(t-1) and the activation of stage k-1 for batch t, and nothing else. Nothing flows
back from stage k+1. So any order in which each stage keeps F(t) < B(t) < U(t) < F(t+1) and sends
what F(t) computed gives the same numbers (paper.md section 5.1 has the derivation).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

from scpl_compile.errors import MethodError

__all__ = [
    "KINDS",
    "SCHEDULES",
    "Action",
    "gates",
    "picture",
    "stage_actions",
    "step_kinds",
    "timeline",
]

KINDS = ("RECV", "F", "SEND", "RECV_B", "B", "SEND_B", "U")
SCHEDULES = ("stream", "in_step", "sequential", "bp")

_TEXT = re.compile(r"(\d+)(RECV_B|SEND_B|RECV|SEND|F|B|U)(\d+)")


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One thing that one stage does for one step; `2F0` is stage 2, forward, step 0."""

    stage: int
    kind: str
    step: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.step}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """The action that prints as `text`.

        Raises:
            MethodError: `text` is no action.
        """
        if (match := _TEXT.fullmatch(text)) is None:
            raise MethodError(f"{text!r} is no action; actions read like 2F0 or 3SEND1")
        return cls(int(match[1]), match[2], int(match[3]))


def step_kinds(schedule: str, stage: int, num_stages: int) -> tuple[str, ...]:
    """The kinds of one step of `stage`, in order."""
    kinds = ["RECV", "F"]
    if stage < num_stages - 1:
        kinds += ["SEND"] if schedule != "bp" else ["SEND", "RECV_B"]
    kinds.append("B")
    if stage > 0 and schedule == "bp":
        kinds.append("SEND_B")
    return (*kinds, "U")


def stage_actions(
    schedule: str, stage: int, num_stages: int, *, first_step: int = 0
) -> Iterator[Action]:
    """The endless list of actions of `stage`, from `first_step` on."""
    kinds = step_kinds(schedule, stage, num_stages)
    for step in count(first_step):
        for kind in kinds:
            yield Action(stage, kind, step)


def gates(schedule: str, action: Action, num_stages: int) -> tuple[Action, ...]:
    """The updates that must be finished before `action` may begin (only F waits).

    Raises:
        MethodError: the schedule is unknown.
    """
    if schedule not in SCHEDULES:
        raise MethodError(f"schedule {schedule!r} is not one of {', '.join(SCHEDULES)}")
    if action.kind != "F" or schedule in ("stream", "bp"):
        return ()
    if schedule == "in_step":
        if action.step == 0:
            return ()
        return tuple(Action(k, "U", action.step - 1) for k in range(num_stages))
    if action.stage > 0:
        return (Action(action.stage - 1, "U", action.step),)
    return (Action(num_stages - 1, "U", action.step - 1),) if action.step > 0 else ()


def timeline(
    schedule: str,
    num_stages: int,
    num_steps: int,
    *,
    duration: Mapping[str, int] | None = None,
) -> dict[Action, tuple[int, int]]:
    """(start, end) of every action when kind x takes duration[x] units and waiting nothing.

    Without `duration` F, B take 1 and all else 0. Raises MethodError where the order deadlocks.
    """
    units = {"F": 1, "B": 1} if duration is None else duration
    pending = {
        k: [Action(k, kind, t) for t in range(num_steps) for kind in kinds]
        for k in range(num_stages)
        for kinds in [step_kinds(schedule, k, num_stages)]
    }
    done: dict[Action, tuple[int, int]] = {}
    clock = dict.fromkeys(range(num_stages), 0)
    while any(pending.values()):
        ready = [
            (max([clock[k], *(done[need][1] for need in needs)]), k)
            for k, actions in pending.items()
            if actions
            for needs in [_needs(schedule, actions[0], num_stages)]
            if all(need in done for need in needs)
        ]
        if not ready:
            heads = ", ".join(str(actions[0]) for actions in pending.values() if actions)
            raise MethodError(f"schedule {schedule!r} deadlocks before {heads}")
        start, k = min(ready)
        action = pending[k].pop(0)
        clock[k] = start + units.get(action.kind, 0)
        done[action] = (start, clock[k])
    return done


def _needs(schedule: str, action: Action, num_stages: int) -> tuple[Action, ...]:
    """The actions of other stages that `action` waits for: its gates and what it receives."""
    needs = gates(schedule, action, num_stages)
    if action.kind == "RECV" and action.stage > 0:
        needs += (Action(action.stage - 1, "SEND", action.step),)
    if action.kind == "RECV_B":
        needs += (Action(action.stage + 1, "SEND_B", action.step),)
    return needs


def picture(times: Mapping[Action, tuple[int, int]]) -> str:
    """The time x stage grid of the actions that take time, one row per stage, `.` where it idles.

    Example: two stages, two steps, schedule "stream"::

        F0 B0 F1 B1 .
        .  F0 B0 F1 B1
    """
    num_stages = 1 + max(action.stage for action in times)
    width = max(end for _, end in times.values())
    rows = [["."] * width for _ in range(num_stages)]
    for action, (start, end) in times.items():
        for unit in range(start, end):
            rows[action.stage][unit] = f"{action.kind}{action.step}"
    cell = max(len(text) for row in rows for text in row)
    return "\n".join(" ".join(text.ljust(cell) for text in row).rstrip() for row in rows)
