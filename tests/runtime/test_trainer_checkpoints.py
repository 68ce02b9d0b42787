"""Saving while streaming, going on from what was saved, and what is never completed."""

import copy
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from scpl_compile.errors import ProgramError, TrainingError
from scpl_compile.runtime import checkpoint
from stage_nets import (
    SECONDS,
    BlockStage,
    Fails,
    Spoiled,
    batches,
    block_plan,
    block_stages,
    build_net,
    differences,
    make_trainer,
    outcome,
    submit_all,
    train,
)

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("schedule", ["stream", "in_step", "sequential"])
def test_saved_and_loaded_training_goes_on_as_if_uninterrupted(
    schedule: str, tmp_path: Path
) -> None:
    """Dropout, Adam, batch norm, a non-persistent buffer, a falling learning rate."""
    options: dict[str, Any] = {"lr_schedule": "cosine", "total_steps": 12}
    data = batches(12)
    whole = train(12, 3, schedule="stream", **options)
    with make_trainer(3, schedule=schedule, **options) as trainer:
        submit_all(trainer, data[:5])
        trainer.save(tmp_path, {"note": "ours"})
        trainer.wait_saved()
        trainer.take_losses()
    path = checkpoint.latest(tmp_path)
    assert path == checkpoint.step_directory(tmp_path, 5)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["step"], manifest["note"]) == (5, "ours")
    # Another seed, another start: everything comes from the files.
    with make_trainer(
        3, seed=7, model=build_net(3, seed=3), schedule=schedule, **options
    ) as resumed:
        submit_all(resumed, data[9:])
        resumed.load(path)
        assert resumed.num_steps == 5
        submit_all(resumed, data[5:])
        found = outcome(resumed)
        assert resumed.num_steps == 12
    for k in range(3):
        whole[f"{k} losses"] = whole[f"{k} losses"][5:]  # type: ignore[index]
    assert differences(found, whole) == []


def test_a_save_while_streaming_is_the_drained_state_of_that_step(tmp_path: Path) -> None:
    go_on = threading.Event()

    class Held(BlockStage):
        def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
            assert go_on.wait(SECONDS)
            return super().training_step(x, labels=labels)

    data = batches(10)
    model = build_net(3, dropout=0.0)
    options: dict[str, Any] = {"random_stages": (), "queue_depth": 4}
    stages = block_stages(3, stage2=Held)
    with make_trainer(3, model=copy.deepcopy(model), stages=stages, **options) as trainer:
        submit_all(trainer, data[:4])
        trainer.save(tmp_path)
        submit_all(trainer, data[4:7])  # the stages before go on; the last has not begun
        assert trainer.num_steps == 7 and checkpoint.latest(tmp_path) is None
        go_on.set()
        trainer.save(tmp_path)  # waits for the one before
        submit_all(trainer, data[7:])
        trainer.wait_saved()
    for steps in (4, 7):
        with make_trainer(3, model=copy.deepcopy(model), **options) as drained:
            submit_all(drained, data[:steps])
            expected = outcome(drained)
        with make_trainer(3, seed=9, **options) as loaded:
            loaded.load(checkpoint.step_directory(tmp_path, steps))
            found = outcome(loaded)
        for k in range(3):
            del expected[f"{k} losses"], found[f"{k} losses"]
        assert differences(found, expected) == []


def test_loading_an_earlier_step_goes_back(tmp_path: Path) -> None:
    data = batches(8)
    with make_trainer() as trainer:
        submit_all(trainer, data[:3])
        trainer.save(tmp_path)
        submit_all(trainer, data[3:])
        first = outcome(trainer)
        trainer.wait_saved()
        trainer.load(checkpoint.step_directory(tmp_path, 3))
        submit_all(trainer, data[3:])
        second = outcome(trainer)
    for k in range(2):
        del first[f"{k} losses"], second[f"{k} losses"]
    assert differences(first, second) == []


def saved(run: Path, **options: Any) -> Path:
    with make_trainer(**options) as trainer:
        submit_all(trainer, batches(2))
        trainer.save(run)
        trainer.wait_saved()
    return checkpoint.step_directory(run, 2)


def made_up(directory: Path) -> None:
    """A complete set, by its manifest, of which one file is none that `save_stage` has written."""
    (directory / "stage-1.safetensors").write_bytes(b"x")
    checkpoint.complete(directory, json.loads((directory / "manifest.json").read_text()), 2)


def rewritten(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """A complete set, by its manifest, in which one tensor of stage 0 is another."""

    def rewrite(directory: Path) -> None:
        tensors, values = checkpoint.load_stage(directory, 0)
        checkpoint.save_stage(directory, 0, tensors | {name: change(tensors[name])}, values)
        checkpoint.complete(directory, json.loads((directory / "manifest.json").read_text()), 2)

    return rewrite


def of_another_step(directory: Path) -> None:
    manifest = directory / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"step": 1}))


MOMENT = "optimizer.0.exp_avg"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            rewritten(MOMENT, lambda value: value.flatten()),
            rf"stage 0: '{MOMENT}' is \(\d+,\) in ",
        ),
        (rewritten(MOMENT, lambda value: value / 0 * 0), rf"stage 0: '{MOMENT}' is not finite in"),
        (
            rewritten("module.head.weight", lambda value: value / 0),
            "stage 0: parameter 'head.weight' is not finite in the checkpoint; remove it",
        ),
    ],
)
def test_a_checkpoint_that_no_training_has_left_is_refused(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    path = saved(tmp_path)
    damage(path)
    with make_trainer() as trainer, pytest.raises(ProgramError, match=message):
        trainer.load(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (of_another_step, "manifest.json is damaged"),
        (made_up, r"stage-1.safetensors is damaged"),
        (lambda d: (d / "stage-1.safetensors").unlink(), "stage-1.safetensors is missing"),
        (lambda d: (d / "stage-0.safetensors").write_bytes(b"x"), r"damaged \(sha256\)"),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda d: (d / "manifest.json").unlink(), "manifest.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_training_can_go_on(
    damage: Any, message: str, tmp_path: Path
) -> None:
    path = saved(tmp_path)
    damage(path)
    with make_trainer() as trainer:
        submit_all(trainer, batches(2))
        with pytest.raises(ProgramError, match=message):
            trainer.load(path)
        submit_all(trainer, batches(4)[2:])
        assert differences(outcome(trainer), train(4)) == []


def test_the_checkpoint_of_another_plan_or_optimizer_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with (
        make_trainer(plan=block_plan(2, inference=("1F",))) as trainer,
        pytest.raises(ProgramError, match="belongs to another plan"),
    ):
        trainer.load(path)
    with (
        make_trainer(optimizer="sgd") as trainer,
        pytest.raises(TrainingError, match="of the optimizer Adam, not SGD"),
    ):
        trainer.load(path)


@pytest.mark.parametrize("num_after", [0, 3])
def test_the_checkpoint_of_a_bad_loss_is_never_completed(num_after: int, tmp_path: Path) -> None:
    with make_trainer(stages=block_stages(2, stage1=Spoiled)) as trainer:
        submit_all(trainer, batches(2))
        trainer.save(tmp_path)
        trainer.wait_saved()
        submit_all(trainer, batches(4)[2:])
        trainer.save(tmp_path)
        submit_all(trainer, batches(4 + num_after)[4:])
        with pytest.raises(TrainingError, match="stage 1: the loss is not finite since step 3"):
            trainer.save(tmp_path) if num_after else trainer.wait_saved()
    assert checkpoint.latest(tmp_path) == checkpoint.step_directory(tmp_path, 2)


def test_weights_that_are_no_numbers_are_never_completed_either(tmp_path: Path) -> None:
    class Infinite(BlockStage):
        """A finite loss with an infinite gradient."""

        def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
            sent, losses = super().training_step(x, labels=labels)
            return sent, {**losses, "root": (self.out.bias * 0).sum().sqrt()}

    with make_trainer(stages=block_stages(2, stage1=Infinite)) as trainer:
        submit_all(trainer, batches(1))
        trainer.save(tmp_path)
        with pytest.raises(TrainingError, match="stage 1: parameter 'out.bias' is not finite"):
            trainer.wait_saved()
        assert trainer.take_losses()[1][0][1]["root"] == 0.0
    assert checkpoint.latest(tmp_path) is None


def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the directory should be")
    with make_trainer() as trainer:
        submit_all(trainer, batches(1))
        trainer.save(tmp_path / "run")
        with pytest.raises(TrainingError, match="the checkpoint could not be written: "):
            trainer.wait_saved()
        trainer.save(tmp_path / "other")
        trainer.wait_saved()
    assert checkpoint.latest(tmp_path / "other") is not None


def test_a_stage_that_fails_after_a_save_hangs_nobody(tmp_path: Path) -> None:
    go_on = threading.Event()

    class FailsLater(Fails):
        def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
            assert go_on.wait(SECONDS)
            return super().training_step(x, labels=labels)

    stages = block_stages(2, stage1=FailsLater)
    with make_trainer(stages=stages, random_stages=()) as trainer:
        submit_all(trainer, batches(4))
        trainer.save(tmp_path)
        go_on.set()
        for call in (lambda: trainer.save(tmp_path), trainer.drain):
            with pytest.raises(TrainingError, match="stage 1 failed: ValueError"):
                call()
    assert checkpoint.latest(tmp_path) is None


def test_closing_in_the_middle_of_a_save_hangs_nobody(tmp_path: Path) -> None:
    go_on = threading.Event()

    class Held(BlockStage):
        def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
            assert go_on.wait(SECONDS)
            return super().training_step(x, labels=labels)

    trainer = make_trainer(stages=block_stages(2, stage1=Held), random_stages=())
    submit_all(trainer, batches(4))
    trainer.save(tmp_path)
    threading.Timer(0.1, go_on.set).start()
    trainer.close()
    for call in (trainer.wait_saved, lambda: trainer.save(tmp_path)):
        with pytest.raises(TrainingError, match="the trainer is closed"):
            call()
    assert checkpoint.latest(tmp_path) is None


def test_a_failed_save_that_nobody_asked_about_is_told_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the directory should be")
    trainer = make_trainer()
    submit_all(trainer, batches(1))
    trainer.save(tmp_path / "run")
    trainer.drain()
    with pytest.warns(UserWarning, match="the last checkpoint could not be written: .*run") as told:
        trainer.close()
    assert Path(told[0].filename).name == "test_trainer_checkpoints.py"
    trainer.close()  # once
    with pytest.warns(UserWarning), pytest.raises(KeyError), make_trainer() as other:
        submit_all(other, batches(1))
        other.save(tmp_path / "run")
        other.drain()
        raise KeyError  # is not hidden


def test_what_must_be_done_before_a_checkpoint_counts_is_done_when_its_steps_are(
    tmp_path: Path,
) -> None:
    found: list[Any] = []

    with make_trainer(3) as trainer:

        def note() -> None:
            found.append((checkpoint.latest(tmp_path), trainer.take_losses()))

        submit_all(trainer, batches(4))
        trainer.save(tmp_path, before_complete=note)
        trainer.wait_saved()
        assert checkpoint.latest(tmp_path) is not None
        ((before, rows),) = found
        assert before is None
        assert [[step for step, _ in stage] for stage in rows] == [[0, 1, 2, 3]] * 3

        def fail() -> None:
            raise ProgramError("no room")

        submit_all(trainer, batches(5)[4:])
        trainer.save(tmp_path, before_complete=fail)
        with pytest.raises(ProgramError, match="no room"):
            trainer.wait_saved()
    assert checkpoint.latest(tmp_path) == checkpoint.step_directory(tmp_path, 4)
