"""Forward and backward of a whole batch by the schedules that torch executes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scpl_compile.errors import MethodError
from scpl_compile.ir import Plan
from scpl_compile.runtime.batch_engine import Run
from scpl_compile.runtime.pipelined import PipelinedStep
from scpl_compile.runtime.ranks import Ranks
from scpl_compile.runtime.schedules import WHOLE
from scpl_compile.runtime.stage_step import StageStep
from scpl_compile.runtime.whole import Whole

__all__ = ["whole_batches"]


def whole_batches(
    plan: Plan,
    stages: Sequence[StageStep],
    ranks: Ranks,
    schedule: str,
    num_microbatches: int,
    batch_size: int,
    *,
    leaves_some: bool,
) -> Run:
    """What runs one batch over the ranks: its gradients are in the stages' parameters afterwards.

    leaves_some: whether a step may leave a parameter without a gradient.

    Raises:
        MethodError: an option that the schedule has no place for.
    """
    options = stages[0].options
    if options.wire_dtype:
        raise MethodError(f"schedule {schedule!r} sends what it computes; leave out --wire-dtype")
    if schedule == WHOLE:
        return _replicated(plan, stages, ranks, leaves_some)
    if options.accumulate > 1:
        raise MethodError(
            f"schedule {schedule!r} accumulates over micro-batches; leave out --accumulate, and "
            "give a larger --batch-size with more --microbatches"
        )
    sizes = num_microbatches, batch_size
    return _pipelined(plan, stages, ranks, schedule, sizes, leaves_some)


def _pipelined(
    plan: Plan,
    stages: Sequence[StageStep],
    ranks: Ranks,
    schedule: str,
    sizes: tuple[int, int],
    leaves_some: bool,
) -> Run:
    by_index = {stage.index: stage for stage in stages}
    name = plan.stages[-1].losses[0].name

    @contextmanager
    def around(k: int) -> Iterator[None]:
        with by_index[k].random.drawing(), by_index[k].autocast():
            yield

    step = PipelinedStep(
        plan,
        {stage.index: stage.module for stage in stages},
        schedule=schedule,
        num_microbatches=sizes[0],
        batch_size=sizes[1],
        device=ranks.device,
        group=ranks.stage_group,
        around_forward=around,
    )
    parameters = [p for stage in stages for p in stage.module.parameters() if p.requires_grad]

    def run(values: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        loss = step.run(values if 0 in by_index else {}, labels)
        if ranks.num_replicas > 1:
            if leaves_some:
                _fill(parameters, ranks)
            _average(parameters, ranks)
        return {} if loss is None else {name: loss}

    return run


def _fill(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Zeros for a gradient that other replicas have, as DistributedDataParallel counts it."""
    if not parameters:
        return
    have = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device)
    have = have.to(torch.int32)
    dist.all_reduce(have, group=ranks.replica_group)
    for parameter, number in zip(parameters, have.tolist(), strict=True):
        if number and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _average(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Gradients to their mean over the replicas, after all micro-batches."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    for work in [dist.all_reduce(g, group=ranks.replica_group, async_op=True) for g in gradients]:
        if work is not None:
            work.wait()
    for gradient in gradients:
        gradient /= ranks.num_replicas


def _replicated(plan: Plan, stages: Sequence[StageStep], ranks: Ranks, leaves_some: bool) -> Run:
    whole = Whole(plan, [stage.module for stage in stages])
    first = stages[0]
    model: nn.Module = whole
    if ranks.num_replicas > 1:
        model = DistributedDataParallel(
            whole, process_group=ranks.replica_group, find_unused_parameters=leaves_some
        )

    def run(values: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        values = first.options.arrange(first.lane.receive(values, None))
        labels = first.lane.receive({"labels": labels}, None)["labels"]
        with first.lane.scope(), first.random.drawing():
            with first.autocast():
                _, losses = model(*(values[name] for name in plan.stages[0].inputs), labels=labels)
            first.backward_of(losses)
        return dict(losses)

    return run
