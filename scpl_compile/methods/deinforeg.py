"""DeInfoReg (arXiv 2506.18193): features that stay spread and uncorrelated, and whose similarities
are those of the labels.

Its local loss takes one product of the batch with itself, and no softmax. A local classifier reads
the stage's pooled output without a gradient ("unmerge" in the released code); inference gives the
logits of all stages.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

from scpl_compile.errors import MethodError
from scpl_compile.ir import SINGLE_LABEL, Scalar
from scpl_compile.methods.local import LocalMethod

__all__ = ["DeInfoReg"]


class DeInfoReg(LocalMethod):
    """Stages trained by `runtime.similarity.deinforeg` of their projection, each with an exit."""

    name = "deinforeg"
    tasks = (SINGLE_LABEL,)
    defaults = MappingProxyType({"objective": "deinforeg", "detach_classifier": True})
    paper = MappingProxyType(
        {
            "vision": MappingProxyType(
                {"head": "mlp-bn", "hidden": 2048, "out": 2048, "pooling": "none"}
            ),
            "text": MappingProxyType({"head": "identity", "pooling": "mean"}),
        }
    )
    exits = True

    @classmethod
    def make(
        cls, options: Mapping[str, Scalar], *, preset: str = "default", is_text: bool = False
    ) -> Self:
        """As LocalMethod; an option of the contrastive loss is refused."""
        for name in ("temperature", "divisor", "impl", "objective"):
            if name in options:
                raise MethodError(f"method 'deinforeg' has no option {name!r}; method scpl has")
        return super().make(options, preset=preset, is_text=is_text)
