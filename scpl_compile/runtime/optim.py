"""Optimizers by name, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from scpl_compile.errors import MethodError
from scpl_compile.ir import Scalar

__all__ = ["learning_rate", "make_optimizer", "optimizer_names"]

LR_FLOOR = 0.01
"""The cosine ends at this fraction of the first learning rate (released: 1e-3 falls to 1e-5)."""


def optimizer_names() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """torch.optim's optimizers by lower-case name, those that need a closure left out."""
    return {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value not in (torch.optim.Optimizer, torch.optim.LBFGS)
    }


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, options: Mapping[str, Scalar]
) -> torch.optim.Optimizer | None:
    """The optimizer of one stage; None where the stage has nothing to train.

    Raises:
        MethodError: an unknown name or option, or a value that torch refuses.
    """
    known = optimizer_names()
    if name.lower() not in known:
        raise MethodError(f"optimizer {name!r} is not one of {', '.join(sorted(known))}")
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        return None
    try:
        return known[name.lower()](trainable, **{"lr": lr, **options})
    except (TypeError, ValueError, RuntimeError) as error:
        raise MethodError(
            f"optimizer {name!r} refuses lr={lr}, {dict(options)}: {error}"
        ) from error


def learning_rate(lr: float, shape: str, total_steps: int | None) -> Callable[[int], float]:
    """The learning rate of step t: constant, or a cosine from `lr` to lr/100 over `total_steps`.

    As released, q = (1 + cos(pi t / T)) / 2, here per step instead of per epoch (paper.md 1.4).

    Raises:
        MethodError: another shape, or fewer than 1 step.
    """
    if shape not in ("cosine", "constant"):
        raise MethodError(f"lr_schedule {shape!r} is not one of constant, cosine")
    if shape == "constant" or total_steps is None:
        return lambda step: lr
    if total_steps < 1:
        raise MethodError(f"total_steps is {total_steps}; a cosine needs at least 1")

    def cosine(step: int) -> float:
        q = 0.5 * (1 + math.cos(math.pi * min(step, total_steps) / total_steps))
        return lr * (LR_FLOOR + (1 - LR_FLOOR) * q)

    return cosine
