"""The trainer: what `build_trainer` gives and a training loop calls."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from scpl_compile.actions import Action, num_active, step_kinds
from scpl_compile.errors import ProgramError
from scpl_compile.ir import Plan
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime.activity import Usage
from scpl_compile.runtime.batch import (
    Inputs,
    check_outside,
    check_trainable,
    labelled,
    named_inputs,
    num_samples,
)
from scpl_compile.runtime.engine import Engine, Event, StageEngine
from scpl_compile.runtime.evaluation import Evaluation, Tally
from scpl_compile.runtime.exits import load_exits, save_exits
from scpl_compile.runtime.growth import checked_starts
from scpl_compile.runtime.inference import EarlyExits, ExitRule, Inference
from scpl_compile.runtime.labels import check_labels
from scpl_compile.runtime.lane import Lane, resolve_devices
from scpl_compile.runtime.learning_rate import learning_rate
from scpl_compile.runtime.optim import make_optimizer, read_options
from scpl_compile.runtime.randomness import StageRandom, seeded, spread_seed
from scpl_compile.runtime.saver import Saver
from scpl_compile.runtime.schedules import DECOUPLED, check_schedule
from scpl_compile.runtime.settings import Setting
from scpl_compile.runtime.stage import evaluating, start_training
from scpl_compile.runtime.stage_step import StageStep
from scpl_compile.runtime.step_options import StepOptions

__all__ = ["Evaluation", "StageClass", "Trainer"]

StageClass = Callable[[nn.Module], nn.Module]
"""An emitted stage class: made from the model whose modules it takes."""

_HEADS, _STAGE = 1, 2  # what a seed is spread for: the heads' first weights, a stage's own stream


class Trainer:
    """Trains the stages of a plan.

    Args:
        plan: what was compiled.
        model: whose modules the stages take; it is trained in place. It is put into training mode
            as a training loop does; if it is in it, modules that are held in eval mode stay so.
        stages: the emitted stage classes.
        devices: at most one per stage ("cpu", "cuda:0", …); default: the plan's placement.
        optimizer, lr, optimizer_options ("momentum=0.9,nesterov=true"): of every stage, by name in
            torch.optim. weight_decay: of matrices, see optim.make_optimizer.
        lr_schedule, total_steps, warmup: see learning_rate.py.
        amp, channels_last, clip_norm, accumulate: see step_options.py.
        schedule: "stream", "in_step", "sequential"; "bp" for backpropagation.
        seed: of the heads' first weights and of every stage's random stream.
        threads_per_stage: intra-op threads; default: the plan's. Equal threads, equal bits.
        random_stages: the stages whose forward draws randomness; None counts all of them.
        recompute_stages: those whose backward draws too (activation checkpointing); None: all.
        starts: the first step of every stage, if not 0: see growth.py.
        wire_dtype: "bfloat16" or "float16": what crosses a cut is rounded to it; labels never.
        record_events: keep all actions with their times in `events`; trace_steps: of so many last.

    A step returns at once: do not write to its tensors afterwards, and draw random numbers of your
    own inside runtime.own_draws(). Losses are read when asked for.

    Raises:
        MethodError: an option that the plan does not allow.
    """

    _on_ranks: ClassVar[bool] = False

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        stages: Sequence[StageClass],
        *,
        devices: Sequence[str] | None = None,
        optimizer: str = "adam",
        lr: float = 1e-3,
        optimizer_options: str | Mapping[str, Setting] | None = None,
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup: int = 0,
        total_steps: int | None = None,
        amp: str = "none",
        channels_last: bool = False,
        clip_norm: float = 0.0,
        accumulate: int = 1,
        schedule: str | None = None,
        seed: int = 0,
        threads_per_stage: int | None = None,
        random_stages: Sequence[int] | None = None,
        recompute_stages: Sequence[int] | None = None,
        starts: Sequence[int] = (),
        wire_dtype: str = "",
        queue_depth: int = 2,
        record_events: bool = False,
        trace_steps: int = 0,
        actions: Sequence[Iterator[Action]] | None = None,
    ) -> None:
        self.plan = plan
        self.model = model
        self.seed = seed
        self.schedule = check_schedule(plan, schedule or plan.schedule, on_ranks=self._on_ranks)
        self.starts = checked_starts(plan, starts)
        self.threads_per_stage = threads_per_stage or plan.threads_per_stage
        self.devices = self._resolve_devices(tuple(devices or plan.placement))
        everyone = range(plan.num_stages)
        draws = set(everyone if random_stages is None else random_stages)
        recomputes = set(everyone if recompute_stages is None else recompute_stages)
        self.learning_rate = learning_rate(lr, lr_schedule, total_steps, warmup=warmup)
        start_training(model)
        lanes = {
            k: Lane(self.devices[k], has_own_stream=not self._on_ranks) for k in self._own_stages()
        }
        modules = self._make_all(stages, lanes)
        how = StepOptions(
            amp=amp, channels_last=channels_last, clip_norm=clip_norm, accumulate=accumulate,
            wire_dtype=wire_dtype,
        )  # fmt: skip
        chosen = read_options(optimizer_options)
        self._stages = tuple(
            StageStep(
                k,
                module,
                inputs=plan.stages[k].receives,
                sends=plan.sent(k),
                lane=lanes[k],
                optimizer=make_optimizer(optimizer, module.parameters(), lr, chosen, weight_decay),
                learning_rate=self.learning_rate,
                random=StageRandom(self._stage_seed(k), lanes[k].device),
                detach=self.schedule in DECOUPLED,
                draws=k in draws,
                recomputes=k in recomputes,
                training_step=self._training_step(module),
                options=how,
            )
            for k, module in modules.items()
        )
        self._queue_depth = queue_depth
        kept = trace_steps * plan.num_stages * len(step_kinds("bp", 1, 3))  # the longest step
        self._max_events = None if record_events else kept
        self._engine = self._start_engine(0, actions)
        self._saver = Saver(self._stages, plan.num_stages, self._is_saved)
        contrasts = [loss.options.get("contrast") for one in plan.stages for loss in one.losses]
        self._has_warned = not any(contrasts)  # without one, labels may be all the same

    def _resolve_devices(self, names: tuple[str, ...]) -> tuple[torch.device, ...]:
        """The device of every stage."""
        return resolve_devices(names, self.plan.num_stages)

    def _own_stages(self) -> Sequence[int]:
        return range(self.plan.num_stages)

    def _start_engine(
        self, first_step: int, actions: Sequence[Iterator[Action]] | None = None
    ) -> StageEngine:
        return Engine(
            self._stages, schedule=self.schedule, threads_per_stage=self.threads_per_stage,
            first_step=first_step, depth=self._queue_depth, starts=self.starts,
            record_events=self._max_events != 0, max_events=self._max_events, actions=actions,
        )  # fmt: skip

    def _stage_seed(self, stage: int) -> int:
        """Of the stage's random stream."""
        return spread_seed(self.seed, _STAGE, stage)

    def _training_step(self, module: nn.Module) -> Callable[..., Any]:
        """What F calls."""
        step: Callable[..., Any] = module.training_step  # type: ignore[assignment]
        return step

    def _is_saved(self) -> bool:
        """Whether, now that the own stages' files are written, this process completes the set."""
        return True

    def _make_all(
        self, stages: Sequence[StageClass], lanes: Mapping[int, Lane]
    ) -> dict[int, nn.Module]:
        """The module of every own stage, on its device."""
        return {k: self._make(k, stages[k]).to(lane.device) for k, lane in lanes.items()}

    def _make(self, stage: int, make: StageClass) -> nn.Module:
        """The stage's module, with heads that depend on the seed alone."""
        with seeded(spread_seed(self.seed, _HEADS, stage)):
            return make(self.model)

    # ------------------------------------------------------------------ training

    @property
    def num_steps(self) -> int:
        """Steps submitted, those of the runs before a resume included."""
        return self._engine.num_steps

    @property
    def num_active(self) -> int:
        """How many stages took part in the last step, and do in inference."""
        return num_active(self.starts, self.num_steps - 1)

    @property
    def events(self) -> tuple[Event, ...]:
        """The executed actions, where `record_events` was asked for."""
        return tuple(self._engine.events)

    def all_events(self) -> tuple[Event, ...]:
        """Those of every process."""
        return self.events

    def step(self, inputs: Inputs, labels: Tensor) -> None:
        """Train every stage on one batch. Returns as soon as stage 0 has room for it.

        inputs: the model's inputs (one tensor, a sequence, or a mapping by name), batch first;
        labels: int64 (B,), in a plan of task multi-label (B, num_classes) zeros and ones; B for
        inputs of n·B samples (n views, view-major).

        Raises:
            DataError: inputs of other names, dtypes, or numbers of dimensions; labels out of
                range, of another dtype or number.
            MethodError: called inside torch.autocast.
            TrainingError: a stage has failed.
        """
        check_outside(self.devices)
        values = named_inputs(self.plan.inputs, inputs)
        count, plan = num_samples(values), self.plan
        labels, notice = check_labels(labels, count, plan.num_classes, plan.task)
        check_trainable({**values, "labels": labels})
        if notice and not self._has_warned:
            self._has_warned = True
            warnings.warn(notice, stacklevel=2)
        self._engine.submit(values, labels)

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

    def take_usage(self) -> list[Usage]:
        """For every stage how it spent its time since the last call."""
        return [stage.activity.take() for stage in self._stages]

    def drain(self) -> None:
        """Wait until every stage has finished every submitted step."""
        self._engine.drain()

    # ------------------------------------------------------------------ inference and state

    def predict(self, inputs: Inputs) -> list[Tensor]:
        """The logits of every exit, by the plan's inference steps, in eval mode.

        Raises:
            DataError: inputs of other names, dtypes, or numbers of dimensions.
        """
        values = named_inputs(self.plan.inputs, inputs)
        with self._inferring() as inference:
            return inference.all_exits(values)

    def predict_early(self, inputs: Inputs, rule: str) -> EarlyExits:
        """The logits of the first exit that `rule` trusts, sample by sample (see `ExitRule`).

        Raises:
            DataError: as `predict`. MethodError: the rule is none, or the method has no exits.
        """
        values = named_inputs(self.plan.inputs, inputs)
        with self._inferring() as inference:
            return inference.early(values, ExitRule.of(self.plan, rule))

    @contextmanager
    def _inferring(self) -> Iterator[Inference]:
        self.drain()
        try:
            with torch.no_grad(), evaluating([stage.module for stage in self._stages]):
                yield Inference(self.plan, self._stages, self.num_active)
        finally:
            for stage in self._stages:
                stage.lane.follow()  # the next update comes after what was launched here

    def evaluate(self, batches: Iterable[Any], *, exit_rule: str | None = None) -> Evaluation:
        """Accuracy and cross entropy over `batches`, each with .inputs and .labels, or a pair.

        exit_rule: each sample leaves by the first exit that it trusts (see `ExitRule`); then there
        is one accuracy, and the shares of the exits and the compute are told.

        Raises:
            DataError: there is no sample; inputs or labels that do not fit, as in `step`.
            MethodError: the rule is none, or the method has no exits.
        """
        rule = None if exit_rule is None else ExitRule.of(self.plan, exit_rule)
        tally = Tally()
        for batch in batches:
            values, labels = labelled(self.plan, batch)
            with self._inferring() as inference:
                inference.add_to(tally, values, labels, rule)
        return tally.result()

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

    def save_exits(self, run: Path) -> None:
        """Drain, and write the local classifiers that are exits into `run` (see exits.py)."""
        self.drain()
        save_exits(run, self.plan, self._stages, self.num_steps)

    def load_exits(self, run: Path, steps: int | None = None) -> Path | None:
        """Go on with what `save_exits` wrote (after `steps`); the first missing file, if one is."""
        self.drain()
        return load_exits(run, self.plan, self._stages, steps)

    def save(
        self,
        run: Path,
        facts: Mapping[str, Any] | None = None,
        *,
        before_complete: Callable[[], None] | None = None,
    ) -> None:
        """Checkpoint after the last submitted step, without draining, written in the background.

        facts: for the manifest. before_complete: called in the background when every stage has
        finished that step, and before the checkpoint counts as complete.

        Raises:
            TrainingError: the checkpoint before this one could not be written.
        """
        known = {**(facts or {}), "step": self.num_steps, "plan": self.plan.digest}
        self._saver.save(self._engine, run, known, before_complete)

    def wait_saved(self) -> None:
        """Wait until the last checkpoint is complete. Raises TrainingError where it failed."""
        if self._saver.is_pending:
            self.drain()
            self._saver.join(self._engine)

    def load(self, directory: Path) -> None:
        """Go on from the checkpoint in `directory`.

        Raises:
            ProgramError: it is damaged or belongs to another plan.
        """
        own = [stage.index for stage in self._stages]
        manifest = checkpoint.read_manifest(directory, self.plan.num_stages, own)
        if manifest.get("plan") != self.plan.digest:
            raise ProgramError(
                f"{directory} belongs to another plan ({str(manifest.get('plan'))[:12]}, not "
                f"{self.plan.digest[:12]}); resume with the program that wrote it"
            )
        states = [checkpoint.load_stage(directory, k) for k in own]
        self.drain()
        self._engine.close()
        for stage, state in zip(self._stages, states, strict=True):
            stage.load_state(*state)
        self._engine = self._start_engine(int(manifest["step"]))

    def close(self) -> None:
        """Stop the workers. Submitted steps that are not finished are lost; drain() first.

        Warns where the last checkpoint could not be written and wait_saved() was not called.
        """
        self._engine.close()
        self._saver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
