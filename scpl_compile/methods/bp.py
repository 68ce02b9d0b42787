"""Plain backpropagation over the stages: what SCPL is compared with."""

from collections.abc import Mapping
from typing import Self

from scpl_compile.errors import MethodError
from scpl_compile.ir import TASKS, LocalLoss, Scalar
from scpl_compile.methods.base import Method, StageView, cross_entropy_loss

__all__ = ["BP_SCHEDULES", "Backpropagation"]

BP_SCHEDULES = ("gpipe", "1f1b", "zb", "ddp")
"""Schedules of backpropagation that may stand for the method, as `--method gpipe`."""


class Backpropagation(Method):
    """The gradient crosses every cut; only the last stage has a loss.

    schedule: "bp", one stage after another (naive model parallelism), or one that runs on ranks;
    default: that of the class.
    """

    name = "bp"
    detach = False
    schedule = "bp"
    tasks = TASKS

    def __init__(self, schedule: str = "") -> None:
        self.schedule = schedule or self.schedule

    @classmethod
    def make(
        cls, options: Mapping[str, Scalar], *, preset: str = "default", is_text: bool = False
    ) -> Self:
        """Without options; every preset is the same."""
        if options:
            raise MethodError(
                f"method {cls.name!r} has no local loss, so no option {next(iter(options))!r}; "
                "methods scpl and early_exit have"
            )
        return cls()

    def losses(self, view: StageView) -> tuple[LocalLoss, ...]:
        """Cross entropy in the last stage."""
        return (cross_entropy_loss(view),) if view.is_last else ()
