"""Early Exit: a local classifier per stage, trained by cross entropy into the stage.

As in DASCPL's `EE` models (paper.md section 2.2): the stages are cut, each has a classifier of its
own on its output, and inference gives the logits of all of them.
"""

from collections.abc import Mapping
from dataclasses import replace

from scpl_compile.errors import MethodError
from scpl_compile.ir import LocalLoss, Scalar
from scpl_compile.methods.base import Method, StageView, last_losses, local_loss
from scpl_compile.runtime.loss_options import LossOptions

__all__ = ["EarlyExit", "check_options"]


_OF_CONTRAST = ("contrast", "temperature", "divisor", "impl", "out")


def check_options(options: Mapping[str, Scalar]) -> None:
    """Raises MethodError for an option, as the user gave it, that would have no effect."""
    for name in options:
        if name in _OF_CONTRAST:
            raise MethodError(
                f"method 'early_exit' has no contrastive loss, so no option {name!r}; method scpl "
                "has"
            )
    if options.get("cross_entropy") == 0:
        raise MethodError(
            "option cross_entropy is 0, and method 'early_exit' trains on nothing else; method "
            "scpl can do without it"
        )
    if options.get("head", "auto") not in ("auto", "conv"):
        raise MethodError(
            f"option head is {options['head']!r}, which method 'early_exit' does not use: its "
            "classifier reads the pooled output, or that of head conv; see option classifier"
        )


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
