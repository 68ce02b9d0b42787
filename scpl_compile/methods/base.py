"""What a method is: where gradients stop, and what each stage trains on."""

import inspect
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from scpl_compile.cost import DeviceSpec, op_cost
from scpl_compile.errors import LossError, MethodError, OwnCodeError, ScplError
from scpl_compile.ir import SINGLE_LABEL, TASKS, LocalLoss, Scalar, TensorMeta
from scpl_compile.runtime.head_spec import Shapes
from scpl_compile.runtime.loss_options import (
    LossOptions,
    objective_flops,
    objective_parameters,
)

__all__ = [
    "PRESETS",
    "Mask",
    "Method",
    "StageView",
    "Value",
    "cross_entropy_loss",
    "features_of",
    "last_losses",
    "line_of",
    "local_loss",
    "loss_us",
    "losses_of",
]

PRESETS = ("default", "paper")


def losses_of(method: "Method", view: "StageView") -> tuple[LocalLoss, ...]:
    """What `method` says of a stage, whoever wrote it.

    Raises:
        MethodError: its own.
        OwnCodeError: it fails; the message says in which line of the class's file.
        LossError: it gives something else than losses.
    """
    try:
        found = method.losses(view)
    except ScplError:
        raise
    except Exception as error:
        kind = type(error).__name__
        where = line_of(error, type(method))
        raise OwnCodeError(
            f"losses() of method {method.name!r} fails: {kind}: {error}{where}"
        ) from error
    if not isinstance(found, (tuple, list)) or not all(isinstance(x, LocalLoss) for x in found):
        raise LossError(
            f"losses() of method {method.name!r} must give a tuple of losses, not {found!r:.60}"
        )
    if sum(loss.has_head for loss in found) > 1:
        raise LossError(
            f"losses() of method {method.name!r} gives several losses with a head; a stage has one"
        )
    if any(loss.kind != "al" and (loss.code or loss.gives) for loss in found):
        raise LossError(
            f"losses() of method {method.name!r} gives a loss that takes or gives a code, and only "
            "those of Associated Learning can; leave `code` and `gives` empty"
        )
    return tuple(found)


def loss_us(loss: LocalLoss, device: DeviceSpec) -> float:
    """Forward and backward of a local loss, microseconds."""
    return op_cost(3 * loss.flops, 3 * 4 * loss.num_parameters, device)


def line_of(error: BaseException, cls: type) -> str:
    """In brackets the last line in the file of `cls` on the way to `error`; "" if there is none."""
    try:
        path = inspect.getsourcefile(cls)
    except TypeError:  # a class that was typed in
        return ""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A tensor by its name in the graph."""

    name: str
    meta: TensorMeta


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """An input (B, length) that is nonzero where a token is valid."""

    name: str
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageView:
    """What a method sees of a stage, or of a candidate for one.

    index: 0 for every candidate, since nobody knows yet how many cuts come before it: losses that
    depend on it are balanced as those of the first stage, and shown with the cost that they have.
    sends: the gradient-carrying tensors that the stage computes and the next stages read.
    mask: the model's padding mask, if it has one.
    feature, output: of the last stage: what the model's own classifier reads (None where that is
    not one tensor computed in the stage), and the model's logits; None elsewhere.
    """

    index: int
    is_last: bool
    sends: tuple[Value, ...]
    mask: Mask | None
    feature: Value | None
    output: Value | None
    num_classes: int
    task: str = SINGLE_LABEL


class Method(ABC):
    """One way to train a cut model. Subclasses: one file each beside this one.

    name: as in `--method`. detach: gradients stop at the cuts. schedule: the default one, of
    runtime.schedules.DECOUPLED, or where gradients cross the cuts of JOINED. presets: of PRESETS,
    those that `make` takes. leaves_classifier: the model's own classifier is not trained. tasks: of
    ir.TASKS, those that its losses can train on (view.task tells which it is).
    """

    name: ClassVar[str]
    detach: ClassVar[bool] = True
    schedule: str = "stream"
    presets: ClassVar[tuple[str, ...]] = ("default",)
    leaves_classifier: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = (SINGLE_LABEL,)

    @classmethod
    def make(
        cls, options: Mapping[str, Scalar], *, preset: str = "default", is_text: bool = False
    ) -> Self:
        """The method with these options, which are the arguments of its constructor.

        Raises:
            MethodError: there is no such option, or it has a wrong value; the preset "paper" of a
                method that has none.
        """
        if preset not in cls.presets:
            raise MethodError(f"method {cls.name!r} has no preset {preset!r}")
        known = inspect.signature(cls).parameters
        takes_any = any(one.kind is one.VAR_KEYWORD for one in known.values())
        if not takes_any and (odd := sorted(options.keys() - known.keys())):
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise MethodError(f"method {cls.name!r} has no option {odd[0]!r}; {has}")
        try:
            return cls(**options)
        except ScplError:
            raise
        except Exception as error:
            text = str(error).replace(f"{cls.__qualname__}.__init__() ", "")
            is_told = isinstance(error, (TypeError, ValueError))
            kind = "" if is_told else f"{type(error).__name__}: "
            raise MethodError(f"method {cls.name!r}: {kind}{text}") from error

    @abstractmethod
    def losses(self, view: StageView) -> tuple[LocalLoss, ...]:
        """What the stage trains on. Raises MethodError where the method cannot be applied."""

    def check_task(self, task: str) -> None:
        """Raises MethodError where the losses, with their options, cannot train on `task`."""
        if task not in TASKS:
            raise MethodError(f"task {task!r} is not one of {', '.join(TASKS)}")
        if task not in self.tasks and task == SINGLE_LABEL:
            raise MethodError(
                f"method {self.name!r} takes no task {task!r}; give --task {self.tasks[0]}"
            )
        if task not in self.tasks:
            raise MethodError(
                f"method {self.name!r} takes one label per sample, no task {task!r}; methods scpl, "
                "early_exit, dascpl and bp do"
            )

    def inference(self, num_stages: int) -> tuple[str, ...]:
        """The steps of evaluation; without exits: forward of every stage ("0F", "1F").

        "0X" behind "0F" is the exit of stage 0, for which its loss has a method `logits`. The exit
        of the last stage is the model's own output, and needs no step.
        """
        return tuple(f"{k}F" for k in range(num_stages))


def _layout(meta: TensorMeta) -> str:
    """Channels last ("nhwc", Swin) where two equal sides come before another size."""
    if len(meta.shape) != 4:
        return "auto"
    _, first, second, third = meta.shape
    return "nhwc" if first == second != third else "auto"


def features_of(values: tuple[Value, ...]) -> tuple[Shapes, tuple[int, ...], str]:
    """(shapes without batch, batch dimensions, layout) of what a local loss reads."""
    shapes, batch_dims = [], []
    for value in values:
        dim = value.meta.batch_dim
        if dim is None:
            raise MethodError(
                f"{value.name!r} {value.meta.shape} crosses a cut and has no batch dimension, so "
                "no local loss can read it; cut elsewhere with --split-at"
            )
        shapes.append(tuple(n for i, n in enumerate(value.meta.shape) if i != dim))
        batch_dims.append(dim)
    layouts = {_layout(value.meta) for value in values} - {"auto"}
    return shapes, tuple(batch_dims), layouts.pop() if len(layouts) == 1 else "auto"


def local_loss(values: tuple[Value, ...], view: StageView, options: LossOptions) -> LocalLoss:
    """A head of its own that reads `values`, with the arguments that build it.

    Raises:
        MethodError: the options do not fit the shapes.
    """
    shapes, batch_dims, layout = features_of(values)
    if options.layout == "auto" and layout != "auto":
        options = replace(options, layout=layout)
    batch_size = values[0].meta.shape[batch_dims[0]]
    lengths = {
        shape[0]
        for shape, dim in zip(shapes, batch_dims, strict=True)
        if len(shape) == 2 and not dim
    }
    return LocalLoss(
        name="local_loss",
        kind="local",
        reads=tuple(value.name for value in values),
        mask=view.mask.name if view.mask and lengths == {view.mask.length} else "",
        in_shapes=tuple(tuple(shape) for shape in shapes),
        batch_dims=batch_dims,
        options=options.arguments(shapes),
        num_parameters=objective_parameters(options, shapes, view.num_classes),
        flops=objective_flops(options, shapes, view.num_classes, batch_size),
    )


def last_losses(view: StageView, options: LossOptions, last: str) -> tuple[LocalLoss, ...]:
    """What a last stage trains on.

    "through": the cross entropy of the model's own logits. "released": a local loss on the feature
    that the classifier reads, and the classifier on that feature detached (paper.md section 1.4);
    where the stage computes no such feature, as "through".
    """
    feature = view.feature
    if last == "through" or feature is None:
        return (cross_entropy_loss(view),)
    if options.head == "conv" and len(feature.meta.shape) != 4:
        options = replace(options, head="auto")  # a pooled vector has no map to convolve
    local = local_loss((feature,), view, options)
    return (local, cross_entropy_loss(view, stop_at=feature.name))


def cross_entropy_loss(view: StageView, *, stop_at: str = "") -> LocalLoss:
    """Cross entropy of the model's own logits; the gradient stops at `stop_at` ("": nowhere)."""
    options: Mapping[str, Scalar] = {"stop_at": stop_at} if stop_at else {}
    if view.output is None:
        raise MethodError(
            f"stage {view.index} does not have the model's logits, only the last one does "
            "(view.is_last)"
        )
    reads = (view.output.name,)
    return LocalLoss(name="classifier", kind="cross_entropy", reads=reads, options=options)
