"""Any number of labels per sample, from the compiler to the run of the emitted program.

The losses are compared with plain PyTorch, the schedules with each other, bit for bit.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.exactness.main import differences, overlaps, run
from scpl_compile import Program, compile_model
from scpl_compile.errors import DataError, MethodError, VerifyError
from scpl_compile.runtime.program import load_stages, read_plan
from scpl_compile.verify import verify
from small_nets import compiled

NUM_CLASSES = 4
TASK = {"task": "multi-label"}
METHODS = ("scpl", "early_exit", "dascpl", "bp")


def flags(size: int, seed: int = 0) -> Tensor:
    """Labels bool (size, 4): some samples have none, some share one."""
    labels = torch.rand(size, NUM_CLASSES, generator=torch.Generator().manual_seed(seed)) < 0.4
    labels[0] = False
    return labels


class Net(nn.Sequential):
    """(B, 6) to (B, 4), without anything that draws."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES)
        )


def program_of(method: str, **options: Any) -> Program:
    torch.manual_seed(0)
    return compile_model(
        Net(), "6", split_at=("1",), method=method, batch_size=8, threads_per_stage=1, **TASK,
        **options,
    )  # fmt: skip


# ---------------------------------------------------------------------- plain PyTorch


def contrast(z: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """SCPL's loss; positives of a sample are the others that share a label with it."""
    z = F.normalize(z)
    similarities = (z @ z.T / temperature).masked_fill(torch.eye(len(z)).bool(), -torch.inf)
    log_p = similarities - similarities.logsumexp(1, keepdim=True)
    is_positive = ((labels.float() @ labels.float().T) > 0) & ~torch.eye(len(z)).bool()
    return -torch.where(is_positive, log_p, 0).sum(1).div(is_positive.sum(1) + 1).mean()


def expected_gradients(
    program: Program, head: Any, x: Tensor, labels: Tensor
) -> dict[str, Tensor | None]:
    """By name, of the model alone: what the method says, written in PyTorch."""
    model, method = program.model, program.plan.method
    h = model[1](model[0](x))
    logits = model[4](model[3](model[2](h if method == "bp" else h.detach())))
    loss = F.binary_cross_entropy_with_logits(logits, labels.float())
    if method != "bp":
        pooled = head.trunk(h)
        local = head.classifier(pooled.detach() if method == "dascpl" else pooled)
        loss = loss + F.binary_cross_entropy_with_logits(local, labels.float())
        if method != "early_exit":
            loss = loss + contrast(head.projection(pooled), labels)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_has_the_gradients_of_plain_pytorch(method: str, dtype: torch.dtype) -> None:
    program = program_of(method)
    x, labels = torch.randn(8, 6), flags(8)
    with program.trainer(optimizer="sgd", lr=1.0, seed=0) as trainer:
        head = getattr(trainer._stages[0].module, "local_loss", None)
        expected = expected_gradients(program, head, x, labels)
        before = {name: value.clone() for name, value in program.model.state_dict().items()}
        trainer.step(x, labels.to(dtype))
        after = trainer.state_dict()
    for name, gradient in expected.items():
        assert gradient is not None and gradient.abs().max() > 0
        torch.testing.assert_close(before[name] - after[name], gradient, rtol=1e-4, atol=1e-6)


def test_two_views_have_the_labels_of_their_sample() -> None:
    program = program_of("scpl")
    x, labels = torch.randn(12, 6), flags(6)
    states = []
    for given in (labels, torch.cat([labels, labels])):
        with program.trainer(optimizer="sgd", lr=1.0, seed=0) as trainer:
            trainer.step(x, given)
            states.append(trainer.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_evaluate_and_predict_are_those_of_the_model() -> None:
    program = program_of("early_exit")
    x, labels = torch.randn(20, 6), flags(20)
    with program.trainer(seed=0) as trainer:
        first, last = trainer.predict(x)
        found = trainer.evaluate([(x[:13], labels[:13].long()), (x[13:], labels[13:].float())])
    torch.testing.assert_close(last, program.model.eval()(x).detach())
    for i, logits in enumerate((first, last)):
        is_right = (logits > 0) == labels
        assert found.accuracies[i] == pytest.approx(float(is_right.double().mean()))
        assert found.exact_matches[i] == pytest.approx(float(is_right.all(1).double().mean()))
        expected = F.binary_cross_entropy_with_logits(logits, labels.float())
        assert found.losses[i] == pytest.approx(float(expected), rel=1e-5)


# ---------------------------------------------------------------------- schedules


@pytest.mark.parametrize("method", ["scpl", "early_exit", "dascpl"])
@pytest.mark.parametrize("name", ["small_net", "transformer", "unet"])
def test_the_schedules_leave_the_same_bits(name: str, method: str) -> None:
    found = compiled(name, 3, method=method, **TASK)
    batches = [(inputs, flags(6, seed)) for seed, (inputs, _) in enumerate(4 * found.batches)]
    expected = run(found.program, batches, "sequential")
    for schedule in ("stream", "in_step"):
        outcome = run(found.program, batches, schedule, jitter=1)
        assert differences(outcome, expected) == []
        assert schedule == "in_step" or overlaps(outcome.events)
    others = [(inputs, ~labels) for inputs, labels in batches]
    assert differences(run(found.program, others, "sequential"), expected) != []


# ---------------------------------------------------------------------- the emitted program


def test_the_program_says_what_it_computes_and_verify_looks() -> None:
    program = program_of("scpl")
    text = (program.directory / "stages.py").read_text()
    assert "method scpl, task multi-label." in text.splitlines()[1]
    assert '{"classifier": binary_cross_entropy(' in text
    path = program.directory / "stages.py"
    path.write_text(text.replace("binary_cross_entropy", "cross_entropy"))
    stages = load_stages(program.directory, program.plan).STAGES
    with pytest.raises(VerifyError, match="training step of stage 1"):
        verify(
            program.plan, program.model, stages, lambda size: (torch.randn(size, 6),),
            weights_sha256="", select_output=lambda output: output,
        )  # fmt: skip


@pytest.fixture(scope="module")
def several(net_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of `net_file` with exits; 1x8x8 to 10."""
    out = tmp_path_factory.mktemp("several") / "net"
    compile_model(
        f"{net_file}:build_model", "1x8x8", num_stages=2, method="early_exit", out=out, **TASK
    )
    return out


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose label k says that quarter k is bright; six labels more that nothing has."""
    random = np.random.default_rng(0)
    labels = random.random((600, 10)) < 0.4
    labels[:, 4:] = False
    bright = labels[:, :4].reshape(600, 1, 2, 2).repeat(4, axis=2).repeat(4, axis=3)
    images = random.normal(size=(600, 1, 8, 8)) * 0.5 + bright
    path = tmp_path_factory.mktemp("rows") / "rows.npz"
    np.savez(path, x=images.astype(np.float32), y=labels.astype(np.int64))
    return path


def test_the_program_learns_and_is_evaluated(
    several: Path, rows: Path, train: Callable[..., Any], scpl: Callable[..., Any]
) -> None:
    options = ("--data", f"npz:{rows}", "--batch-size", 30, "--lr", "0.01", "--epochs", 6)
    whole = train(several, *options, "--run-dir", "whole", "--json")
    assert whole.code == 0, whole.stderr
    assert whole.json["accuracy"] > 0.95 and 0 < whole.json["exact_match"] < whole.json["accuracy"]
    told = f"{100 * whole.json['accuracy']:.2f} % of the labels ("
    assert f"{told}{100 * whole.json['exact_match']:.2f} % exact matches) on the te" in whole.stderr
    run = ("evaluate", several, "--data", f"npz:{rows}", "--run-dir", "whole", "--json")
    result = scpl(*run)
    assert json.loads(result.stdout)["exact_match"] == whole.json["exact_match"]
    assert f"{told}{100 * whole.json['exact_match']:.2f} % exact matches) of 120" in result.stderr
    early = json.loads(scpl(*run, "--exit", "confidence:0.9").stdout)
    assert len(early["exit_shares"]) == 2 and early["accuracy"] > 0.95


def test_data_of_one_label_is_refused(several: Path, train: Callable[..., Any]) -> None:
    found = train(several, "--data", "digits", "--run-dir", "none")
    assert found.code == 1
    assert "digits has one label per sample; the program was compiled with --task m" in found.error
    assert not (several / "none").exists()


def test_from_the_command_line(net_file: Path, scpl: Callable[..., Any], tmp_path: Path) -> None:
    build = (f"{net_file}:build_model", "--input", "1x8x8", "--task", "multi-label")
    result = scpl("compile", *build, "-o", tmp_path / "net", "--json")
    assert result.exit_code == 0, result.stderr
    assert "build_model: scpl, 2 stages, multi-label" in " ".join(result.stderr.split())
    assert json.loads(result.stdout)["task"] == read_plan(tmp_path / "net").task == "multi-label"
    result = scpl("plan", *build, "--method", "al")
    assert result.exit_code == 1
    assert "error: method 'al' takes one label per sample, no task 'multi-label'" in result.stderr
    assert scpl("plan", *build[:-1], "tokens").exit_code == 2


# ---------------------------------------------------------------------- what is refused


OWN = f"{Path(__file__).with_name('own_method.py')}:Cosine"


@pytest.mark.parametrize("method", ["al", "predsim", "deinforeg", OWN])
def test_methods_for_one_label_say_so(method: str) -> None:
    with pytest.raises(MethodError, match=r"takes one label per sample.*scpl, early_exit, dascpl"):
        program_of(method)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(6, dtype=torch.int64), r"\(B, 4\) zeros and ones .*not torch\.int64 \(6,\)"),
        (torch.zeros(6, 3), r"\(B, 4\) zeros and ones .*not torch\.float32 \(6, 3\)"),
        (torch.full((6, 4), 0.5), r"label 0 of sample 0 is 0\.5"),
        (torch.zeros(5, 4), "6 samples have 5 labels"),
    ],
)
def test_bad_labels_are_refused_before_anything_runs(labels: Tensor, message: str) -> None:
    with program_of("scpl").trainer() as trainer:
        with pytest.raises(DataError, match=message):
            trainer.step(torch.randn(6, 6), labels)
        with pytest.raises(DataError, match=message):
            trainer.evaluate([(torch.randn(6, 6), labels)])
        assert trainer.num_steps == 0
        with pytest.warns(UserWarning, match="all samples of a batch have the same labels"):
            trainer.step(torch.randn(6, 6), torch.zeros(6, 4))
        trainer.drain()


@pytest.mark.parametrize("labels", [torch.zeros(6, 4).long(), torch.zeros(6, 9).long()])
def test_a_program_of_one_label_says_what_is_supported(labels: Tensor) -> None:
    """Several labels, or one per token."""
    program = compiled("cnn", 2).program
    message = r"int64 \(B,\), not .*; supported .* --task multi-label .*; not labels per token"
    with program.trainer() as trainer:
        x = torch.randn(6, 3, 8, 8)
        with pytest.raises(DataError, match=message):
            trainer.step(x, labels)
        with pytest.raises(DataError, match=message):
            trainer.evaluate([(x, labels)])
