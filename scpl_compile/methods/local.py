"""What the methods with a head in every stage share: its options, their presets, and the exits."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar, Self

from scpl_compile.errors import MethodError
from scpl_compile.ir import SINGLE_LABEL, TASKS, LocalLoss, Scalar
from scpl_compile.methods.base import Method, StageView, last_losses, local_loss
from scpl_compile.runtime.loss_options import PAPER, LossOptions

__all__ = ["LAST", "LocalMethod"]

LAST = ("through", "released")


class LocalMethod(Method):
    """A head in every stage, as LossOptions describe; the last stage as `last` says.

    defaults: options that are other than those of LossOptions. paper: those of preset "paper",
    for images ("vision") and for text. exits: inference gives the logits of every stage's local
    classifier.
    """

    defaults: ClassVar[Mapping[str, Scalar]] = MappingProxyType({})
    paper: ClassVar[Mapping[str, Mapping[str, Scalar]]] = PAPER
    exits: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = TASKS

    def __init__(self, options: LossOptions, last: str = "through") -> None:
        if last not in LAST:
            raise MethodError(f"option last is {last!r}; it must be one of {', '.join(LAST)}")
        if self.exits and not options.cross_entropy:
            raise MethodError(
                f"option cross_entropy is 0, and method {self.name!r} needs a classifier in every "
                "stage; method scpl can do without it"
            )
        self.options = options
        self.last = last

    @classmethod
    def make(
        cls, options: Mapping[str, Scalar], *, preset: str = "default", is_text: bool = False
    ) -> Self:
        """With the options of the preset, overridden by `options`: those of LossOptions, and `last`
        ("through" or "released").
        """
        chosen: dict[str, Scalar] = {"last": "through", **cls.defaults}
        if preset == "paper":
            chosen |= {"last": "released", **cls.paper["text" if is_text else "vision"]}
        chosen |= options
        last = str(chosen.pop("last"))
        return cls(LossOptions.from_options(chosen), last)

    def check_task(self, task: str) -> None:
        """As Method; of the options, the objective deinforeg and the kernels of Triton take one
        label per sample.
        """
        super().check_task(task)
        for name, value in (("objective", "deinforeg"), ("impl", "triton")):
            if task != SINGLE_LABEL and getattr(self.options, name) == value:
                raise MethodError(
                    f"option {name} is {value!r}, which takes one label per sample, no task "
                    f"{task!r}; leave it out"
                )

    def losses(self, view: StageView) -> tuple[LocalLoss, ...]:
        """The stage's local loss; in the last stage as `last` says."""
        if not view.is_last:
            return (local_loss(view.sends, view, self.options),)
        options = self.options
        if options.detach_classifier:  # it is the model's own that gives the last logits
            options = replace(options, cross_entropy=0.0, detach_classifier=False)
        return last_losses(view, options, self.last)

    def inference(self, num_stages: int) -> tuple[str, ...]:
        """Forward of every stage; with exits, that of each but the last after it."""
        if not self.exits:
            return super().inference(num_stages)
        steps = [text for k in range(num_stages) for text in (f"{k}F", f"{k}X")]
        return tuple(steps[:-1])
