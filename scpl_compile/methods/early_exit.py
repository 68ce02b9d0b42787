"""Early Exit: a local classifier per stage, trained by cross entropy into the stage.

As in DASCPL's `EE` models (paper.md section 2.2): the stages are cut, each has a classifier of its
own on its output, and inference gives the logits of all of them.
"""

from dataclasses import replace

from scpl_compile.ir import LocalLoss
from scpl_compile.methods.base import Method, StageView, last_losses, local_loss
from scpl_compile.runtime.loss_options import LossOptions

__all__ = ["EarlyExit"]


class EarlyExit(Method):
    """Local cross entropy; one output per stage."""

    name = "early_exit"

    def __init__(self, options: LossOptions, last: str) -> None:
        self.options = replace(options, contrast=0.0, cross_entropy=options.cross_entropy or 1.0)
        self.last = last

    def losses(self, view: StageView) -> tuple[LocalLoss, ...]:
        """The stage's local classifier; in the last stage the model's own."""
        if not view.is_last:
            return (local_loss(view.sends, view, self.options),)
        return last_losses(view, self.options, self.last)

    def inference(self, num_stages: int) -> tuple[str, ...]:
        """Forward of every stage, with the exit of each but the last after it."""
        steps = [text for k in range(num_stages) for text in (f"{k}F", f"{k}X")]
        return tuple(steps[:-1])
