"""The emitted stages against the original model, before a program may appear.

The stages are loaded from the emitted stages.py and take the modules of the user's own model, so
eager and stages share every parameter; buffers, modes, gradients and random states are put back.

    forward       eager == stages, in eval and in train mode, at two batch sizes
    gradients     of the logits, by parameter name, with all cuts and stops opened
    local losses  what is sent is what forward computes, and carries no gradient; every parameter
                  that trains in the model trains by some local loss
    randomness    which stages draw: their forward moves a generator
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from scpl_compile.errors import VerifyError
from scpl_compile.ir import Plan, Scalar
from scpl_compile.runtime.program import Verification
from scpl_compile.runtime.randomness import seeded
from scpl_compile.runtime.stage import StopGradient, as_tuple
from scpl_compile.runtime.trainer import StageClass

__all__ = ["verify"]

_SEED = 20260222
_RTOL = 1e-4
"""Relative to the largest element: the same kernels run in the same order, but a contiguous copy at
a cut may take another code path."""

Values = Mapping[str, Tensor]
MakeInputs = Callable[[int], tuple[Tensor, ...]]
"""Example inputs of a batch size."""


@dataclass(slots=True)
class _Findings:
    """What grows while the checks run."""

    random_stages: set[int] = field(default_factory=set)
    figures: dict[str, Scalar] = field(default_factory=dict)


def verify(
    plan: Plan,
    model: nn.Module,
    stages: Sequence[StageClass],
    make_inputs: MakeInputs,
    *,
    weights_sha256: str,
    select_output: Callable[[object], Tensor],
    batch_sizes: tuple[int, int] = (4, 3),
) -> Verification:
    """Compare the stages with `model`; both are as before when this returns.

    Raises:
        VerifyError: they differ; the message names the first output, parameter or stage.
    """
    found = _Findings()
    with _undisturbed(model):
        built = [make(model) for make in stages]
        _check_names(plan, built)
        for batch_size in batch_sizes:
            inputs = make_inputs(batch_size)
            for training in (False, True):
                _check_forward(plan, model, built, inputs, select_output, training, found)
        inputs = make_inputs(batch_sizes[0])
        trained = _check_gradients(plan, model, built, inputs, select_output, found)
        _check_training_step(plan, model, built, inputs, trained)
    return Verification(
        plan=plan.digest,
        weights_sha256=weights_sha256,
        is_verified=True,
        random_stages=tuple(sorted(found.random_stages)),
        recompute_stages=_recompute_stages(plan),
        checks=found.figures,
    )


def _recompute_stages(plan: Plan) -> tuple[int, ...]:
    """Stages with activation checkpointing: their backward runs a forward again, and may draw."""
    paths = [path for path, reason in plan.opaque if "checkpoint" in reason]
    return tuple(
        stage.index
        for stage in plan.stages
        if any(_overlap(path, node) for path in paths for node in stage.nodes)
    )


def _overlap(path: str, node: str) -> bool:
    return path == node or path.startswith(f"{node}.") or node in ("", "model")


# ---------------------------------------------------------------------- state


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Buffers, modes, gradients and random states are the same after the block as before it."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with seeded(_SEED):
            for parameter, _ in gradients:
                parameter.grad = None
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def _same_start(model: nn.Module) -> Iterator[None]:
    """Runs the block from a fixed random state; buffers it writes are put back."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    torch.manual_seed(_SEED)
    np.random.seed(_SEED % 2**32)
    random.seed(_SEED)
    yield
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)


def _random_state() -> tuple[bytes, object, object]:
    return (
        torch.get_rng_state().numpy().tobytes(),
        np.random.get_state()[1].tobytes(),  # type: ignore[union-attr]
        random.getstate(),
    )


# ---------------------------------------------------------------------- checks


def _check_names(plan: Plan, built: Sequence[nn.Module]) -> None:
    for stage, module in zip(plan.stages, built, strict=True):
        own = {loss.name for loss in stage.losses if loss.kind == "local"}
        names = {
            name.removeprefix("model.") if stage.nodes == ("model",) else name
            for name, _ in module.named_parameters(remove_duplicate=False)
            if name.split(".")[0] not in own
        }
        if odd := sorted(names ^ set(stage.parameters)):
            raise VerifyError(
                f"stage {stage.index}: emitted stage and plan differ in parameter {odd[0]!r}"
            )


def _chain(
    plan: Plan,
    built: Sequence[nn.Module],
    inputs: Sequence[Tensor],
    found: _Findings | None = None,
) -> dict[str, Tensor]:
    """All values by name after running the stages in order, without cuts."""
    values = dict(zip((spec.name for spec in plan.inputs), inputs, strict=True))
    for stage, module in zip(plan.stages, built, strict=True):
        before = _random_state() if found is not None else None
        outputs = as_tuple(module(*(values[name] for name in stage.inputs)))
        if found is not None and before != _random_state():
            found.random_stages.add(stage.index)
        if len(outputs) != len(stage.outputs):
            raise VerifyError(
                f"stage {stage.index} gives {len(outputs)} values, the plan says {stage.outputs}"
            )
        values.update(zip(stage.outputs, outputs, strict=True))
    return values


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest element; infinity for other shapes or NaN."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    wide, truth = actual.detach().double(), expected.detach().double()
    worst = float((wide - truth).abs().max() / truth.abs().max().clamp_min(1e-12))
    return worst if worst == worst else float("inf")


def _check_forward(
    plan: Plan,
    model: nn.Module,
    built: Sequence[nn.Module],
    inputs: tuple[Tensor, ...],
    select_output: Callable[[object], Tensor],
    training: bool,
    found: _Findings,
) -> None:
    model.train(training)
    mode = "train" if training else "eval"
    with torch.no_grad():
        with _same_start(model):
            expected = select_output(model(*_copies(inputs)))
            buffers = {name: value.clone() for name, value in model.named_buffers()}
        with _same_start(model):
            values = _chain(plan, built, _copies(inputs), found if training else None)
            for name, value in model.named_buffers():
                if _difference(value, buffers[name]) > _RTOL:
                    raise VerifyError(f"buffer {name!r} differs after a forward in {mode} mode")
    worst = _difference(values[plan.outputs[0]], expected)
    if worst > _RTOL:
        raise VerifyError(
            f"the stages' output differs from the model's in {mode} mode at batch size "
            f"{inputs[0].shape[0]} by {worst:.1e} of its largest element (allowed {_RTOL:.0e})"
        )
    key = f"forward_{mode}"
    found.figures[key] = max(float(found.figures.get(key, 0.0)), worst)


def _copies(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A model may write its inputs in place."""
    return tuple(value.clone() for value in inputs)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name, taken away from the model."""
    taken = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            taken[name] = parameter.grad
            parameter.grad = None
    return taken


def _check_gradients(
    plan: Plan,
    model: nn.Module,
    built: Sequence[nn.Module],
    inputs: tuple[Tensor, ...],
    select_output: Callable[[object], Tensor],
    found: _Findings,
) -> set[str]:
    """Gradients with all cuts open; gives the parameters that train in the original model."""
    model.train()
    with _same_start(model):
        logits = select_output(model(*_copies(inputs)))
        seed = torch.randn(logits.shape, generator=torch.Generator().manual_seed(_SEED))
        logits.backward(seed.to(logits))
        expected = _gradients(model)
    stops = [
        module for stage in built for module in stage.modules() if isinstance(module, StopGradient)
    ]
    for stop in stops:
        stop.is_open = True
    with _same_start(model):
        _chain(plan, built, _copies(inputs))[plan.outputs[0]].backward(seed.to(logits))
        actual = _gradients(model)
    for stop in stops:
        stop.is_open = False
    if odd := sorted(actual.keys() ^ expected.keys()):
        where = "the model" if odd[0] in expected else "the stages"
        raise VerifyError(f"parameter {odd[0]!r} gets a gradient only in {where}")
    largest = max((float(g.abs().max()) for g in expected.values()), default=0.0)
    worst = 0.0
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-5 * largest, 1e-30)
        difference = float((actual[name] - gradient).abs().max()) / scale
        worst = max(worst, difference)
        if not difference <= 10 * _RTOL:
            raise VerifyError(f"the gradient of {name!r} differs by {difference:.1e} of its size")
    found.figures["gradients"] = worst
    found.figures["parameters"] = len(expected)
    return set(expected)


def _check_training_step(
    plan: Plan,
    model: nn.Module,
    built: Sequence[nn.Module],
    inputs: tuple[Tensor, ...],
    trained: set[str],
) -> None:
    """One training step of every stage in order, as the engines run it."""
    with _same_start(model), torch.no_grad():
        expected = _chain(plan, built, _copies(inputs))
    batch_size = inputs[0].shape[0]
    labels = torch.arange(batch_size) // 2 % plan.num_classes
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_loss: set[str] = set()
    with _same_start(model):
        values = dict(zip((spec.name for spec in plan.inputs), _copies(inputs), strict=True))
        for stage, module in zip(plan.stages, built, strict=True):
            arguments = [values[name] for name in stage.inputs]
            sent, losses = module.training_step(*arguments, labels=labels)  # type: ignore[operator]
            _check_sent(plan, stage.index, sent, expected)
            reached = _reached(module, losses, names)
            _check_stops(plan, stage.index, module, losses, names)
            by_loss |= reached
            if stage.index < plan.num_stages - 1:
                crossings = plan.cuts[stage.index].crossings
                values = {c.name: v for c, v in zip(crossings, sent, strict=True)}
    if plan.method == "bp":
        return
    missing = sorted(trained - by_loss - set(plan.untrained))
    if missing:
        raise VerifyError(
            f"parameter {missing[0]!r} trains in the model and by no local loss"
            + (f" (nor do {len(missing) - 1} more)" if len(missing) > 1 else "")
            + "; cut elsewhere with --split-at"
        )


def _check_sent(plan: Plan, k: int, sent: tuple[Tensor, ...], expected: Values) -> None:
    if k == plan.num_stages - 1:
        return
    cut = plan.cuts[k]
    if len(sent) != len(cut.crossings):
        raise VerifyError(
            f"stage {k} sends {len(sent)} tensors, the plan says {len(cut.crossings)}"
        )
    for crossing, value in zip(cut.crossings, sent, strict=True):
        if cut.detach and value.requires_grad:
            raise VerifyError(f"the gradient of {crossing.name!r} crosses the cut after stage {k}")
        if not cut.detach and crossing.meta.requires_grad and not value.requires_grad:
            raise VerifyError(f"the gradient of {crossing.name!r} stops at the cut after stage {k}")
        if cut.detach and not value.is_contiguous():
            raise VerifyError(f"{crossing.name!r} crosses the cut after stage {k} non-contiguous")
        if _difference(value, expected[crossing.name]) > _RTOL:
            raise VerifyError(
                f"stage {k} sends another {crossing.name!r} than its forward computes"
            )


def _reached(module: nn.Module, losses: Values, names: Mapping[int, str]) -> set[str]:
    """The model's parameters that get a gradient from `losses`."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    roots = [loss for loss in losses.values() if loss.requires_grad]
    if not roots or not parameters:
        return set()
    gradients = torch.autograd.grad(
        torch.stack(roots).sum(), parameters, allow_unused=True, retain_graph=True
    )
    pairs = zip(parameters, gradients, strict=True)
    return {names[id(p)] for p, g in pairs if g is not None and id(p) in names}


def _check_stops(
    plan: Plan, k: int, module: nn.Module, losses: Values, names: Mapping[int, str]
) -> None:
    """A classifier on a detached feature trains nothing before that feature."""
    for loss in plan.stages[k].losses:
        if "stop_at" not in loss.options:
            continue
        behind = _reached(module, {loss.name: losses[loss.name]}, names)
        before = _reached(
            module, {n: value for n, value in losses.items() if n != loss.name}, names
        )
        if both := sorted(behind & before):
            raise VerifyError(
                f"stage {k}: the classifier's loss reaches {both[0]!r} before the feature "
                f"{loss.options['stop_at']!r}"
            )
