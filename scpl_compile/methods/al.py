"""Associated Learning (Kao & Chen 2021; Wu et al. 2022): every stage learns a code of the labels.

The codes go forward with the features: stage k encodes what stage k-1 made of the labels. Inference
goes forward through the stages, over the last bridge, and back through the decoders, so all heads
are needed then, and the model's own classifier is not: it stays untrained, where the last stage
computes what it reads.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Self

from scpl_compile.ir import LocalLoss, Scalar
from scpl_compile.methods.base import Method, StageView
from scpl_compile.methods.modules import module_loss
from scpl_compile.runtime.association import Association

__all__ = ["AssociatedLearning"]


class AssociatedLearning(Method):
    """latent, hidden: widths of a code and of a bridge. activation: tanh or sigmoid. pooling: of
    what the bridge reads, as in HeadSpec.

    The released activations (paper.md section 2.4), sigmoid for images and tanh for text, are those
    of the preset "paper". A sigmoid's codes of different classes lie close together at first, and a
    bridge that learns them before they part does not leave their mean: the default is tanh.
    """

    name = "al"
    leaves_classifier = True
    presets = ("default", "paper")

    def __init__(
        self,
        *,
        latent: int = 128,
        hidden: int = 256,
        activation: str = "tanh",
        pooling: str = "auto",
    ) -> None:
        self._latent = latent
        self._options: dict[str, Scalar] = {
            "latent": latent, "hidden": hidden, "activation": activation, "pooling": pooling,
        }  # fmt: skip

    @classmethod
    def make(
        cls, options: Mapping[str, Scalar], *, preset: str = "default", is_text: bool = False
    ) -> Self:
        """As Method."""
        released = {} if preset == "default" or is_text else {"activation": "sigmoid"}
        return super().make({**released, **options}, preset=preset, is_text=is_text)

    def losses(self, view: StageView) -> tuple[LocalLoss, ...]:
        """Bridge and autoencoder, of what the stage sends; in the last one of the feature that the
        classifier reads, or, where that is computed in another stage, of the logits.
        """
        last = view.feature or view.output
        values = view.sends if last is None else (last,)
        is_first = view.index == 0
        options = {**self._options, "is_first": is_first}
        found = module_loss(
            Association,
            values,
            view,
            options,
            kind="al",
            code_width=0 if is_first else self._latent,
        )
        return (
            replace(
                found,
                code="" if is_first else _name(view.index - 1),
                gives="" if view.is_last else _name(view.index),
            ),
        )

    def inference(self, num_stages: int) -> tuple[str, ...]:
        """Forward, the last bridge, and the decoders back to the labels."""
        back = [f"{k}D" for k in reversed(range(num_stages))]
        return (*super().inference(num_stages), f"{num_stages - 1}B", *back)


def _name(stage: int) -> str:
    return f"label_code{stage}"
