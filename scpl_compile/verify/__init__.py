"""The emitted stages against the original model, before a program may appear.

The stages are loaded from the emitted stages.py and take the modules of the user's own model, so
eager and stages share every parameter; all that running them changes is put back.

    contents       a stage has the parameters, buffers and stops that the plan gives it
    forward        eager == stages, in eval and in train mode, at two batch sizes
    gradients      of the logits, by parameter name, with all cuts and stops opened
    training step  what is sent is what forward computes, without a gradient, in memory that stays;
                   the losses and their gradients are the plan's; every parameter that trains in the
                   model trains by some local loss
    randomness     which stages draw (their forward moves a generator) or recompute (their backward
                   runs a forward)

compare.py runs and compares, step.py looks at the training step of one stage.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scpl_compile.capture.state import RandomState
from scpl_compile.capture.values import plain_tensors
from scpl_compile.errors import VerifyError, context
from scpl_compile.ir import SINGLE_LABEL, Plan, Scalar
from scpl_compile.runtime.allocator import give_back_freed_memory
from scpl_compile.runtime.program import Verification
from scpl_compile.runtime.schedules import is_joined
from scpl_compile.runtime.stage import StopGradient, as_tuple
from scpl_compile.runtime.trainer import StageClass
from scpl_compile.verify.compare import (
    RTOL,
    compare_gradients,
    copies,
    difference,
    running,
    same_start,
    stops_open,
    taken_gradients,
    undisturbed,
    weighted,
)
from scpl_compile.verify.locate import first_difference
from scpl_compile.verify.step import StepCheck, named_outputs

__all__ = ["verify"]

MakeInputs = Callable[[int], tuple[Tensor, ...]]
"""Example inputs of a batch size."""


@dataclass(slots=True)
class _Findings:
    """What grows while the checks run."""

    random_stages: set[int] = field(default_factory=set)
    recompute_stages: set[int] = field(default_factory=set)
    unreached: dict[int, set[str]] = field(default_factory=dict)
    figures: dict[str, Scalar] = field(default_factory=dict)


def verify(
    plan: Plan,
    model: nn.Module,
    stages: Sequence[StageClass],
    make_inputs: MakeInputs,
    *,
    weights_sha256: str,
    select_output: Callable[[object], Tensor],
    batch_sizes: tuple[int, int] = (3, 2),
) -> Verification:
    """Compare the stages with `model`, which is bit for bit as before when this returns.

    Raises:
        VerifyError: they differ; the message names the first output, parameter or stage.
    """
    with undisturbed(model):
        check = _Check(plan, model, stages, select_output)
        check.contents()
        inputs, others = map(make_inputs, batch_sizes)
        check.forward(inputs, training=False)
        trained = check.forward(inputs, training=True, backward=True)
        for training in (False, True):
            check.forward(others, training=training)
        check.coverage(trained=trained, by_loss=check.training_steps(inputs))
    found = check.found
    return Verification(
        plan=plan.digest,
        weights_sha256=weights_sha256,
        is_verified=True,
        random_stages=tuple(sorted(found.random_stages)),
        recompute_stages=tuple(sorted(found.recompute_stages | _stages_with(plan, "checkpoint"))),
        partial_stages=tuple(sorted(_partial_stages(plan, found))),
        checks=found.figures,
    )


def _partial_stages(plan: Plan, found: _Findings) -> set[int]:
    """Stages with a parameter that no gradient reached here, or may not reach in another step: in
    code that was kept whole, data or draws may decide whether a module takes part.
    """
    without = {stage for stage, names in found.unreached.items() if names}
    return without | _stages_with(plan, "")


def _stages_with(plan: Plan, reason_part: str) -> set[int]:
    """Stages with modules that capture kept whole, for such a reason."""
    paths = [path for path, reason in plan.opaque if reason_part in reason]
    return {
        stage.index
        for stage in plan.stages
        if any(f"{path}.".startswith(f"{node}.") for path in paths for node in stage.nodes)
    }


class _Check:
    """The checks of all stages together; each raises VerifyError."""

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        stages: Sequence[StageClass],
        select_output: Callable[[object], Tensor],
    ) -> None:
        self.plan = plan
        self.model = model
        self.select_output = select_output
        self.found = _Findings()
        # A model in training mode with modules in eval mode: somebody holds them there.
        self.held = [m for m in model.modules() if not m.training] if model.training else []
        self.stages: list[nn.Module] = []
        if len(stages) != plan.num_stages:
            raise VerifyError(f"there are {len(stages)} stages, the plan has {plan.num_stages}")
        for stage, make in zip(plan.stages, stages, strict=True):
            with running(f"making stage {stage.index}"):
                self.stages.append(make(model))

    def _inputs(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip((spec.name for spec in self.plan.inputs), copies(inputs), strict=True))

    def _eager(self, inputs: Sequence[Tensor]) -> Tensor:
        """By name: forward may have other parameters between its inputs."""
        return self.select_output(self.model(**self._inputs(inputs)))

    def _start_training(self) -> None:
        """As the trainer does: by the model's own train(), which may hold modules in eval mode."""
        for stage in self.stages:
            stage.train()
        self.model.train()
        for module in self.held:
            module.training = False

    def _begin(self, *, training: bool) -> None:
        """The mode in which the model is run."""
        if training:
            self._start_training()
        else:
            self.model.eval()

    def _evaluate(self) -> None:
        """As the trainer does, so that an eval() of the model that differs is noticed."""
        for stage in self.stages:
            stage.eval()

    def _chain(self, inputs: Sequence[Tensor], *, noting_randomness: bool = False) -> Tensor:
        """The output after running the stages in order, without cuts."""
        values = self._inputs(inputs)
        for stage, module in zip(self.plan.stages, self.stages, strict=True):
            before = RandomState.now() if noting_randomness else None
            with running(f"stage {stage.index}"):
                outputs = as_tuple(module(*(values[name] for name in stage.inputs)))
            if noting_randomness and before != RandomState.now():
                self.found.random_stages.add(stage.index)
            values |= named_outputs(stage, outputs)
        return values[self.plan.outputs[0]]

    def contents(self) -> None:
        """Every stage has the parameters, buffers and stops that the plan gives it.

        What is a plain attribute of the model is a buffer of the stage that reads it, and in no
        plan.
        """
        plain = {id(tensor) for _, tensor in plain_tensors(self.model)}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        for stage, module in zip(self.plan.stages, self.stages, strict=True):
            names = {loss.name for loss in stage.losses if loss.has_head}
            heads = [child for name, child in module.named_children() if name in names]
            in_heads = {id(t) for head in heads for t in (*head.parameters(), *head.buffers())}
            with context(f"stage {stage.index}"):
                own = {id(t) for t in module.parameters()} - in_heads
                _same_tensors("parameter", own, stage.parameters, parameters)
                own = {id(t) for t in module.buffers()} - in_heads - plain
                _same_tensors("buffer", own, stage.buffers, buffers)
                stops = sum(isinstance(part, StopGradient) for part in module.modules())
                planned = sum("stop_at" in loss.options for loss in stage.losses)
                if stops != planned:
                    raise VerifyError(f"it stops gradients {stops} times, the plan {planned} times")

    def forward(
        self, inputs: tuple[Tensor, ...], *, training: bool, backward: bool = False
    ) -> set[str]:
        """The stages' output and the buffers they write are the model's.

        backward: so are the logits' gradients, with all stops open; gives the names of the
        parameters that get one.
        """
        place = f"in {'train' if training else 'eval'} mode at batch size {inputs[0].shape[0]}"
        leaves = dict(self.model.named_parameters()) if backward else {}
        self._begin(training=training)
        with torch.set_grad_enabled(backward):
            start = same_start(self.model)
            with start, running(f"the model {place}"), taken_gradients(leaves) as expected:
                output = self._eager(inputs)
                buffers = {name: value.clone() for name, value in self.model.named_buffers()}
                if backward:
                    weighted(output).backward()
            truth = output.detach()
            give_back_freed_memory()  # the stages' pass needs as much again, in other blocks
            if not training:
                self._evaluate()
            with same_start(self.model), stops_open(self.stages), taken_gradients(leaves) as actual:
                output = self._chain(inputs, noting_randomness=training)
                self._compare_buffers(buffers, place)
                worst = difference(output, truth)
                if backward and worst <= RTOL:
                    with running("backward through the stages"):
                        weighted(output).backward()
        if worst > RTOL:
            if truth.isnan().any():
                raise VerifyError(
                    f"the model's own output {place} has NaN on random inputs, so nothing can be "
                    "compared; see to its weights, and to what its inputs may be"
                )
            self._begin(training=training)
            raise self._difference(inputs, place, worst)
        figures, key = self.found.figures, f"forward_{'train' if training else 'eval'}"
        figures[key] = max(float(figures.get(key, 0.0)), worst)
        if backward:
            sides = ("the stages", "the model")
            figures["gradients"] = compare_gradients(actual, expected, sides)
            figures["parameters"] = len(expected)
        return set(expected)

    def _compare_buffers(self, expected: Mapping[str, Tensor], place: str) -> None:
        for name, value in self.model.named_buffers():
            if difference(value, expected[name]) > RTOL:
                raise VerifyError(f"buffer {name!r} differs after a forward {place}")

    def _difference(self, inputs: tuple[Tensor, ...], place: str, worst: float) -> VerifyError:
        def run_model() -> Tensor:
            return self._eager(inputs)

        if first := first_difference(self.model, run_model, run_model):
            return VerifyError(
                f"the model {place} does not give the same again from the same random state, so "
                f"nothing can be compared; {first}: turn its randomness off (dropout 0), or let it "
                "draw from the global generators without seeding them (torch.seed)"
            )
        first = first_difference(self.model, run_model, lambda: self._chain(inputs))
        return VerifyError(
            f"the stages' output differs from the model's {place} by {worst:.1e} of its largest "
            f"element (allowed {RTOL:.0e}); "
            + (
                first
                or "every module that the stages call gives the same, so the code between "
                "them differs"
            )
        )

    def training_steps(self, inputs: tuple[Tensor, ...]) -> set[str]:
        """A step of every stage in order, as the engines run it; gives the parameters it trains."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        labels = _labels(self.plan, inputs[0].shape[0])
        received = self._inputs(inputs)
        trained: set[str] = set()
        for stage, module in zip(self.plan.stages, self.stages, strict=True):
            check = StepCheck(self.plan, stage, self.model, module, labels)
            place = f"the training step of stage {stage.index}"
            with context(place), running("it"):
                sent, reached = check.run([received[name] for name in stage.receives])
            if check.draws:
                self.found.random_stages.add(stage.index)
            if check.recomputes:
                self.found.recompute_stages.add(stage.index)
            own = {name: names.get(id(p), "") for name, p in module.named_parameters()}
            trained |= {own.get(name, "") for name in reached}
            self.found.unreached[stage.index] = {
                own[name] or name
                for name, p in module.named_parameters()
                if p.requires_grad and name not in reached
            }
            received = {c.name: v for c, v in zip(check.crossings, sent, strict=True)}
        return trained

    def coverage(self, *, trained: set[str], by_loss: set[str]) -> None:
        """What trains in the model trains by some loss of a stage (bp: behind it, too)."""
        if is_joined(self.plan):
            for unreached in self.found.unreached.values():
                unreached -= trained
            return
        if missing := trained - by_loss - set(self.plan.untrained):
            more = f" (nor do {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise VerifyError(
                f"parameter {min(missing)!r} trains in the model and by no local loss{more}; cut "
                "elsewhere with --split-at"
            )


def _labels(plan: Plan, batch_size: int) -> Tensor:
    """Every sample has a positive, and not all of them are positives of each other."""
    classes = torch.arange(batch_size) // 2 % plan.num_classes
    if plan.task == SINGLE_LABEL:
        return classes
    both = torch.stack([classes, (classes + 1) % plan.num_classes], dim=1)
    return torch.zeros(batch_size, plan.num_classes, dtype=torch.bool).scatter_(1, both, True)


def _same_tensors(
    kind: str, own: set[int], planned: Sequence[str], known: Mapping[str, Tensor]
) -> None:
    names = {id(tensor): name for name, tensor in known.items()}
    if odd := own ^ {id(known[name]) for name in planned}:
        name = min(names.get(key, "") for key in odd)
        where = "the plan" if any(names.get(key) for key in odd - own) else "the emitted stage"
        raise VerifyError(f"only {where} has the {kind} {name!r}")
