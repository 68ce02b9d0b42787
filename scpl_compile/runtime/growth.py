"""Stages that take part from a later step on (DASCPL's dynamic accumulation of layers).

::

    starts 0, 4, 8    step    0 … 3      4 … 7       8 …
                      stage 0 trains     trains      trains
                      stage 1 rests      trains      trains
                      stage 2 rests      rests       trains

A stage that rests runs neither forward nor backward, nothing is sent to it, and inference ends at
the exit of the last one that does not. It is a function of the step alone: a run that goes on, and
every rank, knows it.
"""

from collections.abc import Sequence
from itertools import pairwise

from scpl_compile.errors import MethodError
from scpl_compile.ir import Plan
from scpl_compile.runtime.schedules import is_joined

__all__ = ["can_grow", "checked_starts", "first_steps"]


def checked_starts(plan: Plan, starts: Sequence[int]) -> tuple[int, ...]:
    """The first step of every stage; none given: 0.

    Raises:
        MethodError: not one whole number for every stage; the first is not 0; a stage begins before
            the one that feeds it; a stage behind which others rest has no exit; gradients cross the
            cuts.
    """
    if not starts:
        return (0,) * plan.num_stages
    told = ", ".join(map(str, starts))
    if len(starts) != plan.num_stages or not all(type(start) is int for start in starts):
        raise MethodError(
            f"stages begin at the steps {told}; give {plan.num_stages} whole numbers, one per stage"
        )
    if starts[0] != 0 or list(starts) != sorted(starts):
        raise MethodError(
            f"stages begin at the steps {told}; give {plan.num_stages} that do not fall, the first "
            "0"
        )
    if any(starts) and is_joined(plan):
        raise MethodError(
            f"stages begin at the steps {told}, but the gradients of method {plan.method!r} come "
            "from the last stage, which would rest; methods dascpl, early_exit and deinforeg stop "
            "them at the cuts"
        )
    for stage, (start, after) in enumerate(pairwise(starts)):
        if start < after and not _has_exit(plan, stage):
            raise MethodError(
                f"stages begin at the steps {told}, but method {plan.method!r} has no exit of "
                f"stage {stage}, behind which others rest; methods dascpl, early_exit and "
                "deinforeg have one in every stage"
            )
    return tuple(starts)


def can_grow(plan: Plan) -> bool:
    """Whether any stage but the first may begin later than the one before it."""
    exits = [_has_exit(plan, stage) for stage in range(plan.num_stages - 1)]
    return bool(exits) and all(exits) and not is_joined(plan)


def _has_exit(plan: Plan, stage: int) -> bool:
    return f"{stage}X" in plan.inference


def first_steps(plan: Plan, grow: str, num_batches: int, num_steps: int) -> tuple[int, ...]:
    """The first step of every stage for the option `grow`, the epochs of all stages but the first.

    num_batches: of an epoch. num_steps: of the run, in which every stage must take part.

    Raises:
        MethodError: not so many epochs as there are later stages; one that the run does not reach.
    """
    if not grow:
        return ()
    epochs = grow.split(",")
    if len(epochs) != plan.num_stages - 1 or not all(text.strip().isdecimal() for text in epochs):
        example = ",".join(str(k) for k in range(1, plan.num_stages)) or "no"
        raise MethodError(
            f"grow {grow!r} must be the epochs from which stages 1 … {plan.num_stages - 1} take "
            f"part, as in {example}"
        )
    starts = checked_starts(plan, [0, *(int(text) * num_batches for text in epochs)])
    if starts[-1] >= num_steps:
        raise MethodError(
            f"grow {grow!r}: the last stage would begin at step {starts[-1]}, and the run has "
            f"{num_steps}; give more --epochs, or smaller numbers"
        )
    return starts
