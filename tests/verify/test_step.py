"""Steps of stages with losses of one's own: what changes while they train is no other loss."""

import re
from pathlib import Path

import pytest
from torch import nn

from own_files import EXITS, layers, own_file
from scpl_compile import Program, compile_model
from scpl_compile.errors import VerifyError
from scpl_compile.runtime.program import load_stages
from scpl_compile.sources import example_inputs
from scpl_compile.verify import verify

MEANS = "self.register_buffer('means', torch.zeros(num_classes, in_shapes[0][-1]))"
CHANGES = {
    "running means of the classes": {
        "init": MEANS,
        "body": "hot = F.one_hot(labels, len(self.means)).to(x.dtype)\n"
        "        with torch.no_grad():\n"
        "            self.means.mul_(0.9).add_(0.1 * hot.T @ x)",
        "terms": '{"own": F.cross_entropy(logits, labels) + F.mse_loss(x, hot @ self.means)}',
    },
    "the weights of a teacher": {
        "init": "self.teacher = nn.Linear(in_shapes[0][-1], num_classes).requires_grad_(False)",
        "body": "with torch.no_grad():\n"
        "            self.teacher.weight.lerp_(self.classifier.weight, 0.3)",
        "terms": '{"own": F.mse_loss(logits, self.teacher(x))}',
    },
    "the number of a step": {
        "init": "self.step = 0",
        "body": "self.step += 1",
        "terms": '{"own": self.step * F.cross_entropy(logits, labels)}',
    },
}


def compiled(method: str) -> Program:
    return compile_model(layers(), "8", num_stages=3, num_classes=3, method=method)


@pytest.mark.parametrize("name", CHANGES)
def test_a_loss_may_have_a_memory(name: str, tmp_path: Path) -> None:
    assert compiled(own_file(tmp_path, **CHANGES[name])).verification.is_verified


@pytest.mark.parametrize(
    "logits",
    [
        "self.classifier(F.dropout(x, 0.5, self.training))",
        "self.classifier(F.dropout(x, 0.5, True))",
        "self.classifier(self.norm(x))",
    ],
)
def test_an_exit_may_draw_randomness_or_keep_statistics(logits: str, tmp_path: Path) -> None:
    method = own_file(tmp_path, steps=EXITS, logits=logits, init="self.norm = nn.BatchNorm1d(8)")
    assert compiled(method).verification.is_verified


def edited(program: Program, old: str, new: str) -> None:
    """Verifies the program with one place of its stages.py changed."""
    path = program.directory / "stages.py"
    text, count = re.subn(old, new, path.read_text(), count=1)
    assert count, old
    path.write_text(text)
    model: nn.Module = program.model
    verify(
        program.plan,
        model,
        load_stages(program.directory, program.plan).STAGES,
        lambda batch_size: example_inputs(program.plan.inputs, batch_size),
        weights_sha256=program.verification.weights_sha256,
        select_output=lambda output: output,
    )


def test_an_exit_that_gives_other_logits_is_found(tmp_path: Path) -> None:
    program = compiled(own_file(tmp_path, steps=EXITS, logits="self.classifier(F.dropout(x, 0.5))"))
    with pytest.raises(VerifyError, match="its exit gives other logits than its local classifier"):
        edited(program, r"(return self.local_loss.logits\(\w+\))", r"\1 + 0.1")


def test_another_loss_with_a_memory_is_found(tmp_path: Path) -> None:
    program = compiled(own_file(tmp_path, **CHANGES["running means of the classes"]))
    with pytest.raises(VerifyError, match="its loss 'own' is another than the plan says"):
        edited(program, r"self.local_loss\((\w+), labels", r"self.local_loss(1.1 * \1, labels")
