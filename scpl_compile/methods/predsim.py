"""PredSim (Nokland & Eidnes 2019, arXiv 1901.06656): local cross entropy, and similarities like the
labels'.

The last stage is trained through, by the cross entropy of the model's own logits.
"""

from scpl_compile.errors import MethodError
from scpl_compile.ir import LocalLoss, Scalar
from scpl_compile.methods.base import Method, StageView, cross_entropy_loss
from scpl_compile.methods.modules import module_loss
from scpl_compile.runtime.head_spec import HeadSpec
from scpl_compile.runtime.predsim import PredSim as PredSimLoss

__all__ = ["PredSim"]


class PredSim(Method):
    """similarity: weight of that term, from 0 to 1; the local classifier has the rest. pooling: of
    what that reads, as in HeadSpec.
    """

    name = "predsim"
    presets = ("default", "paper")  # which are the same

    def __init__(self, *, similarity: float = 0.99, pooling: str = "auto") -> None:
        if type(similarity) not in (int, float) or not 0 <= similarity <= 1:
            raise MethodError(f"option similarity is {similarity!r}; it must be from 0 to 1")
        HeadSpec(head="identity", pooling=pooling)  # told here, and not as a model without a cut
        self._options: dict[str, Scalar] = {"similarity": float(similarity), "pooling": pooling}

    def losses(self, view: StageView) -> tuple[LocalLoss, ...]:
        """The stage's local loss; in the last stage the model's own cross entropy."""
        if view.is_last:
            return (cross_entropy_loss(view),)
        return (module_loss(PredSimLoss, view.sends, view, self._options, kind="predsim"),)
