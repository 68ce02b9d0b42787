"""Plain backpropagation over the stages: what SCPL is compared with."""

from scpl_compile.ir import LocalLoss
from scpl_compile.methods.base import Method, StageView, cross_entropy_loss

__all__ = ["Backpropagation"]


class Backpropagation(Method):
    """The gradient crosses every cut; only the last stage has a loss.

    schedule: "bp", one stage after another (naive model parallelism), or one that runs on ranks.
    """

    name = "bp"
    detach = False

    def __init__(self, schedule: str = "bp") -> None:
        self.schedule = schedule

    def losses(self, view: StageView) -> tuple[LocalLoss, ...]:
        """Cross entropy in the last stage."""
        return (cross_entropy_loss(view),) if view.is_last else ()
