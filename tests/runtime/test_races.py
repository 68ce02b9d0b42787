"""No kernel meets another stream's memory without an order: every method, every schedule, no GPU.

The real trainer and engine run on a simulated GPU (races.py), a stream per stage. Each fault that
is planted here leaves out one of the calls that make the order, or breaks a rule of what crosses a
cut; it is caught by the names of both stages, both operations and the tensor.
"""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.cuda._sanitizer import EventHandler

from races import SimulatedGpu, tracked_condition
from scpl_compile.actions import Action
from scpl_compile.runtime import board, checkpoint, engine, lane
from scpl_compile.runtime.batch_engine import BatchEngine
from scpl_compile.runtime.lane import Lane
from scpl_compile.runtime.stage import cut
from scpl_compile.runtime.stage_step import StageStep
from scpl_compile.runtime.trainer import Trainer
from small_nets import DECOUPLED, compiled
from stage_nets import (
    BATCH_SIZE,
    WIDTH,
    BlockStage,
    batches,
    block_plan,
    block_stages,
    make_trainer,
    stage_steps,
)

pytestmark = pytest.mark.timeout(60)

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    """The lanes call it; what races tells the worker's action and the names in the plan."""
    gpu = SimulatedGpu()
    monkeypatch.setattr(lane, "GPU", gpu)
    monkeypatch.setattr(board, "threading", SimpleNamespace(Condition=tracked_condition(gpu)))
    execute = engine._Workers._execute

    def named(workers: Any, stage: StageStep, action: Action) -> None:
        gpu.thread.action = str(action)
        execute(workers, stage, action)
        name_tensors(gpu, stage, action)

    monkeypatch.setattr(engine._Workers, "_execute", named)
    return gpu


def name_tensors(gpu: SimulatedGpu, stage: StageStep, action: Action) -> None:
    """By what they are called in the plan and in the stage."""
    flight = stage._in_flight.get(action.step)
    found: dict[str, Tensor] = {}
    if action.kind == "RECV" and stage.index == 0:
        found = {**flight.values, "labels": flight.labels}
    elif action.kind == "F":
        found = flight.sent
    elif action.kind == "B":
        grads = {name: value.grad for name, value in flight.values.items()}
        found = {f"gradient of {name}": grad for name, grad in grads.items() if grad is not None}
    for name, value in found.items():
        gpu.name(value, f"{name} of step {action.step}")
    if action.kind == "U":
        for name, value in (*stage.module.named_parameters(), *stage.module.named_buffers()):
            gpu.name(value, name)


def submit(gpu: SimulatedGpu, trainer: Trainer, data: Sequence[Any], *, on_gpu: bool) -> None:
    """on_gpu: made by the caller's stream, and dropped at once; else they lie on the host."""
    for inputs, labels in data:
        if on_gpu:
            gpu.thread.action = "the loading of a batch"
            trainer.step(_cloned(inputs), labels.clone())
        else:
            trainer.step(inputs, labels)


def _cloned(inputs: Any) -> Any:
    many = isinstance(inputs, (tuple, list))
    return [value.clone() for value in inputs] if many else inputs.clone()


def told(gpu: SimulatedGpu) -> str:
    """All races, one a line."""
    return "\n".join(dict.fromkeys(map(str, gpu.races)))


# ---------------------------------------------------------------------- no race


def course(gpu: SimulatedGpu, trainer: Trainer, data: Sequence[Any], run: Path) -> None:
    """Training with all that may come in between."""
    with gpu.watching(), trainer:
        submit(gpu, trainer, data[:2], on_gpu=True)
        trainer.save(run, {})  # no stage has finished, or some, or all
        submit(gpu, trainer, data[2:], on_gpu=False)
        trainer.wait_saved()
        trainer.predict(_cloned(data[0][0]))
        submit(gpu, trainer, data[:1], on_gpu=False)
        trainer.evaluate(data[:1])
        if any(step.endswith("X") for step in trainer.plan.inference):
            trainer.evaluate(data[:1], exit_rule="confidence:0.3")
            trainer.save_exits(run)
        trainer.load(checkpoint.latest(run))
        submit(gpu, trainer, data[:1], on_gpu=True)
        trainer.losses()
        submit(gpu, trainer, data[1:2], on_gpu=False)
        trainer.state_dict()
        submit(gpu, trainer, data[:1], on_gpu=False)
        trainer.drain()
    assert all(stage.lane.stream.clock[stage.lane.stream] > 50 for stage in trainer._stages)


METHODS = {**DECOUPLED, "bp": {"method": "bp"}}


@pytest.mark.parametrize(
    ("method", "schedule"),
    [
        *((method, s) for method in DECOUPLED for s in ("stream", "in_step", "sequential")),
        ("bp", "bp"),
    ],
)
def test_nothing_races(gpu: SimulatedGpu, method: str, schedule: str, tmp_path: Path) -> None:
    net = compiled("small_net", 3, **METHODS[method])
    with gpu.watching():
        trainer = net.program.trainer(schedule=schedule)
    course(gpu, trainer, net.batches[:4], tmp_path)
    assert told(gpu) == ""
