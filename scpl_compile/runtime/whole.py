"""The stages of backpropagation as one module: what `ddp` replicates."""

from collections.abc import Sequence

from torch import Tensor, nn

from scpl_compile.errors import MethodError
from scpl_compile.ir import Plan
from scpl_compile.runtime.stage import as_tuple

__all__ = ["Whole"]


class Whole(nn.Module):
    """All stages of a plan in order, in one process and one graph: no gradient stops.

    Called, so that DistributedDataParallel may wrap it, it gives what the last stage's
    `training_step` gives. Its parameters are those of the stages, each once.

    Example::

        model = DistributedDataParallel(Whole(plan, modules))
        _, losses = model(*inputs, labels=labels)
        sum(losses.values()).backward()

    Raises:
        MethodError: the plan stops gradients at its cuts.
    """

    def __init__(self, plan: Plan, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        if any(cut.detach for cut in plan.cuts):
            raise MethodError(
                f"method {plan.method!r} stops gradients at the cuts, so its stages are no whole "
                "to train; compile the model again with --method bp"
            )
        self.stages = nn.ModuleList(stages)
        self._reads = tuple(stage.inputs for stage in plan.stages)
        self._sends = tuple(map(plan.sent, range(plan.num_stages)))

    def forward(
        self, *inputs: Tensor, labels: Tensor
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """((), the losses by name); inputs: those of the model in order; labels: (B,) int64."""
        values = dict(zip(self._reads[0], inputs, strict=True))
        losses: dict[str, Tensor] = {}
        for k, stage in enumerate(self.stages):
            arguments = [values[name] for name in self._reads[k]]
            sent, found = stage.training_step(*arguments, labels=labels)  # type: ignore[operator]
            losses |= found
            values = dict(zip(self._sends[k], as_tuple(sent), strict=True))
        return (), losses

    training_step = forward
