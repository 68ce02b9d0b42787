"""Early Exit: a local classifier per stage, trained by cross entropy into the stage.

As in DASCPL's `EE` models (paper.md section 2.2): the stages are cut, each has a classifier of its
own on its output, and inference gives the logits of all of them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Self

from scpl_compile.errors import MethodError
from scpl_compile.ir import Scalar
from scpl_compile.methods.local import LocalMethod
from scpl_compile.runtime.loss_options import LossOptions

__all__ = ["EarlyExit"]

_OF_CONTRAST = (
    "contrast", "temperature", "divisor", "impl", "out", "objective", "detach_classifier",
)  # fmt: skip


class EarlyExit(LocalMethod):
    """Local cross entropy; one output per stage."""

    name = "early_exit"
    exits = True

    def __init__(self, options: LossOptions, last: str = "through") -> None:
        weight = options.cross_entropy or 1.0
        super().__init__(replace(options, contrast=0.0, cross_entropy=weight), last)

    @classmethod
    def make(
        cls, options: Mapping[str, Scalar], *, preset: str = "default", is_text: bool = False
    ) -> Self:
        """As LocalMethod; an option that would have no effect is refused."""
        _check(options)
        return super().make(options, preset=preset, is_text=is_text)


def _check(options: Mapping[str, Scalar]) -> None:
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
