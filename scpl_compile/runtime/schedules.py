"""Which schedules a plan allows, where they run, and which rank holds which stage."""

from scpl_compile.actions import PIPELINES, placement
from scpl_compile.errors import MethodError
from scpl_compile.ir import SINGLE_LABEL, Plan

__all__ = [
    "DECOUPLED",
    "JOINED",
    "WHOLE",
    "allowed_schedules",
    "check_schedule",
    "is_joined",
    "is_parallel",
    "num_ranks",
    "stage_columns",
]

WHOLE = "ddp"
"""The unsplit model on every rank, each with its share of the batch."""
_ON_RANKS = (*PIPELINES, WHOLE)

DECOUPLED = ("stream", "in_step", "sequential")
"""Where gradients stop at the cuts."""
JOINED = ("bp", *_ON_RANKS)
"""Where they cross them."""


def is_joined(plan: Plan) -> bool:
    """Whether gradients cross the cuts; a plan without cuts has the schedule of its method too."""
    return plan.schedule in JOINED


def allowed_schedules(plan: Plan) -> tuple[str, ...]:
    """The schedules that the plan allows; the first is the default in one process.

    Those that split the batch sum what its parts give, which is the gradient of the mean cross
    entropy, and of no loss that compares samples. They know of no loss before the last stage.
    """
    if not is_joined(plan):
        return DECOUPLED
    has_heads = any(loss.has_head for stage in plan.stages for loss in stage.losses)
    return JOINED[:1] if has_heads else JOINED


def check_schedule(plan: Plan, schedule: str, *, on_ranks: bool) -> str:
    """`schedule`, where the plan allows it here.

    Raises:
        MethodError: there is no such schedule; the method does not allow it; it needs ranks.
    """
    if schedule not in (known := (*DECOUPLED, *JOINED)):
        raise MethodError(f"schedule {schedule!r} is not one of {', '.join(known)}")
    allowed = allowed_schedules(plan)
    if schedule not in allowed:
        raise MethodError(
            f"schedule {schedule!r} does not go with method {plan.method!r}, which allows "
            f"{', '.join(allowed)}; for it, {_compile_again(plan, schedule)}"
        )
    if schedule in _ON_RANKS and not on_ranks:
        raise MethodError(
            f"schedule {schedule!r} runs on ranks; start with: torchrun --standalone "
            f"--nproc-per-node {num_ranks(schedule, plan.num_stages)} train.py --schedule "
            f"{schedule}"
        )
    return schedule


def is_parallel(schedule: str) -> bool:
    """Whether several stages, or replicas, work at the same time."""
    return schedule not in ("sequential", "bp")


def stage_columns(schedule: str, num_stages: int) -> tuple[int, ...]:
    """For every stage the place in its row of ranks.

    Raises:
        MethodError: the schedule cannot place so many stages.
    """
    if schedule == WHOLE:
        return (0,) * num_stages
    return placement(schedule, num_stages) if schedule in PIPELINES else tuple(range(num_stages))


def num_ranks(schedule: str, num_stages: int) -> int:
    """The least ranks on which the schedule is what it is: one row, or two replicas for ddp."""
    return 2 if schedule == WHOLE else 1 + max(stage_columns(schedule, num_stages))


def _compile_again(plan: Plan, schedule: str) -> str:
    """How to get a program of the same model that allows `schedule`."""
    method = "bp" if schedule in JOINED else "scpl"
    if plan.source is None:
        return f"compile the model again with method={method!r}, num_stages={plan.num_stages}"
    plain = {k: v for k, v in plan.source.config.items() if isinstance(v, (bool, int, float, str))}
    config = ",".join(f"{key}={value}" for key, value in plain.items())
    return (
        f"compile with: scpl compile {plan.model} --method {method} "
        f"--input '{','.join(map(str, plan.inputs))}' --stages {plan.num_stages} "
        + (f"--config {config} " if config else "")
        + (f"--task {plan.task} " if plan.task != SINGLE_LABEL else "")
        + "-o DIR"
    )
