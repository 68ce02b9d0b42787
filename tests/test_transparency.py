"""A compiled model is the user's model: same outputs, same names, same training under `bp`."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.exactness.main import small_net
from benchmarks.measure import pinned_threads
from scpl_compile import Program, compile_model
from scpl_compile.ir import Plan
from scpl_compile.runtime.program import load_stages
from scpl_compile.runtime.randomness import spread_seed
from scpl_compile.runtime.stage import as_tuple
from scpl_compile.runtime.trainer import _STAGE
from small_nets import BUILDERS, Batch, Compiled, compiled

NETS = ["cnn", "lstm", "small_net", "transformer", "unet"]
STAGES = {"lstm": (1, 3), "small_net": (1, 2, 6)}


def cases(names: Sequence[str] = NETS) -> list[tuple[str, int]]:
    return [(name, k) for name in names for k in STAGES.get(name, (1, 2, 4))]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and both kinds of buffers, as they are now."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: value.detach().clone() for name, value in named}


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """The names whose tensors differ in any bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def train(program: Program, batches: Iterable[Batch], **options: object) -> nn.Module:
    """The trained model."""
    with program.trainer(**options) as trainer:
        for inputs, labels in batches:
            trainer.step(inputs, labels)
        trainer.drain()
        return trainer.model


# ---------------------------------------------------------------------- forward


def chained(plan: Plan, modules: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Tensor:
    """The output of the stages, one after another."""
    values = dict(zip((spec.name for spec in plan.inputs), inputs, strict=True))
    for stage, module in zip(plan.stages, modules, strict=True):
        outputs = as_tuple(module(*(values[name] for name in stage.inputs)))
        values |= dict(zip(stage.outputs, outputs, strict=True))
    return values[plan.outputs[0]]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "num_stages"), cases())
def test_the_stages_compute_what_the_model_computes(
    name: str, num_stages: int, training: bool
) -> None:
    found = compiled(name, num_stages)
    plan = found.program.plan
    eager = copy.deepcopy(found.program.model).train(training)
    model = copy.deepcopy(found.program.model)
    emitted = load_stages(found.program.directory, plan).STAGES
    modules = [make(model).train(training) for make in emitted]
    for inputs, _ in found.batches:
        torch.manual_seed(3)
        expected = eager(*inputs)
        after = torch.get_rng_state()
        torch.manual_seed(3)
        assert torch.equal(chained(plan, modules, inputs), expected)
        assert torch.equal(torch.get_rng_state(), after)  # it drew as much, in the same order
    assert differing(tensors(model), tensors(eager)) == []  # batch norm's buffers


@pytest.mark.parametrize("method", ["scpl", "early_exit", "bp"])
@pytest.mark.parametrize("name", ["cnn", "lstm", "unet"])
def test_after_training_predict_is_the_original_model(name: str, method: str) -> None:
    found = compiled(name, 2, method=method)
    with found.program.trainer() as trainer:
        for inputs, labels in found.batches:
            trainer.step(inputs, labels)
        original = BUILDERS[name][0]()
        original.load_state_dict(trainer.state_dict())
        original.eval()
        inputs, labels = found.batches[0]
        with torch.no_grad():
            logits = original(*inputs)
        assert torch.equal(trainer.predict(inputs)[-1], logits)
        evaluation = trainer.evaluate([(inputs, labels)])
    assert evaluation.accuracy == float((logits.argmax(1) == labels).double().mean())
    assert evaluation.losses[-1] == pytest.approx(float(F.cross_entropy(logits, labels)))


# ---------------------------------------------------------------------- plain training


def plainly_trained(found: Compiled, optimizer: str, seed: int | None = None) -> nn.Module:
    """The model after ordinary training: forward, backward, step; one thread."""
    model = copy.deepcopy(found.program.model).train()
    make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    steps = make([p for p in model.parameters() if p.requires_grad], lr=0.01)
    if seed is not None:
        torch.manual_seed(seed)
    with pinned_threads(1):
        for inputs, labels in found.batches:
            F.cross_entropy(model(*inputs), labels).backward()
            steps.step()
            steps.zero_grad()
    return model


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(
    ("name", "num_stages"), cases(["cnn", "lstm", "transformer_without_dropout", "unet"])
)
def test_bp_over_stages_is_plain_training(name: str, num_stages: int, optimizer: str) -> None:
    found = compiled(name, num_stages, method="bp")
    staged = train(found.program, found.batches, optimizer=optimizer, lr=0.01)
    assert differing(tensors(staged), tensors(plainly_trained(found, optimizer))) == []
    assert differing(tensors(staged), tensors(found.program.model)) != []


@pytest.mark.parametrize("method", ["bp", "scpl"])
def test_one_stage_is_plain_training_with_its_dropout(method: str) -> None:
    """Of dropout, too, where the plain training draws from the stage's stream."""
    found = compiled("small_net", 1, method=method)
    staged = train(found.program, found.batches, optimizer="adamw", lr=0.01, seed=5)
    plain = plainly_trained(found, "adamw", seed=spread_seed(5, _STAGE, 0))
    assert differing(tensors(staged), tensors(plain)) == []


# ---------------------------------------------------------------------- names and state


@pytest.mark.parametrize(("name", "num_stages"), cases())
def test_the_state_dict_is_the_original_models(name: str, num_stages: int) -> None:
    found = compiled(name, num_stages)
    with found.program.trainer() as trainer:
        inputs, labels = found.batches[0]
        trainer.step(inputs, labels)
        state = trainer.state_dict()
        assert list(state) == list(found.program.model.state_dict())
        fresh = BUILDERS[name][0]()
        fresh.load_state_dict(state)  # strict
        assert differing(fresh.state_dict(), trainer.model.state_dict()) == []
        trainer.step(inputs, labels)
        trainer.drain()
    assert differing(fresh.state_dict(), state) == []  # a copy: later steps leave it alone


def test_the_parameters_of_the_stages_are_the_models_each_once() -> None:
    for name, num_stages in cases():
        found = compiled(name, num_stages)
        owned = [p for stage in found.program.plan.stages for p in stage.parameters]
        assert sorted(owned) == sorted(n for n, _ in found.program.model.named_parameters())


def test_the_users_model_stays_as_it_was() -> None:
    model = small_net().eval()
    before, state = tensors(model), torch.get_rng_state()
    program = compile_model(model, "4x8", num_stages=2, threads_per_stage=1)
    assert program.model is model and not model.training
    train(program, compiled("small_net", 2).batches)
    assert differing(tensors(model), before) == []
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_inplace_trains_the_users_model() -> None:
    found = compiled("cnn", 2)
    model = copy.deepcopy(found.program.model)
    program = Program(
        found.program.plan, found.program.directory, model, found.program.verification
    )
    assert train(program, found.batches, inplace=True) is model
    expected = tensors(train(found.program, found.batches))
    assert differing(tensors(model), expected) == []


def test_frozen_parameters_stay_frozen() -> None:
    """Weight decay would move them, too."""
    found = compiled("cnn", 4)
    before = tensors(found.program.model)
    options = {"optimizer": "adamw", "optimizer_options": {"weight_decay": 0.1}}
    moved = differing(tensors(train(found.program, found.batches, **options)), before)
    assert {"stem.weight", "stem.bias"}.isdisjoint(moved)
    trained = {n for n, p in found.program.model.named_parameters() if p.requires_grad}
    assert trained <= set(moved)


def test_evaluation_puts_the_modes_back() -> None:
    """Those of single modules, too: a batch norm that the user holds in eval() stays there."""
    found = compiled("cnn", 2)
    with found.program.trainer() as trainer:
        held = trainer.model.get_submodule("block1.1").eval()
        modes = [module.training for module in trainer.model.modules()]
        trainer.evaluate(found.batches)
        trainer.predict(found.batches[0][0])
        assert [module.training for module in trainer.model.modules()] == modes
        running_mean = held.running_mean.clone()
        for inputs, labels in found.batches:
            trainer.step(inputs, labels)
        trainer.drain()
        assert torch.equal(held.running_mean, running_mean)
        other = trainer.model.get_submodule("block2.1")
        assert not torch.equal(other.running_mean, torch.zeros_like(other.running_mean))


def test_evaluation_changes_nothing() -> None:
    found = compiled("small_net", 2)
    with found.program.trainer() as trainer:
        before, state = tensors(trainer.model), torch.get_rng_state()
        trainer.evaluate(found.batches)
        assert differing(tensors(trainer.model), before) == []
        assert torch.equal(torch.get_rng_state(), state)
    evaluated = [*found.batches[:2], None, *found.batches[2:]]
    with found.program.trainer() as trainer:
        for batch in evaluated:
            if batch is None:
                trainer.evaluate(found.batches)
            else:
                trainer.step(*batch)
        trainer.drain()
        model = trainer.model
    assert differing(tensors(model), tensors(train(found.program, found.batches))) == []


def test_a_non_persistent_buffer_is_trained_and_left_out_of_the_state_dict() -> None:
    found = compiled("small_net", 2)
    with found.program.trainer() as trainer:
        for inputs, labels in found.batches:
            trainer.step(inputs, labels)
        assert "centered.center" not in trainer.state_dict()
        assert trainer.model.get_buffer("centered.center").abs().sum() > 0


def test_a_written_program_starts_with_all_of_the_users_tensors(tmp_path: Path) -> None:
    """Its weights.safetensors holds non-persistent buffers as well."""
    model = small_net()
    with torch.no_grad():
        model.get_buffer("centered.center").fill_(3.0)
    program = compile_model(
        model, "4x8", num_stages=2, out=tmp_path / "net",
        source="benchmarks.exactness.main:small_net",
    )  # fmt: skip
    stages = load_stages(program.directory, program.plan)
    with stages.build_trainer() as trainer:
        assert differing(tensors(trainer.model), tensors(model)) == []


def test_weights_to_start_from_are_taken_by_the_original_names(tmp_path: Path) -> None:
    found = compiled("unet", 2)
    other = BUILDERS["unet"][0]()
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    with found.program.trainer(weights=tmp_path / "other.safetensors") as trainer:
        assert differing(trainer.state_dict(), other.state_dict()) == []
