"""One training step of one emitted stage, against its forward and the losses of the plan."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from scpl_compile.capture.state import RandomState, preserved
from scpl_compile.errors import VerifyError, context
from scpl_compile.ir import MULTI_LABEL, Plan, Stage
from scpl_compile.runtime.losses import binary_cross_entropy, cross_entropy
from scpl_compile.runtime.objectives import build_loss
from scpl_compile.runtime.own_stage import build_without_memory
from scpl_compile.runtime.stage import StopGradient, as_tuple
from scpl_compile.verify.compare import (
    RTOL,
    Print,
    compare_gradients,
    copies,
    difference,
    same_start,
    stops_open,
    taken_gradients,
    weighted,
)

__all__ = ["StepCheck", "named_outputs"]

Values = Mapping[str, Tensor]


def named_outputs(stage: Stage, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What a stage's forward gave, by name.

    Raises:
        VerifyError: these are not as many tensors as the plan says.
    """
    if len(outputs) != len(stage.outputs) or not all(isinstance(v, Tensor) for v in outputs):
        raise VerifyError(
            f"stage {stage.index} gives {len(outputs)} values, the plan says the tensors "
            f"{', '.join(stage.outputs)}"
        )
    return dict(zip(stage.outputs, outputs, strict=True))


class StepCheck:
    """Runs `training_step` of the emitted stage `module` and compares it.

    ::

        training_step ──▶ sent, losses, gradients
        forward ──▶ values ──▶ the plan's losses, gradients (stops opened)

    crossings: what the stage sends. recomputes: whether its backward ran the forward of a module.
    draws: whether its forward or its losses moved a random generator.
    """

    def __init__(
        self, plan: Plan, stage: Stage, model: nn.Module, module: nn.Module, labels: Tensor
    ) -> None:
        is_last = stage.index == plan.num_stages - 1
        self.crossings = () if is_last else plan.cuts[stage.index].crossings
        self.recomputes = False
        self.draws = False
        self._plan = plan
        self._stage = stage
        self._model = model
        self._module: Any = module
        self._labels = labels
        self._detach = is_last or plan.cuts[stage.index].detach
        self._stopped = [loss.name for loss in stage.losses if "stop_at" in loss.options]
        named = (loss.name for loss in stage.losses if loss.has_head)
        self._heads = nn.ModuleList(getattr(module, name) for name in named)

    def run(self, arguments: list[Tensor]) -> tuple[list[Tensor], set[str]]:
        """What the next stage receives, and the names of the stage's tensors that train.

        Raises:
            VerifyError: the step does something else than the plan says.
        """
        stage, module = self._stage, self._module
        versions, again = _versions(arguments), copies(arguments)
        with same_start(self._model), _as_before(self._heads):
            before = RandomState.now()
            sent, losses = module.training_step(*arguments, labels=self._labels)
            self.draws = before != RandomState.now()
            sent = as_tuple(sent)
            gradients = self._gradients(sent, losses, arguments)
            buffers = self._buffers()
        if stage.index:
            self._check_received(arguments, versions, again)
        versions = _versions(sent)
        with (
            same_start(self._model),
            _as_before(self._heads),
            stops_open([module]),
            _stopped_values(module) as stopped,
        ):
            outputs = named_outputs(stage, as_tuple(module(*again[: len(stage.inputs)])))
            values = dict(zip(stage.receives, again, strict=True)) | outputs
            self._check_stops(stopped, values)
            forward_buffers = self._buffers()
            planned = self._planned_losses(values)
            self._check_losses(losses, planned)
            forward = [values[crossing.name] for crossing in self.crossings]
            self._check_gradients(gradients, self._gradients(forward, planned, again))
            self._check_exit(values)
            self._check_sent(sent, forward, arguments)  # inside: what crosses may be a buffer
        if any(map(_differ, buffers, forward_buffers)):
            raise VerifyError("it leaves other buffers than its forward does")
        if versions != _versions(sent):
            raise VerifyError("its next forward writes into what it has sent")
        reached = {name for prints in gradients for name in prints}
        return [v.detach().requires_grad_(v.requires_grad) for v in sent], reached

    def _gradients(
        self, sent: Sequence[Tensor], losses: Values, arguments: Sequence[Tensor]
    ) -> list[dict[str, Print]]:
        """By the losses (and by what is sent, without a cut); then by each loss behind a stop."""
        inputs = zip(self._stage.receives, arguments, strict=True)
        leaves = dict(self._module.named_parameters())
        leaves |= {f"input {name}": value for name, value in inputs if value.requires_grad}
        roots = [[losses[name] for name in sorted(losses.keys() - set(self._stopped))]]
        roots += [[losses[name]] for name in self._stopped if name in losses]
        if not self._detach:
            roots[0] += [weighted(value) for value in sent if value.requires_grad]
        prints = []
        for index, values in enumerate(roots):
            live = [(i + 1) * value for i, value in enumerate(values) if value.requires_grad]
            with taken_gradients(leaves) as found, _noticing_forwards() as calls:
                if live:
                    again = index + 1 < len(roots)
                    torch.stack(live).sum().backward(retain_graph=again)
            self.recomputes = self.recomputes or bool(calls)
            prints.append(found)
        return prints

    def _buffers(self) -> list[Tensor]:
        """Copies of the model's buffers in the stage, as they are now."""
        heads = {loss.name for loss in self._stage.losses if loss.has_head}
        named = self._module.named_buffers()
        return [buffer.clone() for name, buffer in named if name.split(".")[0] not in heads]

    def _check_received(
        self, received: Sequence[Tensor], versions: list[int], before: Sequence[Tensor]
    ) -> None:
        """The sender's loss may still read it. A write through `.data` leaves the version."""
        for name, value, version, copy in zip(
            self._stage.receives, received, versions, before, strict=True
        ):
            if value._version != version:
                raise VerifyError("it writes into a tensor that it received")
            if not torch.equal(value, copy):
                raise VerifyError(
                    f"it writes into the tensor {name!r} that it received, unseen by autograd "
                    "(.data or numpy); let the model write into a clone"
                )

    def _planned_losses(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses as the plan says, with the weights of the emitted stage's heads; a code that
        one of them gives becomes one of the values.
        """
        losses: dict[str, Tensor] = {}
        entropy = binary_cross_entropy if self._plan.task == MULTI_LABEL else cross_entropy
        for loss in self._stage.losses:
            reads = tuple(values[name] for name in loss.reads)
            if loss.kind == "cross_entropy":
                if loss.name in losses:
                    raise VerifyError(f"two of its losses give a term of the name {loss.name!r}")
                losses[loss.name] = entropy(reads[0], self._labels)
                continue
            with torch.random.fork_rng(devices=()):  # its weights are not used; it draws below
                planned = build_without_memory(partial(build_loss, loss, self._plan.num_classes))
            weights = _tensors(getattr(self._module, loss.name))
            if _shapes(weights) != _shapes(_tensors(planned)):
                raise VerifyError(f"its {loss.name} has other weights than the plan says")
            named = {"labels": self._labels} | ({"mask": values[loss.mask]} if loss.mask else {})
            if loss.code:
                named["code"] = values[loss.code]
            found = torch.func.functional_call(planned, weights, reads, named)
            if loss.kind == "al":
                found, values[loss.gives] = found
            if both := sorted(losses.keys() & found.keys()):
                raise VerifyError(f"two of its losses give a term of the name {both[0]!r}")
            losses |= found
        return losses

    def _check_stops(self, stopped: list[Tensor], values: Values) -> None:
        for loss in self._stage.losses:
            name = str(loss.options.get("stop_at", ""))
            if name and not (stopped and all(value is values[name] for value in stopped)):
                raise VerifyError(f"it stops the gradient elsewhere than at the feature {name!r}")

    def _check_losses(self, losses: Values, planned: Values) -> None:
        if odd := sorted(losses.keys() ^ planned.keys()):
            where = "the plan" if odd[0] in planned else "the emitted stage"
            raise VerifyError(f"only {where} has the loss {odd[0]!r}")
        for name, value in planned.items():
            if _differ(losses[name], value):
                raise VerifyError(f"its loss {name!r} is another than the plan says")

    def _check_gradients(
        self, actual: list[dict[str, Print]], planned: list[dict[str, Print]]
    ) -> None:
        with context("by its losses"):
            sides = ("the emitted stage", "the plan")
            for behind, expected in zip(actual[1:], planned[1:], strict=True):
                if both := sorted(behind.keys() & planned[0].keys()):
                    raise VerifyError(f"the classifier's reaches {both[0]!r} before the feature")
                after = {name: p for name, p in expected.items() if name not in planned[0]}
                compare_gradients(behind, after, sides)
            compare_gradients(actual[0], planned[0], sides)

    def _check_exit(self, values: Values) -> None:
        if f"{self._stage.index}X" not in self._plan.inference:
            return
        loss = next(loss for loss in self._stage.losses if loss.has_head)
        reads = [values[name] for name in loss.reads]
        mask = [values[loss.mask]] if loss.mask else []
        head = getattr(self._module, loss.name)
        expected = self._inferred(head.logits, *reads, **({"mask": mask[0]} if mask else {}))
        if _differ(self._inferred(self._module.exit, *reads, *mask), expected):
            raise VerifyError("its exit gives other logits than its local classifier")

    def _inferred(self, call: Callable[..., Tensor], *args: Tensor, **named: Tensor) -> Tensor:
        """What the stage gives in inference, from the same random state every time."""
        with same_start(self._module), torch.no_grad():
            self._module.eval()
            return call(*args, **named)

    def _check_sent(
        self, sent: Sequence[Tensor], forward: Sequence[Tensor], arguments: Sequence[Tensor]
    ) -> None:
        if len(sent) != len(self.crossings):
            raise VerifyError(f"it sends {len(sent)} tensors, the plan says {len(self.crossings)}")
        raw_inputs = arguments if self._stage.index == 0 else ()
        owned = _memory([*self._module.parameters(), *self._module.buffers(), *raw_inputs])
        for crossing, value, truth in zip(self.crossings, sent, forward, strict=True):
            name = repr(crossing.name)
            if _differ(value, truth):
                raise VerifyError(f"it sends another {name} than its forward computes")
            if not self._detach:
                continue
            if value.requires_grad:
                raise VerifyError(f"the gradient of {name} crosses the cut")
            if not value.is_contiguous():
                raise VerifyError(f"{name} crosses the cut and is not contiguous")
            if _memory([value]) & owned:
                raise VerifyError(f"{name} crosses the cut as a view of its owner's memory")


def _differ(actual: Tensor, expected: Tensor) -> bool:
    return difference(actual, expected) > RTOL


def _versions(values: Sequence[Tensor]) -> list[int]:
    return [value._version for value in values]


def _memory(values: Sequence[Tensor]) -> set[int]:
    return {value.untyped_storage().data_ptr() for value in values} - {0}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _shapes(tensors: Values) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@contextmanager
def _as_before(heads: nn.Module) -> Iterator[None]:
    """Afterwards the heads are as before: one may keep means of its classes in a buffer, or the
    weights of a teacher, which training moves without a gradient.
    """
    values = [(parameter, parameter.detach().clone()) for parameter in heads.parameters()]
    try:
        with preserved(heads):
            yield
    finally:
        for parameter, value in values:
            parameter.data.copy_(value)


@contextmanager
def _stopped_values(module: nn.Module) -> Iterator[list[Tensor]]:
    """What goes through the stage's stops inside."""
    values: list[Tensor] = []
    stops = [part for part in module.modules() if isinstance(part, StopGradient)]
    hooks = [stop.register_forward_pre_hook(lambda m, args: values.extend(args)) for stop in stops]
    try:
        yield values
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _noticing_forwards() -> Iterator[list[str]]:
    """The classes of the modules that run a forward inside."""
    calls: list[str] = []
    hook = register_module_forward_pre_hook(lambda m, args: calls.append(type(m).__name__))
    try:
        yield calls
    finally:
        hook.remove()
