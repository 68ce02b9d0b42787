"""The trainer: exact in every schedule, equal to plain training, resumable, and loud when wrong."""

import copy
import json
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stage_nets import (
    BATCH_SIZE,
    NUM_CLASSES,
    WIDTH,
    Batch,
    BlockStage,
    Net,
    batches,
    block_plan,
    block_stages,
    build_net,
    differences,
    make_plan,
    make_trainer,
    state_of,
)
from torch import Tensor, nn

from scpl_compile.errors import DataError, MethodError, ProgramError, TrainingError
from scpl_compile.ir import InputSpec, LocalLoss
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime.randomness import seeded
from scpl_compile.runtime.stage import take
from scpl_compile.runtime.trainer import Trainer, allowed_schedules, default_threads

pytestmark = pytest.mark.timeout(60)

SECONDS = 20.0
SCHEDULES = ("stream", "in_step", "sequential")


def submit_all(trainer: Trainer, data: list[Batch]) -> None:
    for x, labels in data:
        trainer.step(x, labels)


def outcome(trainer: Trainer) -> dict[str, object]:
    """All that the stages own, and the losses of every step since they were last taken."""
    trainer.drain()
    losses = {f"{k} losses": rows for k, rows in enumerate(trainer.take_losses())}
    return {**state_of(trainer._stages), **losses}


def train(num_steps: int, num_stages: int = 2, **options: Any) -> dict[str, object]:
    with make_trainer(num_stages, **options) as trainer:
        submit_all(trainer, batches(num_steps))
        return outcome(trainer)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


# ---------------------------------------------------------------------- backpropagation


class SkipNet(nn.Module):
    """Three stages; `skip`, the ids and the mask are read in the first and in the last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.lift = nn.Linear(WIDTH, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Embedding(10, NUM_CLASSES)
        self.out = nn.Linear(WIDTH, NUM_CLASSES)

    def first(self, ids: Tensor, mask: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = (self.embed(ids) * mask.unsqueeze(-1)).mean(1) + self.norm(x)
        return torch.relu(h), self.lift(h)

    def second(self, h: Tensor) -> Tensor:
        return torch.tanh(self.middle(h))

    def third(self, h: Tensor, skip: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.out(h * skip + skip) + (self.bias(ids) * mask.unsqueeze(-1)).mean(1)
        return logits

    def forward(self, ids: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        h, skip = self.first(ids, mask, x)
        return self.third(self.second(h), skip, ids, mask)


SKIP_READS = [
    ("ids", "mask", "x"),
    ("h1", "skip", "ids", "mask"),
    ("h2", "skip", "ids", "mask"),
]
SKIP_INPUTS = (
    InputSpec(name="ids", dtype="int64", shape=(5,), high=10),
    InputSpec(name="mask", dtype="bool", shape=(5,)),
    InputSpec(name="x", dtype="float32", shape=(WIDTH,)),
)


class SkipStage(nn.Module):
    paths: tuple[str, ...] = ()

    def __init__(self, model: SkipNet) -> None:
        super().__init__()
        take(self, model, *self.paths)


class First(SkipStage):
    paths = ("embed", "norm", "lift")

    def forward(self, ids: Tensor, mask: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (*SkipNet.first(self, ids, mask, x), ids, mask)  # type: ignore[arg-type]

    def training_step(self, *inputs: Tensor, labels: Tensor) -> Any:
        return self(*inputs), {}


class Second(SkipStage):
    paths = ("middle",)

    def forward(self, h: Tensor, skip: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return SkipNet.second(self, h), skip, ids, mask  # type: ignore[arg-type]

    def training_step(self, *inputs: Tensor, labels: Tensor) -> Any:
        return self(*inputs), {}


class Third(SkipStage):
    paths = ("bias", "out")

    def forward(self, h: Tensor, skip: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return SkipNet.third(self, h, skip, ids, mask)  # type: ignore[arg-type]

    def training_step(self, *inputs: Tensor, labels: Tensor) -> Any:
        return (), {"cross_entropy": F.cross_entropy(self(*inputs), labels)}


def skip_batches(num_batches: int) -> list[tuple[tuple[Tensor, Tensor, Tensor], Tensor]]:
    found = []
    for x, labels in batches(num_batches):
        ids = (x[:, :5] * 100).abs().long() % 10
        found.append(((ids, x[:, :5] > -1, x), labels))
    return found


def skip_trainer(**options: Any) -> Trainer:
    plan = make_plan(
        SKIP_READS, model=SkipNet(), inputs=SKIP_INPUTS, schedule="bp",
        paths=[First.paths, Second.paths, Third.paths],
    )  # fmt: skip
    with seeded(4):
        model = SkipNet()
    return Trainer(plan, model, [First, Second, Third], lr=1e-2, **options)


def test_bp_over_stages_is_plain_training() -> None:
    """With a tensor that skips a stage, and integers and a mask that cross the cuts."""
    with seeded(4):
        model = SkipNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    with one_thread():
        for inputs, labels in skip_batches(12):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(*inputs), labels)
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
    with skip_trainer() as trainer:
        for inputs, labels in skip_batches(12):
            trainer.step(inputs, labels)
        trained = trainer.state_dict()
        rows = trainer.take_losses()
    assert [row["cross_entropy"] for _, row in rows[2]] == losses
    assert rows[0] == [(step, {}) for step in range(12)]
    expected = model.state_dict()
    assert trained.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(trained[name], expected[name])] == []


def test_bp_has_one_schedule_and_scpl_has_none_of_it() -> None:
    assert allowed_schedules(block_plan(2, schedule="bp")) == ("bp",)
    assert allowed_schedules(block_plan(2)) == SCHEDULES
    with pytest.raises(MethodError, match="'stream' does not go with method 'bp'.*--method scpl"):
        skip_trainer(schedule="stream")
    with pytest.raises(MethodError, match="'bp' does not go with method 'scpl'.*--method bp"):
        make_trainer(schedule="bp")


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(6, dtype=torch.int32), r"labels must be int64 \(B,\), not torch.int32 \(6,\)"),
        (torch.zeros(6), "not torch.float32"),
        (torch.zeros(6, 1, dtype=torch.int64), r"not torch.int64 \(6, 1\)"),
        (torch.tensor(0), r"not torch.int64 \(\)"),
        (torch.tensor([0, 1, 2, 3, 4, 1]), "label 4 is out of range for 4 classes"),
        (torch.tensor([0, 1, 2, 3, -1, 9]), "label -1 is out of range for 4 classes"),
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


def test_inputs_come_alone_in_a_sequence_or_by_name() -> None:
    x, labels = batches(1)[0]
    found = []
    for inputs in (x, (x,), [x], {"x": x}):
        with make_trainer() as trainer:
            trainer.step(inputs, labels)
            found.append(outcome(trainer))
    assert all(differences(found[0], other) == [] for other in found[1:])
    with skip_trainer() as one, skip_trainer() as two:
        ((ids, mask, x), labels) = skip_batches(1)[0]
        one.step((ids, mask, x), labels)
        two.step({"x": x, "ids": ids, "mask": mask}, labels)
        assert differences(outcome(one), outcome(two)) == []


def test_two_views_of_every_sample_share_its_label() -> None:
    found = []
    for repeat in (1, 2):
        with make_trainer() as trainer:
            for x, labels in batches(3, views=2):
                assert len(x) == 2 * BATCH_SIZE
                trainer.step(x, labels.repeat(repeat))
            found.append(outcome(trainer))
    assert differences(*found) == []


def test_a_batch_of_one_class_warns_once() -> None:
    x, _ = batches(1)[0]
    with make_trainer() as trainer:
        with pytest.warns(UserWarning, match="all labels of a batch are 2") as caught:
            trainer.step(x, torch.full((BATCH_SIZE,), 2))
        assert Path(caught[0].filename).name == "test_trainer.py"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer.step(x, torch.full((BATCH_SIZE,), 1))
            trainer.step(x[:1], torch.tensor([1]).repeat(1))
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
    before = threading.active_count()
    with pytest.raises(MethodError, match=message):
        make_trainer(**options)
    assert threading.active_count() == before


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


class Spoiled(BlockStage):
    """Its loss is not a number at its fourth batch."""

    def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
        self.calls = getattr(self, "calls", -1) + 1
        sent, losses = super().training_step(x, labels=labels)
        factor = float("nan") if self.calls == 3 else 1.0
        return sent, {name: loss * factor for name, loss in losses.items()}


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


class Fails(BlockStage):
    def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
        self.calls = getattr(self, "calls", -1) + 1
        if self.calls == 2:
            raise ValueError("no such number")
        return super().training_step(x, labels=labels)


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


# ---------------------------------------------------------------------- inference


def test_evaluate_drains_and_is_what_the_model_gives() -> None:
    model = build_net(3)
    data = batches(7, seed=8)
    with make_trainer(3, model=model) as trainer:
        submit_all(trainer, batches(20))
        found = trainer.evaluate(iter(data))
        assert min(trainer._engine._board.num_updates) == 20
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in data])
    labels = torch.cat([labels for _, labels in data])
    assert found.num_samples == 7 * BATCH_SIZE
    assert found.accuracy == float((logits.argmax(-1) == labels).double().mean())
    assert found.losses[0] == pytest.approx(float(F.cross_entropy(logits, labels)))
    assert len(found.accuracies) == len(found.losses) == 1


def test_evaluate_reads_objects_with_inputs_and_labels_too() -> None:
    class Sample:
        inputs, labels = batches(1)[0]

    with make_trainer() as trainer:
        assert trainer.evaluate([Sample()]) == trainer.evaluate(batches(1))
        with pytest.raises(DataError, match="there is no sample"):
            trainer.evaluate([])


def test_predicting_changes_nothing() -> None:
    x = torch.randn(3, WIDTH)
    with make_trainer() as trainer:
        submit_all(trainer, batches(3))
        (one,) = trainer.predict(x)
        before = state_of(trainer._stages)
        (two,) = trainer.predict((x,))
        assert torch.equal(one, two) and not one.requires_grad
        assert differences(state_of(trainer._stages), before) == []
        assert all(m.training for stage in trainer._stages for m in stage.module.modules())
        with pytest.raises(DataError, match="has the shape"):
            trainer.predict(x[0])
        assert all(stage.module.training for stage in trainer._stages)
        submit_all(trainer, batches(6)[3:])
        found = outcome(trainer)
    assert differences(found, train(6)) == []


def test_every_exit_is_evaluated_in_the_plans_order() -> None:
    local = LocalLoss(name="local", kind="local", reads=("h1",))
    plan = block_plan(2, inference=("0F", "0X", "1F"), losses=[(local,), ()])
    x, labels = batches(1)[0]
    with make_trainer(plan=plan) as trainer:
        early, late = trainer.predict(x)
        found = trainer.evaluate([(x, labels)])
        stages = [stage.module.eval() for stage in trainer._stages]
        h = stages[0](x)
        assert torch.equal(early, stages[0].head(h)) and torch.equal(late, stages[1](h))
    assert found.accuracies[0] == float((early.argmax(-1) == labels).double().mean())
    assert found.accuracy == float((late.argmax(-1) == labels).double().mean())


def test_the_state_dict_loads_into_the_original_model() -> None:
    with make_trainer(3) as trainer:
        submit_all(trainer, batches(5))
        state = trainer.state_dict()
        kept = {name: value.clone() for name, value in state.items()}
        x = torch.randn(4, WIDTH)
        (logits,) = trainer.predict(x)
        submit_all(trainer, batches(8)[5:])
        trainer.drain()
    model = build_net(3, seed=99)
    model.load_state_dict(state)
    for block, trained in zip(model.blocks, trainer.model.blocks, strict=True):  # type: ignore[arg-type]
        assert not torch.equal(block.mean, trained.mean)  # no file of weights has it
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[name], state[name]) for name in state)  # a copy
    with make_trainer(3, model=model) as other:
        for stage, trained_stage in zip(other._stages, trainer._stages, strict=True):
            for name, buffer in stage.module.named_buffers():
                if name.endswith(".mean"):
                    buffer.copy_(trained_stage.module.get_buffer(name))
        assert other.predict(x)[0].shape == logits.shape


def test_buffers_that_a_stage_has_of_its_own_are_in_the_state_dict() -> None:
    """A buffer on another device than the model's is another tensor; here a clone stands for it."""

    class Moved(BlockStage):
        def __init__(self, model: Net, index: int) -> None:
            super().__init__(model, index)
            block = copy.copy(self.blocks[index])
            block._modules = {**block._modules, "norm": copy.deepcopy(block.norm)}
            self.blocks._modules[str(index)] = block

    with make_trainer(stages=block_stages(2, stage0=Moved)) as trainer:
        submit_all(trainer, batches(3))
        state = trainer.state_dict()
    assert int(state["blocks.0.norm.num_batches_tracked"]) == 3
    assert int(trainer.model.blocks[0].norm.num_batches_tracked) == 0  # type: ignore[index,union-attr]


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("schedule", SCHEDULES)
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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
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
    for call in (lambda: trainer.save(tmp_path), trainer.wait_saved):
        with pytest.raises(TrainingError, match="the trainer is closed"):
            call()
    assert checkpoint.latest(tmp_path) is None


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
