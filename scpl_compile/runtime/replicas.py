"""Replicas of a stage: gradients averaged by DDP, and the contrast over all replicas' features.

Every replica trains on its share of the batch. DDP gives each the mean of their gradients; for the
mean of losses over equal shares that is the gradient of the whole batch. The contrastive loss is no
mean over samples, so with `--contrast global` every replica computes it over the features of all::

    replica r   features of its share ─ gather ─▶ features of all ─▶ the loss of the whole batch
                                      ◀─ the sum of all replicas' gradients, its own rows

R replicas compute the same loss, so R times its gradient reaches each share, and DDP's mean takes
the R away again: the gradients of one process with the whole batch, for models whose samples do not
meet otherwise (no batch statistics) and draw nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scpl_compile.errors import MethodError
from scpl_compile.runtime.losses import LocalLoss
from scpl_compile.runtime.predsim import PredSim

__all__ = ["TrainingStep", "averaged", "contrast_globally"]


class TrainingStep(nn.Module):
    """A stage, called, is its training step: what watches replicas watches forward."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *inputs: Tensor, labels: Tensor) -> Any:
        return self.stage.training_step(*inputs, labels=labels)  # type: ignore[operator]


def averaged(
    stage: nn.Module, group: dist.ProcessGroup, *, leaves_some: bool
) -> Callable[..., Any]:
    """The stage's training step, whose gradients are the mean over `group`.

    leaves_some: whether the losses do not reach every parameter.
    """
    if not any(parameter.requires_grad for parameter in stage.parameters()):
        step: Callable[..., Any] = stage.training_step  # type: ignore[assignment]
        return step
    return DistributedDataParallel(
        TrainingStep(stage), process_group=group, find_unused_parameters=leaves_some
    )


def contrast_globally(stage: nn.Module, how: str, group: dist.ProcessGroup) -> None:
    """Let the stage's local losses contrast the features of all replicas, if `how` is "global".

    Raises:
        MethodError: `how` is neither "local" nor "global".
    """
    if how not in ("local", "global"):
        raise MethodError(f"contrast {how!r} is not one of local, global")
    if how == "global" and dist.get_world_size(group) > 1:
        for module in stage.modules():
            if isinstance(module, (LocalLoss, PredSim)):
                module.gather = _gatherer(group)


def _gatherer(group: dist.ProcessGroup) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def gather(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return _Gather.apply(features, group), _gathered(labels, group)

    return gather


class _Gather(torch.autograd.Function):
    """All replicas' rows behind each other; the gradient is the sum of what each replica gives."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.num_rows = group, len(features)
        return _gathered(features, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        first = dist.get_rank(ctx.group) * ctx.num_rows
        return total[first : first + ctx.num_rows], None


def _gathered(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    values = values.contiguous()
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.cat(parts)
