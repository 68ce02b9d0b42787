"""Edit an emitted stages.py, and verify must find it.

Every mutation is one edit of the text of a golden program, such as a mistake of the emitter or of
a person who changes the file would be.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from golden_models import GOLDEN, Compile
from scpl_compile.api import Program
from scpl_compile.errors import ScplError, VerifyError
from scpl_compile.runtime.loading import load_module
from scpl_compile.runtime.program import Verification
from scpl_compile.sources import example_inputs
from scpl_compile.verify import verify


def only_tensor(output: object) -> Tensor:
    assert isinstance(output, Tensor)
    return output


def verified(program: Program, text: str, folder: Path) -> Verification:
    """What verify finds about stages with this text."""
    path = folder / "stages.py"
    path.write_text(text)
    return verify(
        program.plan,
        program.model,
        load_module(path, "mutant").STAGES,
        lambda batch_size: example_inputs(program.plan.inputs, batch_size),
        weights_sha256="",
        select_output=only_tensor,
    )


def text_of(program: Program) -> str:
    return (program.directory / "stages.py").read_text()


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """`old` becomes `new` in the text of a program; `message`: a part of what verify says."""

    program: str
    what: str
    old: str
    new: str
    message: str

    def apply(self, text: str) -> str:
        """The edited text; `old` stands there exactly once."""
        assert text.count(self.old) == 1, f"{self.old!r} is there {text.count(self.old)} times"
        return text.replace(self.old, self.new)

    def __str__(self) -> str:
        return f"{self.program}: {self.what}"


def mutations(program: str, *rows: tuple[str, str, str, str]) -> list[Mutation]:
    return [
        Mutation(program=program, what=what, old=old, new=new, message=message)
        for what, old, new, message in rows
    ]


OUTPUT = "output differs from the model's"

MUTATIONS = [
    *mutations(
        "nested_cnn",
        (
            "another variable is passed",
            "stem + layers_0_norm2",
            "stem + layers_0_conv2",
            OUTPUT + r".*first module.*'layers\.1\.conv1' \(Conv2d",
        ),
        (
            "a module is skipped",
            "layers_0_norm1 = self.layers[0].norm1(layers_0_conv1)",
            "layers_0_norm1 = layers_0_conv1",
            "eval mode",
        ),
        (
            "a module is called twice",
            "layers_0_conv1 = self.layers[0].conv1(stem)",
            "layers_0_conv1 = self.layers[0].conv1(self.layers[0].conv1(stem))",
            OUTPUT + r".*first module.*'layers\.0\.norm1' \(BatchNorm2d, 3x6x8x8\)",
        ),
        (
            "another module of the model is used",
            "layers_0_norm2 = self.layers[0].norm2(layers_0_conv2)",
            "layers_0_norm2 = layers_0_conv2 + 0 * self.layers[0].norm2(layers_0_conv2)",
            OUTPUT,
        ),
        (
            "a module of another stage is taken",
            'take(self, model, "layers.1", "fc")',
            'take(self, model, "layers.1", "fc", "stem")',
            "stage 2: only the emitted stage has the parameter 'stem.bias'",
        ),
        (
            "a module of the stage is left out",
            'take(self, model, "stem", "layers.0.conv1", "layers.0.norm1")',
            'take(self, model, "stem", "layers.0.conv1")',
            "stage 0: only the plan has the parameter 'layers.0.norm1.",
        ),
        (
            "a path does not exist",
            'take(self, model, "layers.1", "fc")',
            'take(self, model, "layers.7", "fc")',
            "the model has no 'layers.7'",
        ),
        (
            "a module is not there when it is called",
            "layers_1 = self.layers[1](relu)",
            "layers_1 = self.layers[7](relu)",
            "stage 2 fails: AttributeError",
        ),
        (
            "a constant is another",
            "mean = layers_1.mean((2, 3))",
            "mean = layers_1.mean((2, 3)) * 1.01",
            OUTPUT,
        ),
        (
            "a gradient is detached",
            "self.layers[0].conv1(stem)",
            "self.layers[0].conv1(stem.detach())",
            "the gradient of 'stem.",
        ),
        (
            "a gradient is detached between stages",
            "return stem, layers_0_norm1",
            "return stem.detach(), layers_0_norm1",
            "the gradient of 'stem.",
        ),
        (
            "a gradient is scaled",
            "return torch.relu(add)",
            "return torch.relu(add * 2 - add.detach())",
            "the gradient of ",
        ),
        (
            "the outputs are in another order",
            "return stem, layers_0_norm1",
            "return layers_0_norm1, stem",
            OUTPUT,
        ),
        (
            "an output is missing",
            "return stem, layers_0_norm1",
            "return layers_0_norm1",
            "stage 0 gives 1 values",
        ),
        ("an output is no tensor", "return torch.relu(add)", "return [add.shape]", "gives 1 val"),
        ("a stage returns nothing", "return torch.relu(add)", "torch.relu(add)", "stage 1 fails"),
        (
            "a tensor is sent without a cut",
            "return (cut(stem), cut(layers_0_norm1)), losses",
            "return (cut(stem), layers_0_norm1), losses",
            "the gradient of 'layers_0_norm1' crosses the cut",
        ),
        (
            "tensors are sent in another order",
            "return (cut(stem), cut(layers_0_norm1)), losses",
            "return (cut(layers_0_norm1), cut(stem)), losses",
            "it sends another 'stem'",
        ),
        (
            "a tensor is not sent",
            "return (cut(stem), cut(layers_0_norm1)), losses",
            "return (cut(stem),), losses",
            "it sends 1 tensors",
        ),
        (
            "forward takes other names than training_step",
            "relu = self(stem, layers_0_norm1)",
            "relu = self(layers_0_norm1, stem)",
            "it sends another 'relu'|its loss 'contrast' is another",
        ),
        (
            "a clone before an in-place operation is dropped",
            "layers_0_norm1 = layers_0_norm1.clone()  # written in place below",
            "pass",
            "it writes into a tensor that it received",
        ),
        (
            "a local loss is missing",
            "losses = self.local_loss(stem, layers_0_norm1, labels=labels)",
            "losses = {}",
            "only the plan has the loss 'contrast'",
        ),
        (
            "a loss too many",
            'losses = {"classifier": cross_entropy(fc, labels)}',
            'losses = {"classifier": cross_entropy(fc, labels), "other": fc.mean()}',
            "only the emitted stage has the loss 'other'",
        ),
        (
            "a loss reads another tensor",
            "losses = self.local_loss(relu, labels=labels)",
            "losses = self.local_loss(stem, labels=labels)",
            "its loss 'contrast' is another",
        ),
        (
            "a loss reads its tensors in another order",
            "self.local_loss(stem, layers_0_norm1, labels=labels)",
            "self.local_loss(layers_0_norm1, stem, labels=labels)",
            "its loss 'contrast' is another",
        ),
        (
            "a loss reads a detached tensor",
            "losses = self.local_loss(relu, labels=labels)",
            "losses = self.local_loss(relu.detach(), labels=labels)",
            "gets a gradient only in the plan",
        ),
        (
            "one of the tensors of a loss is detached",
            "self.local_loss(stem, layers_0_norm1, labels=labels)",
            "self.local_loss(stem.detach(), layers_0_norm1, labels=labels)",
            "by its losses: the gradient of 'stem.",
        ),
        (
            "a loss reads other labels",
            "losses = self.local_loss(relu, labels=labels)",
            "losses = self.local_loss(relu, labels=labels.flip(0))",
            "its loss 'contrast' is another",
        ),
        (
            "the classifier reads another tensor",
            "cross_entropy(fc, labels)",
            "cross_entropy(fc * 2, labels)",
            "its loss 'classifier' is another",
        ),
        (
            "forward runs twice",
            "fc = self(relu)",
            "self(relu)\n        fc = self(relu)",
            "it leaves other buffers",
        ),
        (
            "the last stage is forgotten",
            "STAGES = (Stage0, Stage1, Stage2)",
            "STAGES = (Stage0, Stage1)",
            "there are 2 stages, the plan has 3",
        ),
        (
            "stages change places",
            "STAGES = (Stage0, Stage1, Stage2)",
            "STAGES = (Stage1, Stage0, Stage2)",
            "stage 0: only",
        ),
        ("a file that is no Python", "STAGES = (", "STAGES = ((", "importing .* failed"),
    ),
    *mutations(
        "unet",
        (
            "the arguments of a cat are swapped",
            "[middle, relu], dim=1",
            "[relu, middle], dim=1",
            OUTPUT,
        ),
        ("a size is frozen", "getitem = getattr_1[0]", "getitem = 3", "stage 2 fails"),
        ("a relayed tensor is changed", "return relu, middle", "return relu * 0.9, middle", OUTPUT),
        (
            "another tensor is relayed",
            "return (cut(relu), cut(middle)), losses",
            "return (cut(middle), cut(middle)), losses",
            "it sends another 'relu'",
        ),
        (
            "a loss reads what the stage received",
            "losses = self.local_loss(middle, labels=labels)",
            "losses = self.local_loss(relu, labels=labels)",
            "its loss 'contrast' is another",
        ),
        (
            "a stop where the plan has none",
            "middle = self.middle(relu)",
            "middle = self.middle(relu).detach()",
            "gets a gradient only in the model",
        ),
    ),
    *mutations(
        "lstm",
        ("swapped states", "(getitem_2, getitem_3))", "(getitem_3, getitem_2))", OUTPUT),
        ("another item of a tuple", "getitem_2 = getitem_1[0]", "getitem_2 = getitem_1[1]", OUTPUT),
        (
            "a mask is sent as it was received",
            "cut(mask, clone=True)",
            "cut(mask)",
            "'mask' crosses the cut as a view of its owner's memory",
        ),
        (
            "a tensor is sent as it lies",
            "cut(getitem), cut(getitem_2)",
            "getitem.detach(), cut(getitem_2)",
            "'getitem' crosses the cut and is not contiguous",
        ),
        (
            "a loss goes without its mask",
            "labels=labels, mask=mask)",
            "labels=labels)",
            "its loss 'contrast' is another",
        ),
        ("a mask is ignored", "mask.unsqueeze(-1)", "(mask * 0 + 1).unsqueeze(-1)", OUTPUT),
        (
            "a batch dimension is another",
            "batch_dims=(0, 1, 1)",
            "batch_dims=(0, 0, 0)",
            "the training step of stage 0",
        ),
        ("a head is wider", "out=64", "out=65", "its local_loss has other weights"),
        ("a temperature is another", "temperature=0.1", "temperature=0.2", "loss 'contrast' is"),
        ("a weight is another", "cross_entropy=1.0", "cross_entropy=0.5", "loss 'cross_entropy'"),
        ("a term is missing", "contrast=1.0", "contrast=0.0", "other weights than the plan says"),
        (
            "a head is missing",
            "self.local_loss = LocalLoss(",
            "self.another_loss = LocalLoss(",
            "stage 0: only the emitted stage has the parameter",
        ),
    ),
    *mutations(
        "transformer",
        ("a stop is missing", "self.fc(self.stop(truediv))", "self.fc(truediv)", "elsewhere than"),
        (
            "a stop is behind the classifier",
            "self.fc(self.stop(truediv))",
            "self.stop(self.fc(truediv))",
            "elsewhere than at the feature 'truediv'",
        ),
        (
            "a stop is before the feature",
            "mul = blocks_2 * to",
            "mul = self.stop(blocks_2) * to",
            "elsewhere than at the feature 'truediv'",
        ),
        (
            "a stop stops nothing",
            "self.stop = StopGradient()",
            "self.stop = nn.Identity()",
            "it stops gradients 0 times, the plan 1 times",
        ),
        (
            "a second stop",
            "self.stop = StopGradient()",
            "self.stop = StopGradient()\n        self.other = StopGradient()",
            "it stops gradients 2 times, the plan 1 times",
        ),
        (
            "the loss of the feature reads another",
            "return truediv, fc",
            "return sum_1, fc",
            "elsewhere than at the feature 'truediv'",
        ),
        (
            "the classifier's loss is missing",
            'losses |= {"classifier": cross_entropy(fc, labels)}',
            "pass",
            "only the plan has the loss 'classifier'",
        ),
        ("a mask is turned round", "eq = mask == 0", "eq = mask != 0", OUTPUT),
        (
            "a gradient is stopped and the values stay",
            "blocks_1 = self.blocks[1](blocks_0, eq)",
            "blocks_1 = self.blocks[1](blocks_0.detach(), eq)",
            "gets a gradient only in the model",
        ),
    ),
    *mutations(
        "class_token",
        ("a parameter is detached", "self.token.expand", "self.token.detach().expand", "'token'"),
        ("a parameter is another", "self.token.expand", "(self.token * 0).expand", OUTPUT),
        (
            "an exit reads its tensors in another order",
            "self.local_loss.logits(cat, blocks_0)",
            "self.local_loss.logits(blocks_0, cat)",
            "its exit gives other logits",
        ),
        ("an exit is missing", "def exit(self, cat", "def leave(self, cat", "no attribute 'exit'"),
        (
            "the arguments of a subtraction are swapped",
            "add = mean + cat",
            "add = cat - mean",
            OUTPUT,
        ),
    ),
    *mutations(
        "late_input",
        (
            "a gradient does not cross back",
            "return (context, first, tanh), losses",
            "return (context, first.detach(), tanh), losses",
            "the gradient of 'first.",
        ),
        (
            "all gradients stop at the cut",
            "return (context, first, tanh), losses",
            "return tuple(v.detach() for v in (context, first, tanh)), losses",
            "gets a gradient only in the plan",
        ),
        (
            "a received tensor is detached",
            "fc = self(context, first, tanh)",
            "fc = self(context, first, tanh.detach())",
            "'input tanh' gets a gradient only in the plan",
        ),
        (
            "a clone is dropped",
            "first = first.clone()  # written in place below",
            "pass",
            "fails: RuntimeError",
        ),
        ("an in-place operation is dropped", "first.clamp_(-1, 1)", "first.clamp(-1, 1)", OUTPUT),
        ("a loss is missing", '{"classifier": cross_entropy(fc, labels)}', "{}", "'classifier'"),
        ("a raw input is another", "self.gate(context)", "self.gate(context.flip(0))", OUTPUT),
        (
            "a stage has a loss in backpropagation",
            "losses: dict[str, Tensor] = {}",
            'losses: dict[str, Tensor] = {"early": first.mean()}',
            "only the emitted stage has the loss 'early'",
        ),
    ),
    *mutations(
        "paper_cnn",
        (
            "the feature is taken before pooling",
            "return mean, fc",
            "return layers_1.amax((2, 3)), fc",
            "elsewhere than at the feature 'mean'",
        ),
        (
            "a head reads features of another size",
            "in_shapes=((6, 8, 8),)",
            "in_shapes=((6, 4, 4),)",
            "the training step of stage 0: it fails: RuntimeError",
        ),
    ),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_verify_finds_the_mutation(mutation: Mutation, golden: Compile, tmp_path: Path) -> None:
    program = golden(mutation.program)
    text = mutation.apply(text_of(program))
    with pytest.raises(ScplError, match=mutation.message):
        verified(program, text, tmp_path)


@pytest.mark.parametrize("name", [name for name in GOLDEN if ":" not in GOLDEN[name].model])
def test_verify_finds_nothing_in_the_text_as_it_is(
    name: str, golden: Compile, tmp_path: Path
) -> None:
    program = golden(name)
    found = verified(program, text_of(program), tmp_path)
    assert found.is_verified
    assert found.checks == program.verification.checks
    assert found.random_stages == program.verification.random_stages


def test_mutations_are_different() -> None:
    assert len({str(mutation) for mutation in MUTATIONS}) == len(MUTATIONS)


def test_a_mutated_program_leaves_the_model_as_it_was(golden: Compile, tmp_path: Path) -> None:
    """Also where verify stops in the middle."""
    program = golden("transformer")
    before = {name: value.clone() for name, value in program.model.state_dict().items()}
    modes = [module.training for module in program.model.modules()]
    state = torch.get_rng_state()
    text = text_of(program).replace("self.fc(self.stop(truediv))", "self.fc(truediv)")
    with pytest.raises(VerifyError):
        verified(program, text, tmp_path)
    after = program.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modes == [module.training for module in program.model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in program.model.parameters())
