"""No kernel meets another stream's memory without an order: every method, every schedule, no GPU.

The real trainer and engine run on a simulated GPU (races.py), a stream per stage. Each fault that
is planted here leaves out one of the calls that make the order, or breaks a rule of what crosses a
cut; it is caught by the names of both stages, both operations and the tensor.
"""

import re
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
    build_net,
    make_trainer,
    stage_steps,
)

pytestmark = pytest.mark.timeout(120)

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
    load = checkpoint.load_stage

    def loaded(*args: Any) -> Any:
        tensors, values = load(*args)
        return {name: gpu.put_on_host(value) for name, value in tensors.items()}, values

    monkeypatch.setattr(checkpoint, "load_stage", loaded)
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


def submit(
    gpu: SimulatedGpu,
    trainer: Trainer,
    data: Sequence[Any],
    *,
    on_gpu: bool,
    labels_on_gpu: bool = False,
) -> None:
    """on_gpu: the inputs are made by the caller's stream, and dropped; else they lie on the host.

    labels_on_gpu: then the caller reads the largest of them, and so waits for its stream.
    """
    for inputs, labels in data:
        gpu.thread.action = "the loading of a batch"
        make = Tensor.clone if on_gpu else gpu.put_on_host
        many = isinstance(inputs, (tuple, list))
        values = [make(value) for value in inputs] if many else make(inputs)
        trainer.step(values, labels.clone() if labels_on_gpu else gpu.put_on_host(labels))


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
        trainer.predict(data[0][0])
        submit(gpu, trainer, data[:1], on_gpu=False)
        trainer.evaluate(data[:1])
        if any(step.endswith("X") for step in trainer.plan.inference):
            trainer.evaluate(data[:1], exit_rule="confidence:0.3")
            trainer.save_exits(run)
        trainer.load(checkpoint.latest(run))
        submit(gpu, trainer, data[:1], on_gpu=True, labels_on_gpu=True)
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
    course(gpu, trainer, net.batches[:3], tmp_path)
    assert told(gpu) == ""


@pytest.mark.parametrize("name", ["cnn", "lstm", "transformer", "unet"])
def test_other_models_do_not_race_either(gpu: SimulatedGpu, name: str, tmp_path: Path) -> None:
    """A mask and integers cross; skips over a cut."""
    net = compiled(name, 3)
    with gpu.watching(), net.program.trainer(schedule="stream", clip_norm=1.0) as trainer:
        submit(gpu, trainer, net.batches[:2], on_gpu=True)
        trainer.drain()
    assert told(gpu) == ""


# ---------------------------------------------------------------------- planted faults


Plant = Callable[[pytest.MonkeyPatch], None]


def no_wait(patch: pytest.MonkeyPatch) -> None:
    """The receiver's stream does not wait for the mark."""
    receive = Lane.receive
    patch.setattr(Lane, "receive", lambda self, values, mark: receive(self, values, None))


def no_record_stream(patch: pytest.MonkeyPatch) -> None:
    """The allocator is not told who else reads."""
    patch.setattr(Lane, "keep", lambda self, values: None)


def early_mark(patch: pytest.MonkeyPatch) -> None:
    """The mark is taken before F's work."""
    forward, outgoing = StageStep.forward, StageStep.outgoing
    marks: dict[tuple[int, int], Any] = {}

    def marked(self: StageStep, step: int) -> None:
        marks[self.index, step] = self.lane.mark()
        forward(self, step)

    def sent(self: StageStep, step: int) -> Any:
        values, labels, _ = outgoing(self, step)
        return values, labels, marks[self.index, step]

    patch.setattr(StageStep, "forward", marked)
    patch.setattr(StageStep, "outgoing", sent)


def no_callers_mark(patch: pytest.MonkeyPatch) -> None:
    """Stage 0 does not wait for what made the batch."""
    patch.setattr(engine, "caller_mark", lambda values: None)


def no_mark_of_gradients(patch: pytest.MonkeyPatch) -> None:
    """In backpropagation the gradients come without a mark."""
    real = StageStep.input_gradients
    patch.setattr(StageStep, "input_gradients", lambda self, step: (real(self, step)[0], None))


def not_adopted(patch: pytest.MonkeyPatch) -> None:
    """The allocator is not told that the caller's modules are a stage's now."""
    patch.setattr(StageStep, "adopt", lambda self: self.lane.follow())


class Reuses(BlockStage):
    """Sends the same memory with every batch."""

    def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
        (sent,), losses = super().training_step(x, labels=labels)
        if not hasattr(self, "memory"):
            self.memory = torch.empty_like(sent)
        self.memory.data.copy_(sent)  # .data: autograd does not see it
        return (self.memory,), losses


class SendsItsWeights(BlockStage):
    """A parameter crosses, and is not cloned."""

    def __init__(self, model: Any, index: int) -> None:
        super().__init__(model, index)
        self.scale = torch.nn.Parameter(torch.ones(BATCH_SIZE, WIDTH))

    def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
        _, losses = super().training_step(x * self.scale, labels=labels)
        return (cut(self.scale),), losses


class WritesWhatItReads(BlockStage):
    """Changes in place what it has received, while the sender's backward reads it."""

    def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
        x.data.mul_(2)
        return super().training_step(x, labels=labels)


class Replaces(BlockStage):
    """Puts a new buffer in the place of the one that the caller made."""

    def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
        self.blocks[self.index].mean = self.blocks[self.index].mean * 0.9
        return super().training_step(x, labels=labels)


class Connected(BlockStage):
    """For backpropagation: no loss but the last one's, the gradient passes."""

    def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
        y = self(x)
        return ((), {"loss": F.cross_entropy(y, labels)}) if self.is_last else ((y,), {})


CONNECTED = {"plan": block_plan(2, schedule="bp"), "stages": block_stages(2, stage0=Connected,
             stage1=Connected)}  # fmt: skip
SENT_TOO_EARLY = (
    "'h1 of step 0'",
    "stage 0 writes it in 0F0 aten",
    "stage 1 reads it in 1F0 aten",
)
FAULTS: dict[str, tuple[Plant | None, dict[str, Any], tuple[str, str, str]]] = {
    "no wait": (no_wait, {}, SENT_TOO_EARLY),
    "early mark": (early_mark, {}, SENT_TOO_EARLY),
    "no record_stream": (
        no_record_stream,
        {},
        (
            "'h1 of step 0'",
            "stage 1 reads it in 1[FB]0 aten",
            r"stage 0 may reuse it .* freed in \d\w",
        ),
    ),
    "no caller's mark": (
        no_callers_mark,
        {},
        (
            "'x of step 0'",
            "the caller writes it in the loading of a batch aten.clone",
            "stage 0 reads it in 0F0 aten",
        ),
    ),
    "gradients without a mark": (
        no_mark_of_gradients,
        CONNECTED,
        (
            "'gradient of h1 of step 0'",
            "stage 1 writes it in 1B0 aten",
            "stage 0 reads it in 0B0 aten",
        ),
    ),
    "a buffer used again": (
        None,
        {"stages": block_stages(2, stage0=Reuses)},
        (
            r"'h1 of step \d'",
            r"stage 1 reads it in 1[FB]\d aten",
            r"stage 0 writes it in 0F\d aten.copy_",
        ),
    ),
    "a parameter that crosses": (
        None,
        {"stages": block_stages(2, stage0=SendsItsWeights)},
        (
            r"'(scale|h1 of step \d)'",
            r"stage 1 reads it in 1F\d aten",
            r"stage 0 writes it in 0U\d aten",
        ),
    ),
    "written where it is received": (
        None,
        {"stages": block_stages(2, stage1=WritesWhatItReads)},
        (
            r"'h1 of step \d'",
            r"stage 0 reads it in 0B\d aten",
            r"stage 1 writes it in 1F\d aten.mul_",
        ),
    ),
    "a buffer that is replaced": (
        not_adopted,
        {"stages": block_stages(2, stage0=Replaces)},
        (
            r"float32 \(8,\)",
            "stage 0 reads it in 0F0 aten.mul",
            "the caller may reuse it .* freed in 0F0",
        ),
    ),
}
"""What is left out, or what stages do; then the tensor, one access and the other."""


def is_told(gpu: SimulatedGpu, parts: Sequence[str]) -> bool:
    """Whether one race names the tensor and both accesses, in whatever order they came."""
    return any(all(re.search(part, str(race)) for part in parts) for race in gpu.races)


@pytest.mark.parametrize("schedule", ["stream", "in_step", "sequential"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(
    gpu: SimulatedGpu, fault: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, given, parts = FAULTS[fault]
    if "plan" in given:
        schedule = "bp"
    if plant is not None:
        plant(monkeypatch)
    with gpu.watching(), make_trainer(2, schedule=schedule, **given) as trainer:
        submit(gpu, trainer, batches(3), on_gpu=True)
        trainer.drain()
    assert is_told(gpu, parts), told(gpu)


@pytest.mark.parametrize("given", [{}, CONNECTED, {"stages": block_stages(2, stage0=Replaces)}])
def test_without_a_fault_the_same_trainers_do_not_race(
    gpu: SimulatedGpu, given: dict[str, Any]
) -> None:
    with gpu.watching(), make_trainer(2, **given) as trainer:
        submit(gpu, trainer, batches(3), on_gpu=True)
        trainer.drain()
    assert told(gpu) == ""


@pytest.mark.parametrize("follows", [True, False])
def test_an_update_that_does_not_follow_the_inference_is_caught(
    gpu: SimulatedGpu, follows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = batches(2)
    with gpu.watching(), make_trainer(2) as trainer:
        submit(gpu, trainer, data[:1], on_gpu=False)
        if not follows:
            monkeypatch.setattr(Lane, "follow", lambda self: None)
        trainer.drain()
        gpu.thread.action = "predict"
        trainer.predict(data[0][0])
        submit(gpu, trainer, data[1:], on_gpu=False)
        trainer.drain()
    parts = (r"'blocks\.0\.", "the caller reads it in predict aten", "stage 0 writes it in 0[FU]1")
    assert is_told(gpu, parts) == (not follows), told(gpu)
    assert bool(gpu.races) == (not follows)


@pytest.mark.parametrize("is_in_scope", [True, False])
def test_a_state_that_is_read_outside_of_the_stages_stream_is_caught(
    gpu: SimulatedGpu, is_in_scope: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gpu.watching(), make_trainer(2) as trainer:
        submit(gpu, trainer, batches(1), on_gpu=False)
        trainer._engine._board.drain(1)  # the host is done; the streams need not be
        if not is_in_scope:
            monkeypatch.setattr(Lane, "scope", lambda self: nullcontext())
        gpu.thread.action = "snapshot"
        trainer._engine.snapshot(lambda stage, state: None)
        trainer.drain()
    parts = (r"'blocks\.0\.", "stage 0 writes it in 0U0 aten", "the caller reads it in snapshot")
    assert is_told(gpu, parts) == (not is_in_scope), told(gpu)
    assert bool(gpu.races) == (not is_in_scope)


# ---------------------------------------------------------------------- ranks


def test_on_a_rank_all_is_launched_on_the_callers_stream(gpu: SimulatedGpu) -> None:
    """Inference, the schedules that torch executes, and the caller's batches are on it."""

    class OnRanks(Trainer):
        _on_ranks = True

    with OnRanks(block_plan(2), build_net(2), block_stages(2)) as trainer:
        assert [stage.lane.stream for stage in trainer._stages] == [gpu.caller, gpu.caller]


@pytest.mark.parametrize("has_own_stream", [False, True])
def test_a_rank_with_a_stream_of_its_own_would_race(
    gpu: SimulatedGpu, has_own_stream: bool
) -> None:
    with gpu.watching():
        (stage,) = stage_steps(1, lane=Lane(CPU, has_own_stream=has_own_stream))

        def run(values: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
            _, losses = stage.module.training_step(values["x"], labels=labels)
            stage.backward_of(losses)
            return losses

        ranks: Any = SimpleNamespace(rank=0, barrier=lambda: None)
        engine_of_rank = BatchEngine([stage], ranks, run, 0)
        for x, labels in batches(2):
            engine_of_rank.submit({"x": x}, labels)
            engine_of_rank.snapshot(lambda stage, state: None)
        stage.take_losses()
    assert bool(gpu.races) == has_own_stream, told(gpu)


# ---------------------------------------------------------------------- the checker itself

CALLS = st.one_of(
    st.tuples(
        st.just("launch"), st.integers(0, 2), st.sets(st.integers(0, 2)), st.sets(st.integers(0, 2))
    ),
    st.tuples(st.sampled_from(["record", "wait"]), st.integers(0, 2), st.integers(0, 1)),
    st.tuples(st.just("synchronize"), st.integers(0, 2)),
    st.tuples(st.just("event"), st.integers(0, 1)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(CALLS, max_size=25))
def test_it_agrees_with_torchs_sanitizer_up_to_the_first_race(calls: list[Any]) -> None:
    gpu, handler = SimulatedGpu(), EventHandler()
    streams = [gpu.stream(CPU, is_new=True) for _ in range(3)]
    memory = [torch.zeros(1) for _ in range(3)]
    events: dict[int, Any] = {}
    for kind, number, *rest in calls:
        if kind == "launch":
            reads, writes = rest[0] - rest[1], rest[1]
            gpu.thread.stream = streams[number]
            gpu.launch("op", [memory[i] for i in reads], [memory[i] for i in writes])
            names: dict[int, list[str]] = {i: [] for i in range(3)}
            errors = handler._handle_kernel_launch(number + 1, reads, writes, set(), "op", names)
            assert bool(errors) == bool(gpu.races)
            if errors:
                return
        elif kind == "record":
            events[rest[0]] = streams[number].record_event()
            handler._handle_event_record(rest[0], number + 1)
        elif kind == "wait" and rest[0] in events:
            streams[number].wait_event(events[rest[0]])
            handler._handle_event_wait(rest[0], number + 1)
        elif kind == "synchronize":
            streams[number].synchronize()
            handler._handle_stream_synchronization(number + 1)
        elif kind == "event" and number in events:
            events[number].synchronize()
            handler._handle_event_synchronization(number)


@pytest.mark.parametrize(
    ("before_it_is_freed", "races"),
    [("nothing", True), ("kept", False), ("waits", False), ("host", False), ("waits early", True)],
)
def test_freed_memory_is_its_makers_at_once(before_it_is_freed: str, races: bool) -> None:
    gpu = SimulatedGpu()
    maker, reader = (gpu.stream(CPU, is_new=True) for _ in range(2))
    with gpu.scope(CPU, maker):
        value = torch.ones(3)
    reader.wait_stream(maker)
    if before_it_is_freed == "waits early":
        maker.wait_stream(reader)
    with gpu.scope(CPU, reader):
        value.sum()
    if before_it_is_freed == "kept":
        gpu.keep(value, reader)
    elif before_it_is_freed == "waits":
        maker.wait_stream(reader)
    elif before_it_is_freed == "host":
        reader.synchronize()
    assert gpu.races == []
    del value
    assert bool(gpu.races) == races


@pytest.mark.parametrize("waits", [False, True])
def test_a_message_between_threads_orders_no_streams_but_a_wait_of_the_host_does(
    waits: bool,
) -> None:
    """What a thread has waited for is known to those that take the lock after it."""
    gpu = SimulatedGpu()
    condition = tracked_condition(gpu)()
    value = torch.zeros(3)

    def send() -> None:
        stream = gpu.stream(CPU, is_new=True)
        with gpu.scope(CPU, stream):
            value.add_(1)
        if waits:
            stream.synchronize()
        with condition:
            pass

    thread = threading.Thread(target=send)
    thread.start()
    thread.join()
    with condition:
        pass
    with gpu.scope(CPU, gpu.stream(CPU, is_new=True)):
        value.sum()
    assert bool(gpu.races) == (not waits)


def test_a_number_that_python_reads_is_waited_for_unless_it_lies_on_the_host() -> None:
    """Adam's count of steps lies there."""
    for on_gpu in (True, False):
        gpu = SimulatedGpu()
        steps, weights = torch.zeros(()), torch.zeros(3)
        writer, reader = (gpu.stream(CPU, is_new=True) for _ in range(2))
        with gpu.scope(CPU, writer):
            weights.add_(1)
            (steps + 1 if on_gpu else steps).item()
        with gpu.scope(CPU, reader):
            weights.sum()
        assert bool(gpu.races) == (not on_gpu)
