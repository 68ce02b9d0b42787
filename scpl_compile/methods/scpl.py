"""SCPL, Supervised Contrastive Parallel Learning (arXiv 2602.00062).

Each stage trains on the contrastive loss of its own output. The last stage is trained in one of
two ways: `released`, contrastive as well, with the model's classifier on a detached feature; or
`through`, by the cross entropy of the model's own logits.
"""

from scpl_compile.ir import LocalLoss
from scpl_compile.methods.base import Method, StageView, last_losses, local_loss
from scpl_compile.runtime.loss_options import LossOptions

__all__ = ["Scpl"]


class Scpl(Method):
    """Local contrastive losses, with cross entropy beside them where the options say so."""

    name = "scpl"

    def __init__(self, options: LossOptions, last: str) -> None:
        self.options = options
        self.last = last

    def losses(self, view: StageView) -> tuple[LocalLoss, ...]:
        """The stage's contrastive loss; in the last stage as `last` says."""
        if not view.is_last:
            return (local_loss(view.sends, view, self.options),)
        return last_losses(view, self.options, self.last)
