"""What holds of every method that stops gradients at the cuts, one's own included.

Gradient isolation and coverage have suites of their own.
"""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.exactness.main import CASES, Batches, Outcome, differences, run
from scpl_compile import Program, compile_model
from scpl_compile.errors import LossError, VerifyError
from scpl_compile.runtime import checkpoint
from small_nets import DECOUPLED, OWN_METHOD, compiled

STEPS = 6


@cache
def small(method: str) -> tuple[Program, Batches, Outcome]:
    """The small net in three stages, its batches (the last of one sample), one stage at a time."""
    case = CASES["small_net"]
    program = case.compile(3, **DECOUPLED[method])
    batches = case.batches(program, [case.batch_size] * (STEPS - 1) + [1])
    return program, batches, run(program, batches, "sequential")


@pytest.mark.parametrize("method", DECOUPLED)
@pytest.mark.parametrize("schedule", ["stream", "in_step"])
def test_the_schedules_leave_the_same_bits(method: str, schedule: str) -> None:
    program, batches, expected = small(method)
    for repeat in range(3):
        assert differences(run(program, batches, schedule, jitter=repeat), expected) == []


@pytest.mark.parametrize("method", DECOUPLED)
def test_a_checkpoint_goes_on_as_if_uninterrupted(method: str, tmp_path: Path) -> None:
    program, batches, expected = small(method)
    with program.trainer(schedule="stream") as trainer:
        for inputs, labels in batches[:3]:
            trainer.step(inputs, labels)
        trainer.save(tmp_path, {})
        trainer.wait_saved()

    def resumed(**options: Any) -> Any:
        trainer = program.trainer(seed=5, **options)
        trainer.load(checkpoint.latest(tmp_path))
        return trainer

    found = run(program, batches[3:], "stream", trainer=resumed)
    assert found.states == expected.states
    assert found.losses == [rows[3:] for rows in expected.losses]


@pytest.mark.parametrize("method", DECOUPLED)
@pytest.mark.parametrize("name", ["cnn", "lstm", "unet"])
def test_exits_are_the_stages_classifiers_and_the_last_the_models_own(
    name: str, method: str
) -> None:
    program = compiled(name, 3, **DECOUPLED[method]).program
    inputs = compiled(name, 3, **DECOUPLED[method]).batches[0][0]
    with program.trainer() as trainer:
        exits = trainer.predict(inputs)
        with torch.no_grad():
            expected = trainer.model.eval()(*inputs)
    has_exits = method.split()[0] in ("early_exit", "deinforeg", "dascpl")
    assert len(exits) == (3 if has_exits else 1)
    assert {tuple(logits.shape) for logits in exits} == {(6, 4)}
    if method != "al":  # whose own logits come back through the decoders
        torch.testing.assert_close(exits[-1], expected)


@pytest.mark.parametrize("method", ["predsim", "deinforeg", "dascpl", OWN_METHOD])
def test_an_emitted_program_trains_and_is_evaluated(
    scpl: Callable[..., Any], train: Callable[..., Any], net_file: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "out"
    made = scpl("compile", f"{net_file}:build_model", "--input", "1x8x8", "--stages", 3,
                "--method", method, "-o", out)  # fmt: skip
    assert made.exit_code == 0, made.output
    ran = train(out, "--data", "random:48", "--batch-size", 16, "--epochs", 1)
    assert ran.code == 0, ran.stderr
    trained = json.loads((out / "run" / "result.json").read_text())
    found = scpl("evaluate", out, "--data", "random:48", "--json")
    assert found.exit_code == 0, found.output
    evaluated = json.loads(found.stdout.splitlines()[-1])
    for key in ("accuracy", "exit_accuracies"):
        assert evaluated.get(key) == trained.get(key)


def test_weights_of_another_plans_run_are_not_taken_for_its_own(
    scpl: Callable[..., Any], train: Callable[..., Any], net_file: Path, tmp_path: Path
) -> None:
    """As after `scpl compile --force` with another method: run/ stays where it is."""
    out = tmp_path / "out"
    make = ("compile", f"{net_file}:build_model", "--input", "1x8x8", "--stages", 3, "-o", out)
    scpl(*make, "--method", "al", "--no-verify")
    ran = train(out, "--data", "random:48", "--steps", 1)
    assert "method 'al' leaves the model's own classifier untrained (" in ran.stderr
    scpl(*make, "--no-verify", "--force")
    told = r"final\.safetensors is of a run of another plan \(\w{12}\), which left the model's own"
    refused = scpl("evaluate", out, "--data", "random:48")
    assert refused.exit_code == 1
    assert re.search(told + r".*; train again, or name the file with --weights", refused.stderr)
    named = ("--weights", out / "run" / "final.safetensors")
    taken = scpl("evaluate", out, "--data", "random:48", *named)
    assert taken.exit_code == 0 and re.search(told, taken.stderr)


def test_exits_are_evaluated_only_where_their_weights_are(
    scpl: Callable[..., Any], train: Callable[..., Any], net_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    scpl("compile", f"{net_file}:build_model", "--input", "1x8x8", "--stages", 3,
         "--method", "early_exit", "-o", out, "--no-verify")  # fmt: skip
    assert train(out, "--data", "random:48", "--epochs", 2).code == 0
    arguments = ("evaluate", out, "--data", "random:48", "--json", "--split", "train")
    with_rule = (*arguments, "--exit", "confidence:0.3")
    found = json.loads(scpl(*with_rule).stdout.splitlines()[-1])
    assert sum(found["exit_shares"]) == pytest.approx(1) and found["compute"] > 0
    assert scpl(*arguments, "--exit", "sure").exit_code == 1
    assert train(out, "--data", "random:48", "--steps", 1, "--run-dir", "short").code == 0
    kept = shutil.copytree(out / "run", tmp_path / "kept")
    for name in ("exit-0", "exit-1"):  # as if the run had ended between these and its weights
        shutil.copy(out / "short" / f"{name}.safetensors", out / "run")
    assert re.search(
        r"exit-0\.safetensors was written after 1 steps and .* after 2,", scpl(*arguments).stderr
    )
    shutil.copytree(kept, out / "run", dirs_exist_ok=True)
    assert scpl(*with_rule).exit_code == 0
    for name in ("exit-0", "exit-1"):
        (out / "run" / f"{name}.safetensors").unlink()
    assert "exit_accuracies" not in json.loads(scpl(*arguments).stdout.splitlines()[-1])
    refused = scpl(*with_rule)
    assert refused.exit_code == 1
    assert (
        "exit-0.safetensors is missing, the weights of a head that inference needs"
        in refused.stderr
    )


NOISY = """
import torch
import torch.nn.functional as F
from torch import nn
from scpl_compile.methods import Method, cross_entropy_loss, module_loss

class Noisy(nn.Module):
    def __init__(self, *, num_classes, in_shapes):
        super().__init__()
        self.classifier = nn.Linear(in_shapes[0][-1], num_classes)

    def forward(self, *features, labels, mask=None):
        x = F.dropout(features[0], 0.5, True)
        return {TERM: F.cross_entropy(self.classifier(x), labels)}

class Mine(Method):
    name = "mine"

    def losses(self, view):
        own = () if view.is_last and not CLASH else (
            module_loss(Noisy, (view.output,) if view.is_last else view.sends, view),)
        return own + ((cross_entropy_loss(view),) if view.is_last else ())
"""


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def test_a_loss_that_draws_randomness_draws_that_of_its_stage(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(NOISY.replace("TERM", '"own"').replace("CLASH", "False"))
    program = compile_model(layers(), "8", num_stages=2, method=f"{path}:Mine")
    assert program.verification.random_stages == (0,)
    batches = [((torch.randn(6, 8),), torch.arange(6) % 3) for _ in range(STEPS)]
    expected = run(program, batches, "sequential")
    for repeat in range(3):
        assert differences(run(program, batches, "stream", jitter=repeat), expected) == []


SCALED = """
import torch
import torch.nn.functional as F
from torch import nn
from scpl_compile.methods import Method, cross_entropy_loss, module_loss

class Scaled(nn.Module):
    def __init__(self, *, num_classes, in_shapes):
        super().__init__()
        self.classifier = nn.Linear(in_shapes[0][-1], num_classes)
        self.scale = SCALE

    def forward(self, x, *, labels, mask=None):
        return {"own": self.scale * F.cross_entropy(self.classifier(x), labels)[WHICH]}

class Mine(Method):
    name = "mine"

    def losses(self, view):
        return (cross_entropy_loss(view),) if view.is_last else (
            module_loss(Scaled, view.sends, view),)
"""


@pytest.mark.parametrize("scale", ["float(torch.linspace(0, 1, 5)[3])", "torch.tensor(0.75)"])
def test_a_loss_may_be_made_of_values_of_its_own(tmp_path: Path, scale: str) -> None:
    """Computed with in its constructor, or kept as a tensor that is in no state_dict."""
    path = tmp_path / "mine.py"
    path.write_text(SCALED.replace("SCALE", scale).replace("WHICH", "..."))
    program = compile_model(layers(), "8", num_stages=2, method=f"{path}:Mine")
    assert program.verification.is_verified
    x, labels = torch.randn(6, 8), torch.arange(6) % 3
    with program.trainer() as trainer:
        stage = trainer._stages[0].module
        with torch.no_grad():
            logits = stage.local_loss.classifier(stage(x))
        trainer.step(x, labels)
        trainer.drain()
        expected = 0.75 * float(torch.nn.functional.cross_entropy(logits, labels))
        assert trainer.losses()[0] == {"own": pytest.approx(expected)}


def test_a_loss_that_looks_at_data_is_told_and_not_a_model_without_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SCALED.replace("SCALE", "1.0").replace("WHICH", "(labels > 0)[0]"))
    with pytest.raises(LossError, match="^loss Scaled looks at the values of its tensors"):
        compile_model(layers(), "8", num_stages=2, method=f"{path}:Mine")


def test_two_terms_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(NOISY.replace("TERM", '"classifier"').replace("CLASH", "True"))
    with pytest.raises(VerifyError, match="two of its losses give a term of the name 'classifier'"):
        compile_model(layers(), "8", num_stages=2, method=f"{path}:Mine")
