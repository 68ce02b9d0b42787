"""compile_model, Program and what a user does with them from Python."""

import gc
import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import scpl_compile
from scpl_compile.api import compile_model, evaluate_program, plan_model
from scpl_compile.errors import EmitError, MethodError, PartitionError, SourceError, VerifyError
from scpl_compile.runtime import own_draws
from scpl_compile.runtime.lane import default_threads
from scpl_compile.runtime.program import load_stages, read_plan
from scpl_compile.runtime.trainer import Evaluation
from scpl_compile.sources import load_model

IMAGES, LABELS = torch.randn(12, 1, 8, 8), torch.arange(12) % 10


@pytest.fixture
def model(net_file: Path) -> nn.Module:
    """A small model as an object."""
    return load_model(f"{net_file}:build_model")[0]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs without `out` go."""
    home = tmp_path / "temporary"
    home.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    return home


# ---------------------------------------------------------------------- an object, in process


def test_an_object_trains_in_process(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program = scpl_compile.compile_model(model, IMAGES, num_stages=4, num_classes=10)
    trainer = program.trainer(
        devices=["cpu", "cpu"], optimizer="adam", lr=1e-3, schedule="stream", seed=0
    )
    for _ in range(3):
        trainer.step(IMAGES, LABELS)
    trainer.drain()
    losses = trainer.losses()
    assert [set(terms) for terms in losses] == [
        *[{"contrast", "cross_entropy"}] * 3,
        {"classifier"},
    ]
    assert trainer.losses() == [{}] * 4
    found = trainer.evaluate(DataLoader(TensorDataset(IMAGES, LABELS), batch_size=5))
    assert found == evaluated_by_hand(trainer.model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.load_state_dict(trainer.state_dict())
    assert found == evaluated_by_hand(model)
    assert not torch.equal(before["0.weight"], model.state_dict()["0.weight"])
    trainer.close()


def evaluated_by_hand(model: nn.Module) -> Evaluation:
    """The same by the model itself."""
    model.eval()
    with torch.no_grad():
        logits = model(IMAGES)
    model.train()
    return Evaluation(
        num_samples=len(LABELS),
        accuracies=((logits.argmax(1) == LABELS).double().mean().item(),),
        losses=(pytest.approx(nn.functional.cross_entropy(logits, LABELS).item(), rel=1e-5),),
    )


def test_compiling_beside_a_trainer_at_work_changes_nothing_for_it() -> None:
    """Tracing patches torch and draws random numbers for the whole process: steps end first."""
    layers = [nn.Sequential(nn.Linear(256, 256), nn.Dropout(), nn.ReLU()) for _ in range(6)]
    program = compile_model(nn.Sequential(*layers, nn.Linear(256, 3)), "256", num_stages=3)
    batches = [(torch.randn(128, 256), torch.arange(128) % 3) for _ in range(30)]
    other = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 3))
    found = []
    for is_beside in (False, True):
        with program.trainer(seed=0) as trainer:
            for batch in batches:
                trainer.step(*batch)
            if is_beside:
                compile_model(other, "8")
            found.append(trainer.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_compiling_where_no_step_can_end_is_refused() -> None:
    """Inside own_draws() a stage that draws waits, and the steps before it with it."""
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Dropout(), nn.ReLU()) for _ in range(3)]
    program = compile_model(nn.Sequential(*layers, nn.Linear(64, 3)), "64", num_stages=2)
    with program.trainer(seed=0) as trainer:
        with own_draws():
            trainer.step(torch.randn(8, 64), torch.arange(8) % 3)
            with pytest.raises(MethodError, match=r"a trainer is at work, and inside own_draws"):
                plan_model(nn.Linear(8, 3), "8", num_stages=1)
        trainer.drain()
        with own_draws():
            assert plan_model(nn.Linear(8, 3), "8", num_stages=1).num_stages == 1


def test_in_place_trains_the_object_itself(model: nn.Module) -> None:
    program = compile_model(model, IMAGES, num_stages=2)
    with program.trainer(inplace=True) as trainer:
        assert trainer.model is model


def test_trainers_of_one_program_begin_alike_and_do_not_share(model: nn.Module) -> None:
    program = compile_model(model, IMAGES, num_stages=2)
    with program.trainer() as one, program.trainer(schedule="sequential") as other:
        for trainer in (one, other):
            for _ in range(2):
                trainer.step(IMAGES, LABELS)
        left, right = one.state_dict(), other.state_dict()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_temporary_directory_goes_with_the_program(model: nn.Module, temporary: Path) -> None:
    program = compile_model(model, IMAGES, num_stages=2)
    assert program.directory.parent == temporary and read_plan(program.directory) == program.plan
    trainer = program.trainer()
    del program
    gc.collect()
    assert list(temporary.iterdir()) == []
    trainer.step(IMAGES, LABELS)  # a trainer needs no file
    trainer.drain()
    trainer.close()


def test_an_object_needs_a_source_to_be_written(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(EmitError, match=r"trains in process; .*source='file\.py:callable'"):
        compile_model(model, IMAGES, num_stages=2, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- written programs


def test_with_a_source_the_object_and_its_weights_are_written(
    model: nn.Module, net_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "emitted_package"
    compile_model(model, IMAGES, num_stages=2, out=out, source=f"{net_file}:build_model")
    monkeypatch.syspath_prepend(tmp_path)
    build_trainer = importlib.import_module("emitted_package").build_trainer
    with build_trainer(lr=1e-2) as trainer:
        state = trainer.state_dict()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        trainer.step(IMAGES, LABELS)
        trainer.drain()


def test_a_source_of_another_model_is_refused(net_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"builds another model .* differ in '0\.bias'"):
        compile_model(
            nn.Linear(64, 10), torch.randn(4, 64), out=tmp_path / "out", num_stages=1,
            source=f"{net_file}:build_model",
        )  # fmt: skip


def test_a_named_model_is_as_good_as_an_object(net_file: Path) -> None:
    plan = plan_model(f"{net_file}:build_model", "1x8x8", num_stages=3, batch_size=12)
    assert plan.num_stages == 3 and plan.model == f"{net_file}:build_model"
    again = plan_model(load_model(f"{net_file}:build_model")[0], IMAGES, num_stages=3)
    assert again.stages == plan.stages and again.model == "Sequential"


def test_the_number_of_classes_is_what_the_model_gives(net_file: Path) -> None:
    spec = f"{net_file}:build_model"
    assert plan_model(spec, "1x8x8", config={"num_classes": 7}).num_classes == 7
    with pytest.raises(SourceError, match="gives 10 classes, --num-classes says 12"):
        plan_model(spec, "1x8x8", num_classes=12)


@pytest.mark.parametrize("frontend", ["fx", "record"])
def test_a_model_traced_once_gives_the_programs_of_a_model_traced_again(
    model: nn.Module, frontend: str
) -> None:
    def source(num_stages: int, captures: scpl_compile.Captures | None) -> str:
        program = compile_model(
            model, IMAGES, num_stages=num_stages, captures=captures, frontend=frontend
        )
        return (program.directory / "stages.py").read_text()

    captures = scpl_compile.Captures()
    for num_stages in (4, 2, 3, 4):
        assert source(num_stages, captures) == source(num_stages, None)


@pytest.mark.parametrize("kind", ["verify", "disk", "tensors"])
@pytest.mark.parametrize("is_named", [False, True])
def test_what_fails_leaves_nothing(
    kind: str,
    is_named: bool,
    net_file: Path,
    tmp_path: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        if kind == "verify":
            raise VerifyError("the stages' output differs")
        raise OSError(28, "No space left on device")

    where = {
        "verify": "scpl_compile.api.verify_stages",
        "disk": "scpl_compile.api.write_verification",
        "tensors": "scpl_compile.runtime.checkpoint.save_file",
    }
    monkeypatch.setattr(where[kind], fail)
    out = tmp_path / "out" if is_named else None
    expected = "output differs" if kind == "verify" else r"cannot be written .*No space.*make room"
    with pytest.raises((VerifyError, EmitError), match=expected):
        compile_model(f"{net_file}:build_model", "1x8x8", out=out)
    assert list(temporary.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]


def test_without_verify_every_stage_counts_as_random(net_file: Path) -> None:
    program = compile_model(f"{net_file}:build_model", "1x8x8", verify=False)
    assert not program.verification.is_verified
    with program.trainer() as trainer:
        assert [stage.draws for stage in trainer._stages] == [True, True]


# ---------------------------------------------------------------------- inputs and outputs


class TwoOutputs(nn.Module):
    """Gives logits and, by a branch with dropout and BatchNorm, something else."""

    def __init__(self, gives: Callable[..., Any]) -> None:
        super().__init__()
        self.gives = gives
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.other = nn.Sequential(nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 7))
        self.top = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.body(x)
        other = self.other(h)
        return self.gives(self.head(self.top(h)), other)


def as_dict(logits: torch.Tensor, other: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"other": other, "logits": logits}


def as_tuple(*outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return outputs


def test_of_several_outputs_the_logits_are_trained_and_evaluated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = TwoOutputs(as_dict)
    program = compile_model(model, IMAGES, num_stages=2)
    assert program.plan.num_classes == 10 and program.verification.is_verified
    notice = "the logits are the output logits; dropped: other (see --output)\n"
    assert capsys.readouterr().err == notice
    with program.trainer(lr=0.05) as trainer:
        for _ in range(3):
            trainer.step(IMAGES, LABELS)
        trainer.drain()
        found = trainer.evaluate([(IMAGES, LABELS)])
        model.load_state_dict(trainer.state_dict())
    with torch.no_grad():
        logits = model.eval()(IMAGES)["logits"]
    assert found.accuracies == ((logits.argmax(1) == LABELS).double().mean().item(),)


def test_an_output_is_chosen_by_its_name() -> None:
    with pytest.raises(SourceError, match="2 of them could be the logits.*--output"):
        plan_model(TwoOutputs(as_tuple), IMAGES)
    program = compile_model(TwoOutputs(as_tuple), IMAGES, output="1")
    assert program.plan.num_classes == 7 and program.plan.outputs == ("other_2",)


def test_a_librarys_model_needs_no_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
    name = "timm:vit_tiny_patch16_224"
    program = compile_model(name, num_classes=4, config=config, out=tmp_path / "out", batch_size=4)
    assert [str(spec) for spec in program.plan.inputs] == ["x:float32:3x32x32"]
    notice = "input, from the model's own configuration: x:float32:3x32x32\n"
    assert capsys.readouterr().err == notice
    again = load_stages(program.directory, program.plan).build_model()
    own = program.model.state_dict()
    assert {n: v.shape for n, v in again.state_dict().items()} == {
        n: v.shape for n, v in own.items()
    }


def test_ones_own_model_needs_an_input(net_file: Path, model: nn.Module) -> None:
    for given in (model, f"{net_file}:build_model"):
        with pytest.raises(SourceError, match="no input is given, .* give example tensors, or the"):
            plan_model(given)


# ---------------------------------------------------------------------- stages and devices


@pytest.mark.parametrize(
    ("options", "placement"),
    [
        ({}, ("cpu", "cpu")),
        ({"devices": "auto"}, ("cpu", "cpu") if not torch.cuda.is_available() else None),
        ({"devices": "cpu,cpu,cpu"}, ("cpu",) * 3),
        ({"devices": ["cuda:0", "cuda:1"], "num_stages": 4}, ("cuda:0",) * 2 + ("cuda:1",) * 2),
        ({"split_at": ("2", "6")}, ("cpu",) * 3),
        ({"num_stages": 1}, ("cpu",)),
    ],
)
def test_stages_are_as_many_as_devices_else_two(
    options: dict[str, Any], placement: tuple[str, ...] | None, net_file: Path
) -> None:
    plan = plan_model(f"{net_file}:build_model", "1x8x8", **options)
    if placement is not None:
        assert plan.placement == placement
    assert plan.threads_per_stage == default_threads(plan.num_stages)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"split_at": ("2",), "num_stages": 4}, SourceError, "1 cuts, which make 2 stages, not 4"),
        ({"devices": "cpu,cpu,cpu", "num_stages": 2}, SourceError, "3 devices for 2 stages"),
        ({"devices": ["tpu:0x"]}, SourceError, "'tpu:0x' is no device; write cpu, cuda:0"),
        ({"num_stages": 99}, PartitionError, r"asked for 99 stages, .* --stages \d+ or fewer"),
        ({"config": {"depth": 3}}, SourceError, "failed with TypeError: .*depth.*--config"),
    ],
)
def test_what_cannot_be_placed_or_built_is_refused(
    options: dict[str, Any], error: type[Exception], message: str, net_file: Path
) -> None:
    with pytest.raises(error, match=message):
        plan_model(f"{net_file}:build_model", "1x8x8", **options)


def test_options_of_named_models_are_refused_for_objects(model: nn.Module) -> None:
    with pytest.raises(SourceError, match="config= goes with a model that is named"):
        plan_model(model, IMAGES, config={"width": 3})
    with pytest.raises(SourceError, match="weights= goes with a model that is named"):
        plan_model(model, IMAGES, weights=Path("x.safetensors"))
    with pytest.raises(SourceError, match="the model is of type function; give an nn.Module"):
        plan_model(load_model, IMAGES)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- evaluate


def test_evaluation_of_given_weights_equals_the_models_own(
    program: Path, tmp_path: Path, net_file: Path
) -> None:
    weights = program / "weights.safetensors"
    path = tmp_path / "data.py"
    path.write_text(
        "import torch\n"
        "def load():\n"
        "    g = torch.Generator().manual_seed(1)\n"
        "    x, y = torch.randn(40, 1, 8, 8, generator=g), torch.arange(40) % 10\n"
        "    return {'train': (x, y), 'validation': (x, y), 'test': (x, y)}\n"
    )
    result = evaluate_program(program, data=f"{path}:load", weights=weights, batch_size=7)
    model, _ = load_model(f"{net_file}:build_model", weights=weights)
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(40, 1, 8, 8, generator=generator), torch.arange(40) % 10
    with torch.no_grad():
        logits = model.eval()(images)
    assert result["accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    (terms,) = result["losses"]
    expected = nn.functional.cross_entropy(logits, labels).item()
    assert terms == {"cross_entropy": pytest.approx(expected, rel=1e-5)}
    assert result["num_samples"] == 40 and result["devices"] == ["cpu", "cpu"]
