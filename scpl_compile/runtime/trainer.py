"""The trainer: what `build_trainer` gives and a training loop calls."""

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scpl_compile.actions import Action
from scpl_compile.errors import DataError, MethodError, ProgramError, TrainingError
from scpl_compile.ir import Plan, Scalar
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime.engine import Engine, Event, StageState
from scpl_compile.runtime.lane import Lane, resolve_devices
from scpl_compile.runtime.optim import learning_rate, make_optimizer
from scpl_compile.runtime.randomness import StageRandom, seeded, spread_seed
from scpl_compile.runtime.stage import as_tuple, evaluating
from scpl_compile.runtime.stage_step import StageStep

__all__ = ["Evaluation", "StageClass", "Trainer", "allowed_schedules"]

StageClass = Callable[[nn.Module], nn.Module]
"""An emitted stage class: made from the model whose modules it takes."""

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

_HEADS, _STAGE = 1, 2  # what a seed is spread for: the heads' first weights, a stage's own stream


def allowed_schedules(plan: Plan) -> tuple[str, ...]:
    """The schedules that the plan's method allows; the first is the default."""
    return ("bp",) if plan.schedule == "bp" else ("stream", "in_step", "sequential")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """accuracy and mean cross entropy of every exit (the last one is the model's own output)."""

    num_samples: int
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """Share of samples whose label the last exit finds."""
        return self.accuracies[-1]


class Trainer:
    """Trains the stages of a plan.

    Args:
        plan: what was compiled.
        model: whose modules the stages take; it is trained in place.
        stages: the emitted stage classes.
        devices: at most one per stage ("cpu", "cuda:0", …); default: the plan's placement.
        optimizer, lr, optimizer_options: of every stage, by name in torch.optim.
        lr_schedule, total_steps: "cosine" falls to lr/100 over total_steps; None keeps lr.
        schedule: "stream", "in_step", "sequential"; "bp" for backpropagation.
        seed: of the heads' first weights and of every stage's random stream.
        threads_per_stage: intra-op threads; default: the plan's. Equal threads, equal bits.
        random_stages: the stages whose forward draws randomness; None counts all of them.
        recompute_stages: those whose backward draws too (activation checkpointing); None: all.
        record_events: keep every executed action with its times in `events`.

    A step returns at once: do not write to its tensors afterwards, and draw random numbers of your
    own inside runtime.own_draws(). Losses are read when asked for.

    Raises:
        MethodError: an option that the plan does not allow.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        stages: Sequence[StageClass],
        *,
        devices: Sequence[str] | None = None,
        optimizer: str = "adam",
        lr: float = 1e-3,
        optimizer_options: Mapping[str, Scalar] | None = None,
        lr_schedule: str = "constant",
        total_steps: int | None = None,
        schedule: str | None = None,
        seed: int = 0,
        threads_per_stage: int | None = None,
        random_stages: Sequence[int] | None = None,
        recompute_stages: Sequence[int] | None = None,
        queue_depth: int = 2,
        record_events: bool = False,
        actions: Sequence[Iterator[Action]] | None = None,
    ) -> None:
        self.plan = plan
        self.model = model
        self.seed = seed
        self.schedule = self._check_schedule(schedule or plan.schedule)
        self.threads_per_stage = threads_per_stage or plan.threads_per_stage
        self.devices = resolve_devices(tuple(devices or plan.placement), plan.num_stages)
        everyone = range(plan.num_stages)
        draws = set(everyone if random_stages is None else random_stages)
        recomputes = set(everyone if recompute_stages is None else recompute_stages)
        rate = learning_rate(lr, lr_schedule, total_steps)
        steps = []
        for k, make in enumerate(stages):
            with seeded(spread_seed(seed, _HEADS, k)):
                module = make(model)
            lane = Lane(self.devices[k])
            module.to(lane.device).train()
            steps.append(
                StageStep(
                    k,
                    module,
                    inputs=plan.stages[k].inputs,
                    sends=_sends(plan, k),
                    lane=lane,
                    optimizer=make_optimizer(
                        optimizer, module.parameters(), lr, optimizer_options or {}
                    ),
                    learning_rate=rate,
                    random=StageRandom(spread_seed(seed, _STAGE, k), lane.device),
                    detach=self.schedule != "bp",
                    draws=k in draws,
                    recomputes=k in recomputes,
                )
            )
        self._stages = tuple(steps)
        self._engine_options: dict[str, Any] = {
            "schedule": self.schedule,
            "threads_per_stage": self.threads_per_stage,
            "depth": queue_depth,
            "record_events": record_events,
        }
        self._engine = Engine(self._stages, **self._engine_options, actions=actions)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future[None] | None = None
        self._has_warned = False

    def _check_schedule(self, schedule: str) -> str:
        allowed = allowed_schedules(self.plan)
        if schedule not in allowed:
            method = "bp" if schedule == "bp" else "scpl"
            raise MethodError(
                f"schedule {schedule!r} does not go with method {self.plan.method!r}, which allows "
                f"{', '.join(allowed)}; for it, compile with: "
                f"scpl compile {self.plan.model} --method {method} "
                f"--input '{','.join(map(str, self.plan.inputs))}' -o DIR"
            )
        return schedule

    # ------------------------------------------------------------------ training

    @property
    def num_steps(self) -> int:
        """Steps submitted, those of the runs before a resume included."""
        return self._engine.num_steps

    @property
    def events(self) -> tuple[Event, ...]:
        """The executed actions, where `record_events` was asked for."""
        return tuple(self._engine.events)

    def step(self, inputs: Inputs, labels: Tensor) -> None:
        """Train every stage on one batch. Returns as soon as stage 0 has room for it.

        inputs: the model's inputs (one tensor, a sequence, or a mapping by name), batch first;
        labels: int64 (B,), or (B,) for inputs of n·B samples (n views, view-major).

        Raises:
            DataError: labels out of range, of another dtype or number.
            TrainingError: a stage has failed.
        """
        values = self._named(inputs)
        self._check_labels(labels, next(iter(values.values())).shape[0])
        self._engine.submit(values, labels)

    def _named(self, inputs: Inputs) -> dict[str, Tensor]:
        names = [spec.name for spec in self.plan.inputs]
        if isinstance(inputs, Mapping):
            values = dict(inputs)
        else:
            tensors = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
            if len(tensors) != len(names):
                raise DataError(f"the model takes {len(names)} inputs, not {len(tensors)}")
            values = dict(zip(names, tensors, strict=True))
        if values.keys() != set(names):
            raise DataError(f"the model takes the inputs {names}, not {sorted(values)}")
        for spec in self.plan.inputs:
            shape = tuple(values[spec.name].shape[1:])
            if values[spec.name].ndim != 1 + len(spec.shape):
                raise DataError(
                    f"input {spec.name!r} has the shape (batch, {', '.join(map(str, shape))}); "
                    f"the program was compiled for (batch, {', '.join(map(str, spec.shape))})"
                )
        return values

    def _check_labels(self, labels: Tensor, num_samples: int) -> None:
        """On the host and before the copy: later it would be a device-side assert."""
        if not isinstance(labels, Tensor):
            raise DataError(f"labels must be an int64 tensor (B,), not {type(labels).__name__}")
        if labels.dtype != torch.int64 or labels.ndim != 1:
            raise DataError(f"labels must be int64 (B,), not {labels.dtype} {tuple(labels.shape)}")
        if not labels.numel() or not num_samples or num_samples % labels.numel():
            raise DataError(f"{num_samples} samples have {labels.numel()} labels")
        low, high = (int(bound) for bound in torch.aminmax(labels))
        if low == high and labels.numel() > 1 and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"all labels of a batch are {low}; one class teaches a contrastive loss nothing",
                stacklevel=3,
            )
        if low < 0 or high >= self.plan.num_classes:
            bad = low if low < 0 else high
            raise DataError(
                f"label {bad} is out of range for {self.plan.num_classes} classes; "
                "compile with a larger --num-classes, or mend the labels"
            )

    def take_losses(self) -> list[list[tuple[int, dict[str, float]]]]:
        """For every stage (step, losses by name) of what it has finished since the last call.

        Raises:
            TrainingError: a loss is not finite (names the stage and the first such step).
        """
        return [stage.take_losses() for stage in self._stages]

    def losses(self) -> list[dict[str, float]]:
        """For every stage the mean of each loss over the steps finished since the last call."""
        means = []
        for rows in self.take_losses():
            names = rows[0][1] if rows else {}
            means.append({name: sum(row[name] for _, row in rows) / len(rows) for name in names})
        return means

    def drain(self) -> None:
        """Wait until every stage has finished every submitted step."""
        self._engine.drain()

    # ------------------------------------------------------------------ inference and state

    @torch.no_grad()
    def predict(self, inputs: Inputs) -> list[Tensor]:
        """The logits of every exit, by the plan's inference steps, in eval mode."""
        self.drain()
        try:
            with evaluating([stage.module for stage in self._stages]):
                return self._infer(self._named(inputs))
        finally:
            for stage in self._stages:
                stage.lane.follow()  # the next update comes after what was launched here

    def _infer(self, values: dict[str, Tensor]) -> list[Tensor]:
        exits = []
        for text in self.plan.inference:
            k, kind = int(text[:-1]), text[-1]
            stage, spec = self._stages[k], self.plan.stages[k]
            values = stage.lane.receive(values, None)
            if kind == "F":
                outputs = as_tuple(stage.module(*(values[name] for name in spec.inputs)))
                values |= dict(zip(spec.outputs, outputs, strict=True))
            else:
                loss = next(loss for loss in spec.losses if loss.kind == "local")
                names = (*loss.reads, loss.mask) if loss.mask else loss.reads
                exits.append(stage.module.exit(*(values[name] for name in names)))  # type: ignore[operator]
        exits.append(values[self.plan.outputs[0]])
        return exits

    def evaluate(self, batches: Iterable[Any]) -> Evaluation:
        """Accuracy and cross entropy over `batches`, each with .inputs and .labels, or a pair."""
        correct: list[float] = []
        losses: list[float] = []
        num_samples = 0
        for batch in batches:
            inputs, labels = (batch.inputs, batch.labels) if hasattr(batch, "labels") else batch
            exits = self.predict(inputs)
            correct = correct or [0.0] * len(exits)
            losses = losses or [0.0] * len(exits)
            for i, logits in enumerate(exits):
                target = labels.to(logits.device)
                correct[i] += float((logits.argmax(-1) == target).sum())
                losses[i] += float(F.cross_entropy(logits.float(), target, reduction="sum"))
            num_samples += len(labels)
        if num_samples == 0:
            raise DataError("there is no sample to evaluate on")
        return Evaluation(
            num_samples=num_samples,
            accuracies=tuple(c / num_samples for c in correct),
            losses=tuple(value / num_samples for value in losses),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The trained model under its original names; loads into the original model. Drains.

        Raises TrainingError where a loss was not finite: the weights are lost.
        """
        self.drain()
        for step in self._stages:
            step.check_finite()
        state = self.model.state_dict()
        for stage, spec in zip(self._stages, self.plan.stages, strict=True):
            own = stage.module.state_dict()  # on another device a stage has its own buffers
            state |= {name: own[name] for name in spec.buffers if name in own and name in state}
        return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}

    # ------------------------------------------------------------------ checkpoints

    def save(self, run: Path, facts: Mapping[str, Any] | None = None) -> None:
        """Checkpoint after the last submitted step, without draining, written in the background.

        Raises:
            TrainingError: the checkpoint before this one could not be written.
        """
        self._join_writer()
        directory = checkpoint.step_directory(run, self.num_steps)
        known = {**(facts or {}), "step": self.num_steps, "plan": self.plan.digest}
        states: dict[int, StageState] = {}
        lock = threading.Lock()  # two stages may deliver at the same moment
        written = self._written = Future()

        def write() -> None:
            try:
                for stage, (tensors, values) in states.items():
                    self._stages[stage].check_finite(tensors)
                    checkpoint.save_stage(directory, stage, tensors, values)
                checkpoint.complete(directory, known, self.plan.num_stages)
                written.set_result(None)
            except BaseException as error:
                written.set_exception(error)

        def deliver(stage: int, state: StageState) -> None:
            with lock:
                states[stage] = state
                if len(states) == self.plan.num_stages:
                    self._writer.submit(write)

        self._engine.snapshot(deliver)

    def wait_saved(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            TrainingError: it could not be written.
        """
        if self._written is not None:
            self.drain()
            self._join_writer()

    def _join_writer(self) -> None:
        written, self._written = self._written, None
        if written is None:
            return
        while not wait([written], timeout=0.2).done:
            self._engine.check()  # a stage that failed delivers no state
        try:
            written.result()
        except OSError as error:
            raise TrainingError(f"the checkpoint could not be written: {error}") from error

    def load(self, directory: Path) -> None:
        """Go on from the checkpoint in `directory`.

        Raises:
            ProgramError: it is damaged or belongs to another plan.
        """
        manifest = checkpoint.read_manifest(directory, self.plan.num_stages)
        if manifest.get("plan") != self.plan.digest:
            raise ProgramError(
                f"{directory} belongs to another plan ({str(manifest.get('plan'))[:12]}, not "
                f"{self.plan.digest[:12]}); resume with the program that wrote it"
            )
        self.drain()
        self._engine.close()
        for stage in self._stages:
            stage.load_state(*checkpoint.load_stage(directory, stage.index))
        self._engine = Engine(
            self._stages, **self._engine_options, first_step=int(manifest["step"])
        )

    def close(self) -> None:
        """Stop the workers. Submitted steps that are not finished are lost; drain() first."""
        self._engine.close()
        self._writer.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _sends(plan: Plan, stage: int) -> tuple[str, ...]:
    if stage == plan.num_stages - 1:
        return ()
    return tuple(crossing.name for crossing in plan.cuts[stage].crossings)
