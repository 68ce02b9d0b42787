"""What goes wrong in the engine: planted faults show in the numbers, failures reach the caller."""

import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scpl_compile.actions import Action, stage_actions
from scpl_compile.errors import TrainingError
from scpl_compile.runtime.engine import Engine
from scpl_compile.runtime.lane import Lane
from scpl_compile.runtime.randomness import StageRandom
from scpl_compile.runtime.stage_step import StageStep
from stage_nets import (
    CPU,
    SECONDS,
    WIDTH,
    BlockStage,
    SilentSgd,
    block_stages,
    differences,
    stage_steps,
    submit_steps,
    train_steps,
)

pytestmark = pytest.mark.timeout(60)

# ---------------------------------------------------------------------- planted faults


def in_order(stage: int, order: Callable[[int], Sequence[str]], num_steps: int) -> Iterator[Action]:
    """The actions of `stage`: order(t) are the texts that follow in step t."""
    return iter([Action.parse(f"{stage}{text}") for t in range(num_steps) for text in order(t)])


def late_update(t: int) -> list[str]:
    """F(t + 1) before U(t)."""
    return [f"RECV{t}", f"F{t}", *([f"U{t - 1}"] if t else []), f"B{t}", *last(t, f"U{t}")]


def late_backward(t: int) -> list[str]:
    """B(t) after F(t + 1)."""
    before = [f"B{t - 1}", f"U{t - 1}"] if t else []
    return [f"RECV{t}", f"F{t}", *before, *last(t, f"B{t}", f"U{t}")]


def lost(t: int) -> list[str]:
    """Batch 3 is not trained on."""
    return [f"RECV{t}"] if t == 3 else [f"RECV{t}", f"F{t}", f"B{t}", f"U{t}"]


def doubled(t: int) -> list[str]:
    """Batch 3 is trained on twice before its update."""
    return [f"RECV{t}", f"F{t}", f"B{t}", *([f"F{t}", f"B{t}"] if t == 3 else []), f"U{t}"]


def right(t: int) -> list[str]:
    return [f"RECV{t}", f"F{t}", f"B{t}", f"U{t}"]


def last(t: int, *texts: str) -> tuple[str, ...]:
    return texts if t == 7 else ()


def with_faults(order: Callable[[int], Sequence[str]]) -> list[str]:
    """What differs when stage 1 works in this order."""

    def run(actions: list[Iterator[Action]] | None) -> dict[str, object]:
        steps = stage_steps(2)
        for stage in steps:
            stage._descent.optimizer = SilentSgd(list(stage.module.parameters()))
        return train_steps(2, "stream", 8, steps=steps, actions=actions)[0]

    faulty = [stage_actions("stream", 0, 2), in_order(1, order, 8)]
    return differences(run(faulty), run(None))


def test_the_right_order_differs_in_nothing() -> None:
    assert with_faults(right) == []


@pytest.mark.parametrize("order", [late_update, late_backward, lost, doubled])
def test_a_planted_fault_is_seen(order: Callable[[int], Sequence[str]]) -> None:
    found = with_faults(order)
    assert "1 module.blocks.1.linear.weight" in found and "1 losses" in found
    assert not any(name.startswith("0 ") for name in found)  # nothing flows back


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (lambda t: [f"F{t}"], "stage 1 holds no batch of step 0"),
        (lambda t: [f"RECV{t}", f"B{t}", f"U{t}", f"U{t}"], "stage 1 failed: KeyError: 0"),
    ],
)
def test_an_impossible_order_stops_the_training(
    order: Callable[[int], Sequence[str]], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        with_faults(order)


class Aliased(nn.Module):
    """Stage 0 of two; it sends its own parameter along, cloned or not."""

    def __init__(self, *, clone: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.clone = clone

    def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
        scale = self.scale.detach()
        sent = scale.clone() if self.clone else scale
        return (x, sent), {"local": (x * self.scale).square().mean()}


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.before_reading: Callable[[], None] = lambda: None

    def training_step(self, h: Tensor, scale: Tensor, *, labels: Tensor) -> Any:
        self.before_reading()
        return (), {"loss": (self.weight * scale).square().mean()}


def aliased_run(*, clone: bool, reads_late: bool) -> dict[str, object]:
    """Stage 1 reads in stream, before or after stage 0 has updated what it sent."""
    updated, read = threading.Semaphore(0), threading.Semaphore(0)
    modules = [Aliased(clone=clone), Reader()]
    steps = [
        StageStep(
            k, module, lane=Lane(CPU), learning_rate=lambda step: 0.1, detach=True, draws=False,
            random=StageRandom(k, CPU), optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            inputs=("h", "scale")[: k + 1] if k else ("x",), sends=("h", "scale") if k == 0 else (),
        )
        for k, module in enumerate(modules)
    ]  # fmt: skip

    def passes(semaphore: threading.Semaphore) -> None:
        assert semaphore.acquire(timeout=SECONDS)

    def note(semaphore: threading.Semaphore) -> Callable[..., None]:
        return lambda *_: semaphore.release()

    first, second = (step.optimizer for step in steps)
    if reads_late:
        first.register_step_post_hook(note(updated))
        modules[1].before_reading = lambda: passes(updated)
    else:
        first.register_step_pre_hook(lambda *_: passes(read))
        second.register_step_post_hook(note(read))
    return train_steps(2, "stream", 4, steps=steps)[0]


def test_a_crossing_alias_that_is_not_cloned_is_seen() -> None:
    """Both orders are legal in stream; only with a clone do they compute the same."""
    right = [aliased_run(clone=True, reads_late=late) for late in (False, True)]
    assert differences(*right) == []
    early = aliased_run(clone=False, reads_late=False)
    assert differences(right[0], early) == []  # read before the update: nothing to see
    try:
        late = aliased_run(clone=False, reads_late=True)
    except TrainingError as error:
        # The next update came between the reader's forward and backward: autograd saw it.
        assert "modified by an inplace operation" in str(error)
        return
    assert "1 module.weight" in differences(early, late)
    assert "1 losses" in differences(right[1], late)


# ---------------------------------------------------------------------- failures


class Fails(BlockStage):
    """Fails in the forward or the backward of step 2."""

    where = "F"

    def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
        self.calls = getattr(self, "calls", -1) + 1
        sent, losses = super().training_step(x, labels=labels)
        if self.calls == 2 and self.where == "F":
            raise ValueError("no such number")
        if self.calls == 2 and self.where == "B":
            next(iter(losses.values())).register_hook(self.fail_backward)
        return sent, losses

    def fail_backward(self, gradient: Tensor) -> None:
        raise ValueError("no such number")


class FailsBackward(Fails):
    where = "B"


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("kind", [Fails, FailsBackward])
@pytest.mark.parametrize("schedule", ["stream", "in_step", "sequential"])
def test_a_workers_exception_reaches_the_caller(
    kind: type[Fails], stage: int, schedule: str
) -> None:
    steps = stage_steps(3, stages=block_stages(3, **{f"stage{stage}": kind}))
    engine = Engine(steps, schedule=schedule, threads_per_stage=1)
    message = f"stage {stage} failed: ValueError: no such number; all stages are stopped"
    with pytest.raises(TrainingError, match=message) as first:
        submit_steps(engine, 50)
    cause = first.value.__cause__
    assert isinstance(cause, ValueError)
    names = [frame.name for frame in traceback.extract_tb(cause.__traceback__)]
    assert names[0] == "_work" and names[-1] in ("training_step", "fail_backward")
    for again in (
        lambda: submit_steps(engine, 1),
        engine.drain,
        engine.check,
        lambda: engine.snapshot(lambda stage, state: None),
    ):
        with pytest.raises(TrainingError, match=message) as other:
            again()
        assert other.value.__cause__ is cause
    for thread in engine._workers.threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    engine.close()
    with pytest.raises(TrainingError, match=message):
        submit_steps(engine, 1)


def test_a_failing_update_and_a_failing_snapshot_are_told_too() -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("not now")

    for plant in ("update", "snapshot"):
        steps = stage_steps(2, draws=False, dropout=0)
        engine = Engine(steps, schedule="stream", threads_per_stage=1)
        if plant == "update":
            steps[1].optimizer.register_step_pre_hook(fail)
        submit_steps(engine, 1)
        with pytest.raises((TrainingError, RuntimeError), match="not now"):
            if plant == "snapshot":
                engine.snapshot(fail)
            engine.drain()
            engine.check()
        engine.close()


def test_a_failure_in_python_that_is_no_exception_is_told_too() -> None:
    class Exits(BlockStage):
        def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
            raise SystemExit(3)

    engine = Engine(
        stage_steps(1, stages=block_stages(1, stage0=Exits)), schedule="stream", threads_per_stage=1
    )
    with pytest.raises(TrainingError, match="stage 0 failed: SystemExit: 3"):
        submit_steps(engine, 1)
        engine.drain()
    engine.close()
