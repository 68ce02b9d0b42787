"""One training run, from a model with random weights to its rows."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.accuracy import models
from benchmarks.accuracy.cases import AGREEMENTS, CONFIDENCES, TASKS, Case, Task
from benchmarks.accuracy.exit_curve import exit_curve
from benchmarks.measure import peak_memory
from scpl_compile import Program, Trainer, compile_model
from scpl_compile.runtime.allocator import keep_freed_memory
from scpl_compile.runtime.batch import named_inputs
from scpl_compile.runtime.data import Batch, Loader
from scpl_compile.runtime.open_loader import open_loader
from scpl_compile.runtime.stage import as_tuple
from scpl_compile.runtime.stage_step import StageStep

__all__ = ["compile_case", "cost_rows", "train_rows"]

_WITH_CURVE = 4
"""Exits of the programs that report.md tells of; agreement:3 cannot be asked of fewer."""


def compile_case(case: Case) -> Program:
    """The model with this seed's weights, cut where this method's stages are balanced best."""
    task, chosen = TASKS[case.task], case.chosen
    torch.manual_seed(case.seed)
    return compile_model(
        build(case, task),
        task.inputs,
        num_classes=task.num_classes,
        num_stages=case.num_stages,
        method=chosen.method,
        preset=chosen.preset,
        options=dict(chosen.options),
        batch_size=chosen.batch_size or task.batch_size,
        threads_per_stage=1,
        verify=False,
    )


def build(case: Case, task: Task) -> nn.Module:
    make = getattr(models, task.model)
    width = task.full_width if case.is_full_width else task.width
    model: nn.Module = make(width=width, num_classes=task.num_classes)
    return model


def train_rows(case: Case) -> list[dict[str, object]]:
    """Accuracy on the validation split after every epoch, and on the test split at the end.

    One stage after another in one process: the schedules of one method give the same weights, to
    the last bit (tests/test_exactness.py), so accuracy needs no parallel run.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    program = compile_case(case)
    loader = _loader(case, program)
    total = max(1, round(case.epochs * loader.num_batches))
    start = time.process_time()
    with _trainer(case, program, total) as trainer:
        curve, step, epoch = [], 0, 0
        while step < total:
            for batch in loader.epoch(epoch):
                trainer.step(batch.inputs, batch.labels)
                step += 1
                if step == total:
                    break
            epoch += 1
            curve.append(trainer.evaluate(loader.evaluation("validation")).accuracy)
        seconds = time.process_time() - start
        accuracies = trainer.evaluate(loader.evaluation("test")).accuracies
        exits = _exit_curve(trainer, loader) if len(accuracies) == _WITH_CURVE else []
    metrics = [(f"validation accuracy, epoch {i}", value) for i, value in enumerate(curve, 1)]
    metrics += [("validation accuracy", curve[-1]), ("test accuracy", accuracies[-1])]
    found = [_row(case, name, "%", 100 * value) for name, value in [*metrics, *exits]]
    return [*found, _row(case, "processor time", "s", seconds)]


def _exit_curve(trainer: Trainer, loader: Loader) -> list[tuple[str, float]]:
    """Accuracy and compute (shares) where a sample leaves by the first exit that a rule trusts."""
    found = []
    for split in ("validation", "test"):
        curve = exit_curve(trainer, loader.evaluation(split), (*CONFIDENCES, *AGREEMENTS))
        for rule, (accuracy, compute) in curve.items():
            found.append((f"{split} accuracy, {rule}", accuracy))
            if compute is not None:  # of the LSTM: it has an operator that is not counted
                found.append((f"{split} compute, {rule}", compute))
    return found


def cost_rows(case: Case) -> list[dict[str, object]]:
    """What the heads add to one training step, the memory held between steps, and what a step
    takes on top of it.
    """
    torch.set_num_threads(1)
    program = compile_case(case)
    loader = _loader(case, program)
    batch = loader.batch(0, 0)
    with _trainer(case, program, 1000) as trainer:

        def step() -> None:
            trainer.step(batch.inputs, batch.labels)
            trainer.drain()

        step()
        step()
        peak, _ = peak_memory(step)
        whole = sum(p.numel() for p in trainer.model.parameters())
        all_stages = {id(p): p.numel() for s in trainer._stages for p in s.module.parameters()}
        held = sum(tensor.nbytes for stage in trainer._stages for tensor in _tensors(stage))
    flops = _flops(case, program, batch)
    return [
        _row(case, "parameters of heads", "", sum(all_stages.values()) - whole),
        _row(case, "parameters of the model", "", whole),
        _row(case, "FLOPs of a training step", "MFLOP", flops / 1e6),
        _row(case, "memory held", "MiB", held / 2**20),
        _row(case, "peak memory", "MiB", peak),
    ]


def _tensors(stage: StageStep) -> Iterator[Tensor]:
    """What a stage keeps from step to step."""
    for parameter in stage.module.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from stage.module.buffers()
    if stage.optimizer is not None:
        for state in stage.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _flops(case: Case, program: Program, batch: Batch) -> float:
    """Of matrix products and convolutions, forward and backward, counted in this thread."""
    values = named_inputs(program.plan.inputs, batch.inputs)
    found: list[Tensor] = []
    # oneDNN's LSTM is one operator that the counter does not know.
    with (
        _trainer(case, program, 1000) as trainer,
        FlopCounterMode(display=False) as counter,
        torch.backends.mkldnn.flags(enabled=False),
    ):
        for stage in trainer._stages:
            given = [values[name] for name in stage.inputs]
            sent, losses = stage._training_step(*given, labels=batch.labels)
            found += losses.values()
            values = dict(zip(stage.sends, as_tuple(sent), strict=True))
            if stage.detach:
                values = {name: value.detach() for name, value in values.items()}
        torch.autograd.backward([loss for loss in found if loss.requires_grad])
    return float(counter.get_total_flops())


def _loader(case: Case, program: Program) -> Loader:
    task, chosen = TASKS[case.task], case.chosen
    return open_loader(
        program.plan,
        task.data,
        batch_size=chosen.batch_size or task.batch_size,
        augment=chosen.augment,
        seed=case.seed,
    )


def _trainer(case: Case, program: Program, steps: int) -> Trainer:
    return program.trainer(
        seed=case.seed,
        schedule=program.plan.schedule if program.plan.method == "bp" else "sequential",
        lr_schedule="cosine",
        total_steps=steps,
        **TASKS[case.task].trainer,
    )


def _row(case: Case, metric: str, unit: str, value: float) -> dict[str, object]:
    task, chosen = TASKS[case.task], case.chosen
    config = {
        "method": chosen.method, "preset": chosen.preset, **chosen.options,
        "batch": chosen.batch_size or task.batch_size, "augment": chosen.augment,
        "epochs": round(case.epochs, 3), **task.trainer,
    }  # fmt: skip
    return {
        "benchmark": "accuracy", "case": case.name, "candidate": case.candidate, "metric": metric,
        "unit": unit, "value": float(value), "n": 1, "threads": 1, "device": "cpu",
        "config": config,
    }  # fmt: skip
