"""Replicas that share a stage's memory: each holds a part of every parameter (FSDP2).

::

    replica 0   ▓▓▓░░░░░░   gathered for F and again for B, then let go;
    replica 1   ░░░▓▓▓░░░   gradients are summed to the part that a replica holds,
    replica 2   ░░░░░░▓▓▓   and so are the optimizer's tensors

What is written to a checkpoint, and read from one, is whole: a run goes on with any number of
replicas, sharded or not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from scpl_compile.runtime.replicas import TrainingStep

__all__ = ["Sharded", "like", "whole_tensor"]


class Sharded(TrainingStep):
    """A stage whose parameters are split over the replicas of `mesh`, in place.

    A module around the stage, because FSDP gathers for the forward of what it was given and lets go
    after it, and a stage's step is more than its forward.
    """

    def __init__(self, stage: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__(stage)
        fully_shard(self, mesh=mesh, reshard_after_forward=True)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The stage is whole inside; every replica must come here."""
        self.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            self.reshard()  # type: ignore[operator]


def whole_tensor(value: Tensor) -> Tensor:
    """`value`, gathered where it is split; then every replica must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Any, own: Tensor) -> Any:
    """A whole tensor as the one it belongs to is held; numbers and scalars as they are."""
    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value
