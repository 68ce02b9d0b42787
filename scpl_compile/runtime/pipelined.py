"""Backpropagation with micro-batches: torch.distributed.pipelining's schedules over our stages.

::

    rank 0   stage 0 ──▶                 gpipe, 1f1b: one stage on each rank
    rank 1              stage 1          zb: stages r and 2W - 1 - r on rank r of W

These are what SCPL is compared with, so the stages are the ones that everything else runs (an
emitted stage's `training_step`) and the schedules are torch's own. What a stage needs to be hosted
is here: the shapes of its micro-batch, which are known from the plan (torch would otherwise send
pickled objects to ask for them), and outputs in the form that torch sends and detaches.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleZBVZeroBubble,
)
from torch.nn.modules.batchnorm import _BatchNorm

from scpl_compile.actions import placement
from scpl_compile.errors import DataError, MethodError, ScplError
from scpl_compile.ir import Crossing, Plan
from scpl_compile.runtime.stage import as_tuple

__all__ = ["PipelinedStep", "check_pipelined"]


def check_pipelined(plan: Plan, schedule: str, num_microbatches: int, batch_size: int) -> None:
    """Refuse what `schedule` cannot train, before any process waits for another.

    Raises:
        MethodError: an unknown schedule, or an odd number of stages for "zb"; a plan whose
            gradients stop at a cut; micro-batches that do not divide the batch, or fewer than
            "1f1b" has stages.
    """
    placement(schedule, plan.num_stages)
    for cut in plan.cuts:
        if cut.detach:
            raise MethodError(
                f"schedule {schedule!r} sends gradients back, and those of "
                f"{', '.join(repr(crossing.name) for crossing in cut.crossings)} stop at cut "
                f"{cut.index} (method {plan.method!r}); compile again with --method bp"
            )
    divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    least = plan.num_stages if schedule == "1f1b" else 1
    if num_microbatches not in divisors or num_microbatches < least:
        fitting = [str(n) for n in divisors if n >= least]
        remedy = f"give {', '.join(fitting)}" if fitting else f"give batches of at least {least}"
        why = "at least one micro-batch per stage and " if least > 1 else ""
        raise MethodError(
            f"schedule {schedule!r} needs {why}micro-batches of equal size, so {num_microbatches} "
            f"of a batch of {batch_size} do not do; {remedy}"
        )


class PipelinedStep:
    """Forward and backward of one batch in micro-batches, over the ranks of `group`.

    Args:
        plan: of a program of method bp.
        stages: the emitted stages of this rank by their index (`actions.placement`), on `device`.
        schedule: "gpipe", "1f1b" or "zb". num_microbatches: into which a batch is split.
        batch_size: of a full batch; default: the plan's.
        group: the ranks of one replica in the order of the stages; default: all.
        around_forward: the context of a stage's forward, by the stage's index: autocast, or the
            stage's own random numbers.

    The gradients of the mean loss over the batch are added to the parameters' .grad; they are
    those of the unsplit model, but for batch statistics and random draws, which are of a
    micro-batch. A last, smaller batch is split into the most equal parts that are no more than
    num_microbatches (a prime number of samples goes whole), which changes no gradient; where these
    are too few for "1f1b" they run in the order of "gpipe". What is made for a batch size is kept.

    Raises:
        MethodError: see `check_pipelined`; `group` has another number of ranks than the schedule
            places stages on; `stages` are those of another rank.
    """

    def __init__(
        self,
        plan: Plan,
        stages: Mapping[int, nn.Module],
        *,
        schedule: str,
        num_microbatches: int,
        device: torch.device,
        batch_size: int | None = None,
        group: dist.ProcessGroup | None = None,
        around_forward: Callable[[int], AbstractContextManager[Any]] | None = None,
    ) -> None:
        check_pipelined(plan, schedule, num_microbatches, batch_size or plan.batch_size)
        self.plan = plan
        self.schedule = schedule
        self.num_microbatches = num_microbatches
        self.device = device
        self._stages = dict(sorted(stages.items()))
        self._group = group
        self._around_forward = around_forward or _nothing_around
        self._made: dict[int, tuple[int, Any]] = {}
        self._has_warned = False
        self._check_ranks()

    def _check_ranks(self) -> None:
        placed = placement(self.schedule, self.plan.num_stages)
        num_ranks, needed = dist.get_world_size(self._group), 1 + max(placed)
        if num_ranks != needed:
            raise MethodError(
                f"schedule {self.schedule!r} places {len(placed)} stages on {needed} ranks, not "
                f"{num_ranks}; start it with torchrun --nproc-per-node {needed}"
            )
        rank = dist.get_rank(self._group)
        own = [k for k, at in enumerate(placed) if at == rank]
        if list(self._stages) != own:
            raise MethodError(
                f"rank {rank} holds the stages {own} of schedule {self.schedule!r}, not "
                f"{list(self._stages)}; take those that actions.placement names"
            )

    def run(self, values: Mapping[str, Tensor], labels: Tensor) -> Tensor | None:
        """Forward and backward of one batch; every rank calls it with batches of the same size.

        values: the model's inputs by name, (B, …); read where stage 0 is, elsewhere it may be
        empty. labels: (B,) int64, on every rank (with several views: one for every view).

        Returns the mean loss, a scalar on the device, where the last stage is, else None. The
        caller updates the parameters.

        Raises:
            DataError: an input has another shape than the program was compiled for.
            MethodError: what a stage sends has a shape or a gradient that its plan does not tell.
        """
        num_samples = labels.shape[0]
        if num_samples not in self._made:
            self._made[num_samples] = self._make(num_samples)
        count, schedule = self._made[num_samples]
        self._warn(num_samples // count, count)
        parts = labels.to(self.device, non_blocking=True).chunk(count)
        inputs: list[tuple[Tensor, ...]] = [()] * count
        if 0 in self._stages:
            inputs = list(zip(*self._split(values, num_samples, count), strict=True))
        losses: list[Tensor] = []
        try:
            schedule.step(
                arg_mbs=inputs,
                kwarg_mbs=[{"labels": part} for part in parts],
                target_mbs=list(parts),
                losses=losses,
                return_outputs=False,
            )
        except RuntimeError as error:  # torch's, around what a stage raised
            if isinstance(error.__cause__, ScplError):
                raise error.__cause__ from None
            raise
        return torch.stack([loss.detach() for loss in losses]).sum() if losses else None

    def _split(
        self, values: Mapping[str, Tensor], num_samples: int, count: int
    ) -> Iterable[tuple[Tensor, ...]]:
        for spec in self.plan.inputs:
            value = values[spec.name]
            if value.shape != (num_samples, *spec.shape):
                raise DataError(
                    f"input {spec.name!r} is {tuple(value.shape)}; schedule {self.schedule!r} "
                    f"takes {(num_samples, *spec.shape)}, as the program was compiled, for "
                    f"{num_samples} labels: pad it, or compile with --input {spec.name}:…"
                )
            yield value.to(self.device, non_blocking=True).chunk(count)

    def _warn(self, size: int, count: int) -> None:
        if self._has_warned or count == 1:
            return
        modules = (module for stage in self._stages.values() for module in stage.modules())
        if any(isinstance(module, _BatchNorm) and module.training for module in modules):
            self._has_warned = True
            warnings.warn(
                f"micro-batches of {size} samples change BatchNorm's statistics, so schedule "
                f"{self.schedule!r} does not train as the unsplit model does",
                stacklevel=3,
            )

    def _make(self, num_samples: int) -> tuple[int, Any]:
        """(number of micro-batches, torch's schedule) for batches of `num_samples`."""
        count = max(n for n in range(1, self.num_microbatches + 1) if num_samples % n == 0)
        stages = [self._host(k, num_samples // count, count) for k in self._stages]
        if self.schedule == "zb":
            return count, ScheduleZBVZeroBubble(list(stages), count, _given_loss, scale_grads=False)
        is_gpipe = self.schedule == "gpipe" or count < self.plan.num_stages
        kind = ScheduleGPipe if is_gpipe else Schedule1F1B
        return count, kind(stages[0], count, _given_loss, scale_grads=False)

    def _host(self, stage: int, size: int, count: int) -> "_Stage":
        plan = self.plan
        if stage == 0:
            inputs = [_example((size, *s.shape), s.dtype, False) for s in plan.inputs]
        else:
            inputs = [_crossing_example(c, size, plan) for c in plan.cuts[stage - 1].crossings]
        outputs = [_example((), "float32", True)]
        sends = None
        if stage < plan.num_stages - 1:
            sends = plan.cuts[stage].crossings
            outputs = [_crossing_example(crossing, size, plan) for crossing in sends]
        hosted = _Hosted(
            self._stages[stage],
            expected=None if sends is None else list(zip(sends, outputs, strict=True)),
            schedule=self.schedule,
            stage=stage,
            share=1 / count,
            around=lambda: self._around_forward(stage),
        )
        return _Stage(
            hosted,
            stage,
            plan.num_stages,
            self.device,
            input_args=tuple(inputs),
            output_args=tuple(outputs),
            group=self._group,
        )


def _nothing_around(stage: int) -> AbstractContextManager[None]:
    return nullcontext()


def _given_loss(loss: Tensor, labels: Tensor) -> Tensor:
    """The last stage gives its loss already."""
    return loss


def _example(shape: tuple[int, ...], dtype: str, requires_grad: bool) -> Tensor:
    """A tensor without memory that tells torch what crosses."""
    kind: torch.dtype = getattr(torch, dtype)
    return torch.empty(shape, dtype=kind, device="meta", requires_grad=requires_grad)


def _crossing_example(crossing: Crossing, size: int, plan: Plan) -> Tensor:
    shape = list(crossing.meta.shape)
    if crossing.meta.batch_dim is not None:
        shape[crossing.meta.batch_dim] = size
    return _example(tuple(shape), crossing.meta.dtype, crossing.meta.requires_grad)


class _Hosted(nn.Module):
    """A stage as PipelineStage calls it: gives what it sends, or its share of the mean loss.

    expected: the crossings with an example of each; None for the last stage.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        expected: Sequence[tuple[Crossing, Tensor]] | None,
        schedule: str,
        stage: int,
        share: float,
        around: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        super().__init__()
        self.module = module
        self._expected = expected
        self._where = f"cut {stage}"
        self._detaches = schedule == "zb"
        self._share = share
        self._around = around

    def forward(self, *inputs: Tensor, labels: Tensor) -> Tensor | tuple[Tensor, ...]:
        with self._around():
            step: Callable[..., Any] = self.module.training_step  # type: ignore[assignment]
            sent, losses = step(*inputs, labels=labels)
        if self._expected is None:
            return torch.stack([loss.float() for loss in losses.values()]).sum() * self._share
        pairs = zip(self._expected, as_tuple(sent), strict=True)
        return tuple(self._sendable(crossing, like, value) for (crossing, like), value in pairs)

    def _sendable(self, crossing: Crossing, like: Tensor, value: Tensor) -> Tensor:
        """What torch sends: of the planned shape and dtype, contiguous, and in "zb" no view.

        "zb" detaches it in place when it has gone back, and a view cannot be.
        """
        if value.shape != like.shape:
            raise MethodError(
                f"{crossing.name!r} at {self._where} is {tuple(value.shape)}, not "
                f"{tuple(like.shape)}: its shape does not follow the batch alone, so micro-batches "
                "cannot cross here; choose another cut with --split-at, or schedule 'bp'"
            )
        if value.requires_grad and not like.requires_grad:
            raise MethodError(
                f"{crossing.name!r} at {self._where} carries a gradient, which it did not when the "
                "program was compiled; compile again with the parameters that train unfrozen"
            )
        sendable = value.to(like.dtype).contiguous()
        return sendable.clone() if self._detaches and sendable._is_view() else sendable


class _Stage(PipelineStage):
    """A stage whose backward "zb" splits only where torch's split finds every gradient.

    torch first goes back from what the stage gave to its inputs, and then from the nodes on that
    way to the weights. Weights that no such way passes would get nothing: where an output depends
    on no input that takes a gradient (an embedding of raw ids, a frozen stage before). And
    reentrant checkpoint() refuses it. Such a stage does all of its backward at once.
    """

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """As PipelineStage; looks at the graph of the first micro-batch."""
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if fwd_chunk_id == 0 and self.dw_builder is None:
            outputs, inputs = self.fwd_cache[fwd_chunk_id]
            if not all(_reaches(value, inputs) for value in outputs):
                self.dw_builder = _nothing_later
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """As PipelineStage; what is sent back is contiguous, as the receiver expects it."""
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        gradients = self.bwd_cache[bwd_chunk_id]
        self.bwd_cache[bwd_chunk_id] = tuple(g if g is None else g.contiguous() for g in gradients)


def _nothing_later() -> Callable[[], None]:
    return lambda: None


def _reaches(output: Tensor, inputs: Iterable[Tensor]) -> bool:
    """Whether a gradient of `output` reaches one of `inputs`, by ways that torch can split."""
    leaves = {id(value) for value in inputs if value.requires_grad}
    found = output.grad_fn is None
    todo, seen = [output.grad_fn], {output.grad_fn}
    while todo:
        node = todo.pop()
        if node is None:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return False
        found = found or id(getattr(node, "variable", None)) in leaves
        new = {parent for parent, _ in node.next_functions} - seen
        seen |= new
        todo += new
    return found
