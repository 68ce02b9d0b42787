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

The other schedules of backpropagation split the batch into micro-batches and are executed by
torch.distributed.pipelining; their lists here (`pipeline_actions`) are for pictures.
Step is the micro-batch there, I the backward of a stage's inputs, W that of its weights (B is
both); `placement` says which rank holds which stages::

    gpipe        stage 0  F0 F1 F2          B0 B0 B1 B1 B2 B2
                 stage 1     F0 F1 F2 B0 B0 B1 B1 B2 B2

    1f1b         stage 0  F0 F1       B0 B0 F2 B1 B1    B2 B2
                 stage 1     F0 B0 B0 F1 B1 B1 F2 B2 B2

    zb           rank r of W holds stages r and 2W - 1 - r (the V of "Zero Bubble Pipeline
                 Parallelism", arXiv 2401.10241, section 6); W fills the bubbles

Why `stream` computes bit for bit what `sequential` computes: F(t) of stage k reads the stage's
weights after U(t-1) and the activation of stage k-1 for batch t, and nothing else. Nothing flows
back from stage k+1. So any order in which each stage keeps F(t) < B(t) < U(t) < F(t+1) and sends
what F(t) computed gives the same numbers (paper.md section 5.1 has the derivation).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

from scpl_compile.errors import MethodError

__all__ = [
    "KINDS",
    "PIPELINES",
    "SCHEDULES",
    "Action",
    "active_kinds",
    "gates",
    "num_active",
    "picture",
    "pipeline_actions",
    "pipeline_timeline",
    "placement",
    "stage_actions",
    "step_kinds",
    "timeline",
]

KINDS = ("RECV", "F", "SEND", "RECV_B", "B", "SEND_B", "U", "I", "W")
SCHEDULES = ("stream", "in_step", "sequential", "bp")
PIPELINES = ("gpipe", "1f1b", "zb")

_TEXT = re.compile(r"(\d+)(RECV_B|SEND_B|RECV|SEND|F|B|U|I|W)(\d+)")


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


def num_active(starts: Sequence[int], step: int) -> int:
    """How many stages take part in `step`; starts: the first step of each, which do not fall."""
    return sum(start <= max(step, 0) for start in starts)


def active_kinds(
    schedule: str, stage: int, num_stages: int, starts: Sequence[int], step: int
) -> tuple[str, ...]:
    """As `step_kinds`, where stages take part from the step starts[stage] on: the last of those
    that do sends nothing. starts: empty where all do from the first step.
    """
    kinds = step_kinds(schedule, stage, num_stages)
    active = num_active(starts, step) if starts else num_stages
    if stage >= active:
        return ()
    return kinds if stage + 1 < active else tuple(kind for kind in kinds if kind != "SEND")


def stage_actions(
    schedule: str,
    stage: int,
    num_stages: int,
    *,
    first_step: int = 0,
    starts: Sequence[int] = (),
) -> Iterator[Action]:
    """The endless list of actions of `stage`, from `first_step` on. starts: see active_kinds."""
    for step in count(max(first_step, starts[stage] if starts else 0)):
        for kind in active_kinds(schedule, stage, num_stages, starts, step):
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
    needs = partial(_needs, schedule, num_stages=num_stages)
    return _play(schedule, pending, needs, units)


def _play(
    schedule: str,
    pending: Mapping[int, list[Action]],
    needs: Callable[[Action], Sequence[Action]],
    units: Mapping[str, int],
) -> dict[Action, tuple[int, int]]:
    """(start, end) of every action when each worker takes its list in order, as early as it can.

    pending: the list of each worker (a stage, or a rank), which is used up.
    """
    done: dict[Action, tuple[int, int]] = {}
    clock = dict.fromkeys(pending, 0)
    while any(pending.values()):
        ready = [
            (max([clock[k], *(done[need][1] for need in needed)]), k)
            for k, actions in pending.items()
            if actions
            for needed in [needs(actions[0])]
            if all(need in done for need in needed)
        ]
        if not ready:
            heads = ", ".join(str(actions[0]) for actions in pending.values() if actions)
            raise MethodError(f"schedule {schedule!r} deadlocks before {heads}")
        start, k = min(ready)
        action = pending[k].pop(0)
        clock[k] = start + units.get(action.kind, 0)
        done[action] = (start, clock[k])
    return done


def _needs(schedule: str, action: Action, *, num_stages: int) -> tuple[Action, ...]:
    """The actions of other stages that `action` waits for: its gates and what it receives."""
    needs = gates(schedule, action, num_stages)
    if action.kind == "RECV" and action.stage > 0:
        needs += (Action(action.stage - 1, "SEND", action.step),)
    if action.kind == "RECV_B":
        needs += (Action(action.stage + 1, "SEND_B", action.step),)
    return needs


def placement(schedule: str, num_stages: int) -> tuple[int, ...]:
    """The rank of each stage: one each, and for "zb" two on a rank, along a V.

    Raises:
        MethodError: the schedule is none of PIPELINES, or "zb" has an odd number of stages.
    """
    if schedule not in PIPELINES:
        raise MethodError(f"schedule {schedule!r} is not one of {', '.join(PIPELINES)}")
    if schedule != "zb":
        return tuple(range(num_stages))
    if num_stages % 2:
        raise MethodError(
            f"schedule 'zb' puts two stages on every rank, so it cannot place {num_stages}; "
            f"compile again with --stages {num_stages + 1}"
        )
    return tuple(min(stage, num_stages - 1 - stage) for stage in range(num_stages))


def pipeline_actions(
    schedule: str, rank: int, num_ranks: int, num_microbatches: int
) -> tuple[Action, ...]:
    """What `rank` computes in one step of backpropagation with micro-batches, in order.

    Raises:
        MethodError: the schedule is none of PIPELINES.
    """
    placement(schedule, 2 * num_ranks)
    if schedule == "zb":
        todo = _zero_bubble(rank, num_ranks, num_microbatches)
    else:
        first = num_microbatches
        if schedule == "1f1b":
            first = min(num_ranks - rank, num_microbatches)
        rest = num_microbatches - first
        todo = [("F", rank)] * first + [("B", rank), ("F", rank)] * rest + [("B", rank)] * first
    seen: Counter[tuple[str, int]] = Counter()
    actions = []
    for kind, stage in todo:
        actions.append(Action(stage, kind, seen[kind, stage]))
        seen[kind, stage] += 1
    return tuple(action for action in actions if action.step < num_microbatches)


def _zero_bubble(rank: int, num_ranks: int, num_microbatches: int) -> list[tuple[str, int]]:
    """(kind, stage) of the V's order; with few micro-batches, of the fewest that fill it."""
    down, up = rank, 2 * num_ranks - 1 - rank
    rounds = max(2 * num_ranks - 1, num_microbatches) - num_ranks
    feeding = rounds - (num_ranks - 1 - rank)
    below = num_ranks - rank
    rest = [("I", down), ("W", down), ("F", up), ("I", up), ("W", up)]
    return [
        *[("F", down)] * (2 * below - 1),
        *[("F", up), ("F", down)] * rank,
        *[("F", up), ("I", up), ("W", up)] * below,
        *[("F", down), *rest] * feeding,
        *rest * (rounds - feeding),
        *[("I", down), ("I", up)] * rank,
        *[("I", down), ("W", down)] * below,
        *[("W", up)] * rank,
        *[("W", down)] * rank,
    ]


def pipeline_timeline(
    schedule: str,
    num_stages: int,
    num_microbatches: int,
    *,
    duration: Mapping[str, int] | None = None,
) -> dict[Action, tuple[int, int]]:
    """(start, end) of every action of one step, as `timeline`; else F, I, W take 1 and B 2.

    Raises:
        MethodError: as `placement`.
    """
    num_ranks = len(set(placement(schedule, num_stages)))
    pending = {
        rank: list(pipeline_actions(schedule, rank, num_ranks, num_microbatches))
        for rank in range(num_ranks)
    }

    def needs(action: Action) -> list[Action]:
        k, kind, m = action.stage, action.kind, action.step
        if kind == "F":
            return [Action(k - 1, "F", m)] if k else []
        if kind == "W":
            return [Action(k, "I", m)]
        return [Action(k, "F", m), *([Action(k + 1, kind, m)] if k < num_stages - 1 else [])]

    return _play(schedule, pending, needs, duration or {"F": 1, "B": 2, "I": 1, "W": 1})


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
