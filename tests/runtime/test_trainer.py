"""The trainer: exact in every schedule, strict about its batches, loud when a stage fails."""

import copy
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scpl_compile.errors import DataError, MethodError, TrainingError
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime.lane import default_threads
from small_nets import compiled
from stage_nets import (
    BATCH_SIZE,
    WIDTH,
    BlockStage,
    Fails,
    Net,
    Spoiled,
    batches,
    block_stages,
    build_net,
    differences,
    make_trainer,
    outcome,
    submit_all,
    train,
)

pytestmark = pytest.mark.timeout(60)

SCHEDULES = ("stream", "in_step", "sequential")

# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_the_schedules_leave_the_same_bits(num_stages: int) -> None:
    expected = train(20, num_stages, schedule="sequential")
    assert len(expected["0 losses"]) == 20  # type: ignore[arg-type]
    for schedule in ("stream", "in_step"):
        assert differences(train(20, num_stages, schedule=schedule), expected) == []


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
def test_with_other_optimizers_and_rates_too(optimizer: str) -> None:
    options: dict[str, Any] = {
        "optimizer": optimizer, "lr_schedule": "cosine", "total_steps": 10,
        "optimizer_options": {"weight_decay": 0.1},
    }  # fmt: skip
    expected = train(8, schedule="sequential", **options)
    assert differences(train(8, schedule="stream", **options), expected) == []
    del options["total_steps"]
    assert differences(train(8, schedule="sequential", **options), expected) != []


def test_the_run_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = train(4)
    torch.manual_seed(2)
    assert differences(one, train(4)) == []
    other = differences(one, train(4, seed=1))
    assert {"0 random.torch", "0 module.head.weight", "1 random.torch"} <= set(other)


def test_the_callers_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    train(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_stages_that_draw_nothing_need_no_lock() -> None:
    options: dict[str, Any] = {"model": build_net(2, dropout=0.0)}
    expected = train(6, schedule="sequential", **copy.deepcopy(options))
    found = train(6, random_stages=(), **options)
    assert differences(found, expected) == []


def test_recorded_events_are_of_every_step() -> None:
    with make_trainer(record_events=True) as trainer:
        submit_all(trainer, batches(3))
        trainer.drain()
        texts = {str(event.action) for event in trainer.events}
    assert {"0F2", "0SEND2", "0U2", "1RECV2", "1B2", "1U2"} <= texts
    assert len(trainer.events) == 3 * (5 + 4)
    with make_trainer() as trainer:
        submit_all(trainer, batches(1))
        assert trainer.events == ()


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(6, dtype=torch.int32), r"labels must be int64 \(B,\), not torch.int32 \(6,\)"),
        (torch.zeros(6), "not torch.float32"),
        (torch.zeros(6, 1, dtype=torch.int64), r"not torch.int64 \(6, 1\)"),
        (torch.tensor(0), r"not torch.int64 \(\)"),
        (torch.tensor([0, 1, 2, 3, 4, 1]), "label 4 is out of range for 4 classes"),
        (torch.tensor([0, 1, 2, 3, -1, 1]), "label -1 is out of range for 4 classes"),
        (torch.tensor([0, 1, 2, 3]), "6 samples have 4 labels"),
        (torch.arange(12) % 4, "6 samples have 12 labels"),
        (torch.zeros(0, dtype=torch.int64), "6 samples have 0 labels"),
    ],
)
def test_wrong_labels_are_refused_before_anything_runs(labels: Tensor, message: str) -> None:
    with make_trainer() as trainer:
        with pytest.raises(DataError, match=message):
            trainer.step(torch.randn(6, WIDTH), labels)
        assert trainer.num_steps == 0
        submit_all(trainer, batches(1))
        trainer.drain()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(6, 3, WIDTH), r"input 'x' has the shape \(batch, 3, 8\); .* \(batch, 8\)"),
        (torch.randn(6), r"input 'x' has the shape \(batch, \); .* \(batch, 8\)"),
        (torch.tensor(1.0), "input 'x' has the shape"),
        ((), "the model takes 1 inputs, not 0"),
        ([torch.randn(6, WIDTH)] * 2, "the model takes 1 inputs, not 2"),
        ({"y": torch.randn(6, WIDTH)}, r"takes the inputs \['x'\], not \['y'\]"),
        ({}, r"takes the inputs \['x'\], not \[\]"),
        (torch.randn(0, WIDTH), "0 samples have 6 labels"),
    ],
)
def test_wrong_inputs_are_refused(inputs: Any, message: str) -> None:
    with make_trainer() as trainer:
        for call in (lambda: trainer.step(inputs, torch.arange(6) % 4),):
            with pytest.raises(DataError, match=message):
                call()
        assert trainer.num_steps == 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(6, WIDTH).double(), r"'x' is torch\.float64; .*torch\.float32: .*\.float\(\)"),
        (torch.randn(6, WIDTH).numpy(), r"'x' is a numpy\.ndarray; .*torch\.from_numpy"),
    ],
)
def test_wrong_dtypes_are_refused_before_a_worker_sees_them(inputs: Any, message: str) -> None:
    labels = torch.arange(6) % 4
    with make_trainer() as trainer:
        for call in (
            lambda: trainer.step(inputs, labels),
            lambda: trainer.predict(inputs),
            lambda: trainer.evaluate([(inputs, labels)]),
        ):
            with pytest.raises(DataError, match=message):
                call()
        submit_all(trainer, batches(1))
        trainer.drain()
        assert trainer.num_steps == 1


def test_a_step_inside_autocast_is_refused_and_one_without_gradients_is_not() -> None:
    expected = train(2)
    x, labels = batches(1)[0]
    with make_trainer() as trainer:
        with (
            torch.autocast("cpu"),
            pytest.raises(MethodError, match="does not reach the stages' workers; leave it off"),
        ):
            trainer.step(x, labels)
        with torch.inference_mode():
            made_inside = x.clone()
        with pytest.raises(DataError, match=r"'x' was made in torch\.inference_mode"):
            trainer.step(made_inside, labels)
        with torch.no_grad():
            trainer.step(x, labels)
        x, labels = batches(2)[1]
        with torch.inference_mode():
            trainer.step(x, labels)
        assert differences(outcome(trainer), expected) == []


def test_inputs_come_alone_in_a_sequence_or_by_name() -> None:
    x, labels = batches(1)[0]
    found = []
    for inputs in (x, (x,), [x], {"x": x}):
        with make_trainer() as trainer:
            trainer.step(inputs, labels)
            found.append(outcome(trainer))
    assert all(differences(found[0], other) == [] for other in found[1:])


def test_two_views_of_every_sample_share_its_label() -> None:
    found = []
    for repeat in (1, 2):
        with make_trainer() as trainer:
            for x, labels in batches(3, views=2):
                assert len(x) == 2 * BATCH_SIZE
                trainer.step(x, labels.repeat(repeat))
            found.append(outcome(trainer))
    assert differences(*found) == []


@pytest.mark.parametrize("method", ["scpl", "deinforeg", "predsim", "bp"])
def test_a_batch_of_one_class_warns_once_where_a_loss_contrasts(method: str) -> None:
    found = compiled("cnn", 2, method=method)
    inputs, _ = found.batches[0]
    with found.program.trainer() as trainer:
        if method in ("scpl", "deinforeg"):
            with pytest.warns(UserWarning, match="all labels of a batch are 2") as caught:
                trainer.step(inputs, torch.full((len(inputs[0]),), 2))
            assert Path(caught[0].filename).name == "test_trainer.py"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer.step(inputs, torch.full((len(inputs[0]),), 1))
        trainer.drain()


def test_a_batch_of_one_sample_is_no_batch_of_one_class() -> None:
    with make_trainer(stages=block_stages(2, stage0=NoNorm, stage1=NoNorm)) as trainer:
        trainer.step(torch.randn(1, WIDTH), torch.tensor([1]))
        trainer.drain()


class NoNorm(BlockStage):
    """Batch norm refuses a batch of one."""

    def __init__(self, model: Net, index: int) -> None:
        super().__init__(model, index)
        self.blocks[index].norm = nn.Identity()


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "gpipe"}, "schedule 'gpipe' does not go with method 'scpl'"),
        ({"optimizer": "adamm"}, "optimizer 'adamm' is not one of"),
        ({"optimizer_options": {"momentum": 1}}, "optimizer 'adam' refuses"),
        ({"lr_schedule": "step"}, "lr_schedule 'step' is not one of"),
        ({"devices": ("cpu",) * 3}, "3 devices for 2 stages"),
        ({"devices": ("cuda:99",)}, "'cuda:99' is not there"),
        ({"queue_depth": 0}, "queue depth 0"),
        ({"threads_per_stage": -1}, "-1 threads per stage"),
    ],
)
def test_wrong_options_are_refused_and_start_no_thread(
    options: dict[str, Any], message: str
) -> None:
    before = set(threading.enumerate())
    with pytest.raises(MethodError, match=message):
        make_trainer(**options)
    assert set(threading.enumerate()) <= before


def test_threads_per_stage_are_the_plans_or_the_callers() -> None:
    found: set[int] = set()

    class Counts(BlockStage):
        def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
            found.add(torch.get_num_threads())
            return super().training_step(x, labels=labels)

    for options, expected in (({}, 1), ({"threads_per_stage": 2}, 2)):
        found.clear()
        with make_trainer(stages=block_stages(2, stage0=Counts, stage1=Counts), **options) as t:
            submit_all(t, batches(2))
            t.drain()
            assert t.threads_per_stage == expected
        assert found == {expected}


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert [default_threads(k) for k in (1, 3, 8, 9)] == [8, 2, 1, 1]


# ---------------------------------------------------------------------- losses


def test_losses_are_means_since_they_were_last_read() -> None:
    with make_trainer() as trainer:
        assert trainer.losses() == [{}, {}]
        submit_all(trainer, batches(3))
        trainer.drain()
        rows = trainer.take_losses()
        submit_all(trainer, batches(4)[3:])
        trainer.drain()
        (first,), (second,) = trainer.take_losses()
        submit_all(trainer, batches(6)[4:])
        trainer.drain()
        means = trainer.losses()
    assert [[step for step, _ in stage] for stage in rows] == [[0, 1, 2]] * 2
    assert (first[0], second[0]) == (3, 3)
    assert [set(mean) for mean in means] == [{"local"}, {"cross_entropy"}]
    expected = train(6)
    last_two = [row["local"] for _, row in expected["0 losses"][4:]]  # type: ignore[index]
    assert means[0]["local"] == pytest.approx(sum(last_two) / 2)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_loss_that_is_no_number_names_stage_and_first_step(stage: int) -> None:
    with make_trainer(stages=block_stages(2, **{f"stage{stage}": Spoiled})) as trainer:
        submit_all(trainer, batches(3))
        trainer.drain()
        trainer.take_losses()
        submit_all(trainer, batches(8)[3:])
        trainer.drain()
        message = f"stage {stage}: the loss is not finite since step 3; lower --lr"
        for read in (trainer.take_losses, trainer.losses):
            with pytest.raises(TrainingError, match=message):
                read()


# ---------------------------------------------------------------------- failures


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stage", [0, 2])
def test_a_stages_exception_reaches_the_caller_and_stops_all(
    stage: int, schedule: str, tmp_path: Path
) -> None:
    stages = block_stages(3, **{f"stage{stage}": Fails})
    trainer = make_trainer(3, stages=stages, schedule=schedule)
    message = f"stage {stage} failed: ValueError: no such number; all stages are stopped"
    with pytest.raises(TrainingError, match=message) as caught:
        submit_all(trainer, batches(40))
    cause = caught.value.__cause__
    assert isinstance(cause, ValueError)
    text = "".join(traceback.format_exception(caught.value))
    assert 'raise ValueError("no such number")' in text  # the worker's own traceback
    calls = (
        lambda: submit_all(trainer, batches(1)),
        trainer.drain,
        trainer.state_dict,
        lambda: trainer.predict(torch.randn(2, WIDTH)),
        lambda: trainer.save(tmp_path),
        trainer.wait_saved,
    )
    for again in calls:
        with pytest.raises(TrainingError, match=message):
            again()
    trainer.close()
    trainer.close()
    with pytest.raises(TrainingError, match=message):
        submit_all(trainer, batches(1))
    assert checkpoint.latest(tmp_path) is None


def test_a_closed_trainer_says_so(tmp_path: Path) -> None:
    with make_trainer() as trainer:
        submit_all(trainer, batches(2))
        trainer.drain()
    for call in (
        lambda: submit_all(trainer, batches(1)),
        lambda: trainer.save(tmp_path),
        trainer.wait_saved,
    ):
        with pytest.raises(TrainingError, match="the trainer is closed; build a new one"):
            call()
    assert trainer.num_steps == 2
    # What was drained can still be looked at.
    assert len(trainer.predict(torch.randn(2, WIDTH))) == 1
    assert trainer.state_dict().keys() == build_net(2).state_dict().keys()


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("devices", [("cuda:0",), ("cuda:0", "cpu"), ("cpu", "cuda:0")])
def test_streams_of_a_gpu_leave_the_same_bits(devices: tuple[str, ...], tmp_path: Path) -> None:
    expected = train(20, devices=devices, schedule="sequential")
    with make_trainer(devices=devices) as trainer:
        for x, labels in batches(10):
            trainer.step(x.cuda(), labels.cuda())  # made on the caller's stream
        trainer.save(tmp_path)
        trainer.predict(torch.randn(3, WIDTH))
        submit_all(trainer, batches(20)[10:])
        assert differences(outcome(trainer), expected) == []
        trainer.wait_saved()
    with make_trainer(devices=devices, seed=3) as resumed:
        resumed.load(checkpoint.step_directory(tmp_path, 10))
        submit_all(resumed, batches(20)[10:])
        found = outcome(resumed)
    for k in range(2):
        del expected[f"{k} losses"], found[f"{k} losses"]
    assert differences(found, expected) == []
