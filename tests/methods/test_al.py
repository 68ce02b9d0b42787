"""Associated Learning: codes of the labels go forward, and back at inference."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from views import FIRST, LAST, NUM_CLASSES

from scpl_compile import compile_model
from scpl_compile.errors import MethodError
from scpl_compile.methods import make_method
from scpl_compile.methods.al import AssociatedLearning
from scpl_compile.runtime.association import Association
from scpl_compile.runtime.objectives import build_loss
from small_nets import compiled

NETS = {"cnn": 4, "lstm": 3, "transformer": 4, "unet": 3}


def test_a_code_goes_from_stage_to_stage() -> None:
    method = AssociatedLearning(latent=12, hidden=20)
    (first,), (last,) = method.losses(FIRST), method.losses(LAST)
    assert (first.code, first.gives) == ("", "label_code0")
    assert (last.code, last.gives) == ("label_code0", "")
    assert (first.options["is_first"], last.options["is_first"]) == (True, False)
    for loss in (first, last):
        made = build_loss(loss, NUM_CLASSES)
        assert isinstance(made, Association) and made.latent == 12
        assert sum(p.numel() for p in made.parameters()) == loss.num_parameters
    assert method.inference(3) == ("0F", "1F", "2F", "2B", "2D", "1D", "0D")


@pytest.mark.parametrize(
    ("preset", "is_text", "given", "activation"),
    [
        ("default", False, {}, "tanh"),
        ("default", True, {"activation": "sigmoid"}, "sigmoid"),
        ("paper", False, {}, "sigmoid"),
        ("paper", True, {}, "tanh"),
        ("paper", False, {"activation": "tanh"}, "tanh"),
    ],
)
def test_the_preset_paper_has_the_released_activations(
    preset: str, is_text: bool, given: dict[str, str], activation: str
) -> None:
    method = make_method("al", preset=preset, options=given, is_text=is_text)
    (loss,) = method.losses(FIRST)
    assert loss.options["activation"] == activation


def test_a_last_stage_without_the_feature_of_its_classifier_takes_the_logits() -> None:
    assert AssociatedLearning().losses(LAST)[0].reads == ("pool",)
    assert AssociatedLearning().losses(replace(LAST, feature=None))[0].reads == ("fc",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent": 0}, "option latent is 0; it must be a whole number, 1 or more"),
        *(
            ({name: value}, f"option {name} is .*; it must be a whole number, 1 or more, 1000000 ")
            for name in ("latent", "hidden")
            for value in (-1, 1.5, "abc", "nan", True, 3_000_000_000, 10**30)
        ),
        *(({"pooling": pooling}, "option pooling is") for pooling in ("big", "avg:0", 3)),
        ({"activation": 3}, "option activation is 3; it must be one of sigmoid, tanh"),
        ({"activation": "relu"}, "option activation is 'relu'; it must be one of sigmoid, tanh"),
        ({"temperature": 1.0}, "'al' has no option 'temperature'; its options are latent, "),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make_method("al", options=options).losses(FIRST)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NETS)
def test_the_classifier_is_declared_untrained_and_stays(name: str) -> None:
    found = compiled(name, NETS[name], method="al")
    plan = found.program.plan
    assert bool(plan.untrained) == (name != "lstm")  # whose last stage is the classifier
    assert set(plan.untrained) <= set(plan.stages[-1].parameters)
    before = {key: value.clone() for key, value in found.program.model.state_dict().items()}
    with found.program.trainer(lr=0.1) as trainer:
        for inputs, labels in found.batches:
            trainer.step(inputs, labels)
        after = trainer.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in plan.untrained)
    trained = set(plan.stages[-1].parameters) - set(plan.untrained)
    assert all(not torch.equal(after[key], before[key]) for key in trained)


@pytest.mark.parametrize("name", NETS)
def test_inference_goes_over_the_last_bridge_and_back_through_the_decoders(name: str) -> None:
    found = compiled(name, NETS[name], method="al")
    inputs, _ = found.batches[0]
    with found.program.trainer() as trainer:
        (scores,) = trainer.predict(inputs)
        heads = [stage.module.local_loss for stage in trainer._stages]
        read: list[torch.Tensor] = []
        hook = heads[-1].trunk.register_forward_hook(lambda m, args, y: read.append(y))
        trainer.predict(inputs)
        hook.remove()
    with torch.no_grad():
        code = heads[-1].bridge(read[0])
        for head in reversed(heads):
            code = head.decoder(code)
    torch.testing.assert_close(scores, code)
    assert scores.shape == (6, 4)


def test_the_losses_are_squared_differences_and_the_bridge_does_not_reach_the_encoder() -> None:
    torch.manual_seed(0)
    loss = Association(num_classes=3, in_shapes=((5,),), latent=4, hidden=6, is_first=True)
    x, labels = torch.randn(8, 5, requires_grad=True), torch.arange(8) % 3
    terms, code = loss(x, labels=labels)
    one_hot = F.one_hot(labels, 3).float()
    torch.testing.assert_close(code, loss.encoder(one_hot))
    torch.testing.assert_close(terms["bridge"], F.mse_loss(loss.bridge(x), code))
    torch.testing.assert_close(terms["autoencoder"], F.mse_loss(loss.decoder(code), one_hot))
    terms["bridge"].backward(retain_graph=True)
    assert x.grad is not None and all(p.grad is None for p in loss.encoder.parameters())
    x.grad = None
    terms["autoencoder"].backward()
    assert x.grad is None and all(p.grad is not None for p in loss.encoder.parameters())


def test_it_learns() -> None:
    """Two stages on classes that lie apart: the decoded scores find them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    x, labels = torch.randn(60, 6), torch.arange(60) % 3
    x[:, :3] += 3 * F.one_hot(labels, 3)
    program = compile_model(model, x, num_stages=2, method="al", options={"latent": 16})
    with program.trainer(lr=0.01) as trainer:
        for _ in range(150):
            trainer.step(x, labels)
        assert trainer.evaluate([(x, labels)]).accuracy > 0.9


class PerToken(nn.Module):
    """A classifier per token, and the mean over those that count."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return (tokens * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


def test_padding_does_not_count_at_inference_either() -> None:
    torch.manual_seed(0)
    program = compile_model(
        PerToken(), "x:float32:5x4,mask:int64:5<2", split_at=("a",), method="al", num_classes=3
    )
    assert program.plan.stages[-1].losses[0].mask == "mask"
    x, mask = torch.randn(6, 5, 4), torch.ones(6, 5, dtype=torch.int64)
    mask[:, 3:] = 0
    other = x.clone()
    other[:, 3:] += 1
    with program.trainer() as trainer:
        torch.testing.assert_close(trainer.predict((x, mask)), trainer.predict((other, mask)))
