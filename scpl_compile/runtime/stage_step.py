"""One stage's share of a step: forward, backward, update. Every engine runs exactly this."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scpl_compile.errors import MethodError, ProgramError, ScplError, TrainingError, context
from scpl_compile.runtime.activity import Activity
from scpl_compile.runtime.descent import Descent
from scpl_compile.runtime.lane import Lane, Mark
from scpl_compile.runtime.randomness import StageRandom
from scpl_compile.runtime.sharding import like, whole_tensor
from scpl_compile.runtime.stage import as_tuple
from scpl_compile.runtime.step_options import StepOptions

__all__ = ["KEPT_LOSSES", "StageStep"]

KEPT_LOSSES = 10_000
"""Steps of which a stage keeps the losses until they are taken; older ones are forgotten."""


@dataclass(slots=True)
class _InFlight:
    """What a stage keeps of a step between F and U."""

    values: dict[str, Tensor]
    labels: Tensor
    sent: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


class StageStep:
    """F, B and U of one stage, with its optimizer, random stream and device.

    inputs: names of the tensors that the stage's forward takes; sends: names of those that cross
    to the next stage, in the order in which `training_step` gives them. detach is False where
    gradients cross the cuts. draws, recomputes: whether F, and B too (activation checkpointing),
    draw randomness. training_step: in place of the module's, as one that averages gradients over
    replicas. options: precision, memory format, clipping, accumulation, what crosses a cut. The
    engine tells `activity` when the stage waits.

    The host never waits for the device here: losses stay where they are until `take_losses`.

    Raises:
        MethodError: fp16 where gradients cross the cuts.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        *,
        inputs: tuple[str, ...],
        sends: tuple[str, ...],
        lane: Lane,
        optimizer: torch.optim.Optimizer | None,
        learning_rate: Callable[[int], float],
        random: StageRandom,
        detach: bool,
        draws: bool = True,
        recomputes: bool = True,
        training_step: Callable[..., Any] | None = None,
        options: StepOptions | None = None,
    ) -> None:
        self.options = options = options or StepOptions()
        if options.amp == "fp16" and not detach:
            raise MethodError(
                "amp 'fp16' scales the loss of every stage by itself, but in backpropagation "
                "gradients cross between the stages; take amp 'bf16', which needs no scale"
            )
        options.arrange_module(module)
        self.index = index
        self.module = module
        own: Callable[..., Any] = module.training_step  # type: ignore[assignment]
        self._training_step = training_step or own
        self.inputs = inputs
        self.sends = sends
        self.lane = lane
        self.activity = Activity()
        self._descent = Descent(module, optimizer, learning_rate, options, lane.device)
        self.random = random
        self.detach = detach
        self.draws = draws
        self.recomputes = recomputes
        self._in_flight: dict[int, _InFlight] = {}
        self._finished: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=KEPT_LOSSES)
        with lane.scope():
            self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=lane.device)

    def adopt(self) -> None:
        """The caller made the module, or loaded it, on its own stream; it is this lane's now.

        A module may replace a buffer, and so free the one that the caller made.
        """
        self.lane.follow()
        self.lane.keep(value for _, value in _all_state(self.module))

    def receive(self, step: int, values: Mapping[str, Tensor], labels: Tensor, mark: Mark) -> None:
        """RECV: take the tensors of `step` to this stage's device.

        Labels are of B samples, the first tensor has B or, with several views of each sample, a
        multiple of B samples: then the labels are repeated here, on the device.
        """
        received = self.lane.receive({name: value.detach() for name, value in values.items()}, mark)
        if self.index > 0:
            received = {name: self.options.widen(value) for name, value in received.items()}
        received = self.options.arrange(received)
        labels = self.lane.receive({"labels": labels}, None)["labels"]
        if self.index == 0:
            num_samples = received[self.inputs[0]].shape[0]
            if num_samples != labels.shape[0]:
                labels = torch.cat([labels] * (num_samples // labels.shape[0]))
        if not self.detach:
            for name, value in values.items():
                received[name].requires_grad_(value.requires_grad)
        self._in_flight[step] = _InFlight(received, labels)

    def forward(self, step: int) -> None:
        """F: outputs for the next stage and the local losses of this one."""
        flight = self._flight(step)
        arguments = [flight.values[name] for name in self.inputs]
        with self.random.drawing() if self.draws else nullcontext(), self.autocast():
            sent, losses = self._training_step(*arguments, labels=flight.labels)
        flight.sent = dict(zip(self.sends, as_tuple(sent), strict=True))
        flight.sent = {name: self.options.narrow(value) for name, value in flight.sent.items()}
        flight.losses = losses
        self._note_finite(step, losses)

    def _note_finite(self, step: int, losses: Mapping[str, Tensor]) -> None:
        if losses:
            scalars = [loss.detach().float().reshape(()) for loss in losses.values()]
            total = torch.stack(scalars).sum()
            is_first = (self._first_bad_step < 0) & ~torch.isfinite(total)
            self._first_bad_step = torch.where(is_first, step, self._first_bad_step)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """None where the stage has nothing to train."""
        return self._descent.optimizer

    def autocast(self) -> AbstractContextManager[Any]:
        """What this stage's modules run in, in training and in evaluation."""
        return self.options.autocast(self.lane.device)

    def outgoing(self, step: int) -> tuple[dict[str, Tensor], Tensor, Mark]:
        """SEND: the crossing tensors, the labels, and the point from which they may be read."""
        flight = self._flight(step)
        return flight.sent, flight.labels, self.lane.mark()

    def take_gradients(self, step: int, gradients: Mapping[str, Tensor], mark: Mark) -> None:
        """RECV_B: the gradients of what this stage has sent."""
        self._flight(step).gradients = self.lane.receive(gradients, mark)

    def backward(self, step: int) -> None:
        """B: backward of the local losses and, in backpropagation, of what was sent."""
        flight = self._flight(step)
        roots = self._roots(flight.losses)
        seeds: list[Tensor | None] = [None] * len(roots)
        for name, gradient in flight.gradients.items():
            roots.append(flight.sent[name])
            seeds.append(gradient)
        if roots:
            with self.random.drawing() if self.recomputes else nullcontext():
                torch.autograd.backward(roots, seeds)

    def backward_of(self, losses: Mapping[str, Tensor]) -> None:
        """B alone, of losses that were computed elsewhere."""
        torch.autograd.backward(self._roots(losses))

    def _roots(self, losses: Mapping[str, Tensor]) -> list[Tensor]:
        return [self._descent.root(loss) for loss in losses.values() if loss.requires_grad]

    def input_gradients(self, step: int) -> tuple[dict[str, Tensor], Mark]:
        """SEND_B: the gradients of the tensors that this stage received."""
        values = self._flight(step).values
        gradients = {name: value.grad for name, value in values.items() if value.grad is not None}
        gradients = {name: self.options.narrow(value) for name, value in gradients.items()}
        return gradients, self.lane.mark()

    def update(self, step: int) -> None:
        """U: the optimizer's share; the step is over for this stage."""
        flight = self._in_flight.pop(step)
        self._end(step, flight.losses)

    def update_after(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """U alone, where forward and backward were run by another schedule, with these losses."""
        self._note_finite(step, losses)
        self._end(step, losses)

    def _end(self, step: int, losses: Mapping[str, Tensor]) -> None:
        self._descent.update(step)
        self._finished.append((step, {name: loss.detach() for name, loss in losses.items()}))

    def _flight(self, step: int) -> _InFlight:
        if step not in self._in_flight:
            raise TrainingError(f"stage {self.index} holds no batch of step {step}")
        return self._in_flight[step]

    def take_losses(self) -> list[tuple[int, dict[str, float]]]:
        """(step, losses) of the steps finished since the last call. Waits for the device.

        Of the last KEPT_LOSSES of them; that a loss of an older one was not finite is told still.

        Raises:
            TrainingError: a loss is not finite; names this stage and the first such step.
        """
        finished = [self._finished.popleft() for _ in range(len(self._finished))]
        with self.lane.scope():
            scalars = [loss.float().reshape(()) for _, row in finished for loss in row.values()]
            numbers: Iterable[float] = torch.stack(scalars).tolist() if scalars else ()
        values = iter(numbers)
        rows = [(step, {name: next(values) for name in losses}) for step, losses in finished]
        self.check_finite()
        return rows

    def check_finite(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Raises TrainingError if a loss was not finite, or what is trained among `tensors` is not.

        tensors: those of `state`; a finite loss may still have given an infinite gradient. Waits
        for the device.
        """
        with self.lane.scope():
            bad = int(self._first_bad_step)
        if bad >= 0:
            raise TrainingError(
                f"stage {self.index}: the loss is not finite since step {bad}; lower --lr, raise "
                "the temperature, or look at the inputs of that step"
            )
        if tensors is None:
            return
        if (name := self._first_infinite(tensors)) is not None:
            raise TrainingError(f"stage {self.index}: {name} is not finite; lower --lr")

    def _first_infinite(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Among those of `state` a trained parameter that is not finite, or NaN in the optimizer.

        A buffer may hold infinities, a second moment may have grown to one.
        """
        trained = {f"module.{n}" for n, p in self.module.named_parameters() if p.requires_grad}
        for name, value in tensors.items():
            if name in trained and not value.isfinite().all():
                return f"parameter {name.removeprefix('module.')!r}"
            if name.startswith("optimizer.") and value.isnan().any():
                return repr(name)
        return None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON values): all that a later run needs to go on exactly from here."""
        with self.lane.scope():
            tensors = {f"module.{name}": value for name, value in _all_state(self.module)}
            own, values = self._descent.state()
            tensors |= own
            random_tensors, values["random"] = self.random.state()
            tensors |= {f"random.{name}": value for name, value in random_tensors.items()}
            copies = {
                name: whole_tensor(value.detach()).to("cpu", copy=True)
                for name, value in tensors.items()
            }
            return {name: value.contiguous() for name, value in copies.items()}, values

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises:
            TrainingError: the tensors are not those of this stage, or of another optimizer.
            ProgramError: they are none that `state` gave.
        """
        try:
            self._load(tensors, values)
        except (ScplError, MemoryError):
            raise
        except Exception as error:  # somebody made the file up: torch and numpy raise all there is
            raise ProgramError(
                f"stage {self.index}: the checkpoint is damaged ({type(error).__name__}: {error}); "
                "remove it to resume earlier"
            ) from error

    def _load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        own = dict(_all_state(self.module))
        stored = {
            n.removeprefix("module."): v for n, v in tensors.items() if n.startswith("module.")
        }
        if own.keys() != stored.keys():
            odd = sorted(own.keys() ^ stored.keys())[0]
            raise TrainingError(
                f"stage {self.index}: the checkpoint and the stage differ in {odd!r}"
            )
        if (bad := self._first_infinite(tensors)) is not None:
            raise ProgramError(
                f"stage {self.index}: {bad} is not finite in the checkpoint; remove it to resume "
                "earlier"
            )
        with torch.no_grad(), self.lane.scope():
            for name, value in stored.items():
                if (own[name].shape, own[name].dtype) != (value.shape, value.dtype):
                    raise TrainingError(
                        f"stage {self.index}: {name!r} is {tuple(value.shape)} {value.dtype} in "
                        f"the checkpoint and {tuple(own[name].shape)} {own[name].dtype} in the "
                        "stage"
                    )
                own[name].copy_(like(value, own[name]))
            with context(f"stage {self.index}"):
                self._descent.load_state(tensors, values)
        random_tensors = {
            n.removeprefix("random."): v for n, v in tensors.items() if n.startswith("random.")
        }
        self.random.load_state(random_tensors, values["random"])
        self._finished.clear()
        with self.lane.scope():
            self._first_bad_step = torch.full_like(self._first_bad_step, -1)


def _all_state(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Parameters and buffers of both kinds (persistent and not), each shared tensor once."""
    yield from module.named_parameters()
    yield from module.named_buffers()
