"""The steps of inference are checked when a program is compiled, and so are its exits."""

from pathlib import Path

import pytest
import torch
from torch import nn
from views import FIRST, LAST, NUM_CLASSES, TEXT

from scpl_compile import compile_model
from scpl_compile.errors import MethodError
from scpl_compile.ir import LocalLoss
from scpl_compile.methods import METHODS, make_method
from scpl_compile.methods.base import Method, losses_of
from scpl_compile.methods.steps import inference_of


class Says(Method):
    """Gives these steps, whatever the number of stages."""

    name = "says"

    def __init__(self, steps: object) -> None:
        self.steps = steps

    def losses(self, view: object) -> tuple[LocalLoss, ...]:
        return ()

    def inference(self, num_stages: int) -> tuple[str, ...]:
        if isinstance(self.steps, Exception):
            raise self.steps
        return self.steps  # type: ignore[return-value]


def losses(name: str, num_stages: int = 3) -> list[tuple[LocalLoss, ...]]:
    """Of the stages of a method."""
    method = make_method(name)
    return [losses_of(method, view) for view in ((num_stages - 1) * [FIRST] + [LAST])]


def steps(given: object, name: str = "early_exit", num_stages: int = 3) -> tuple[str, ...]:
    return inference_of(Says(given), losses(name, num_stages), NUM_CLASSES, 8)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_those_of_every_method_can_run(name: str, num_stages: int) -> None:
    method = make_method(name)
    found = inference_of(method, losses(name, num_stages), NUM_CLASSES, 8)
    assert found == method.inference(num_stages)


@pytest.mark.parametrize("given", [["0F", "1F", "2F"], ("0F", "1F", "1X", "2F")])
def test_a_stage_has_its_exit_behind_it_or_none(given: object) -> None:
    assert steps(given) == tuple(given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"must give a tuple of steps, as \('0F', '1F'\), not None"),
        ("0F", "must give a tuple of steps, .* not '0F'"),
        ((0, 1), r"must give a tuple of steps, .* not \(0, 1\)"),
        (KeyError("x"), "fails: KeyError: 'x'"),
        ((), "ends, where '0F' must come"),
        (("0F", "1F"), "ends after '1F', where '1X' or '2F' must come"),
        (("1F",), "has the step '1F', where '0F' must come$"),
        (("0F", "2F"), "'2F' after '0F', where '0X' or '1F' must come$"),
        (("0F", "0Z"), "'0Z' after '0F', .*; a step is the number of a stage and F .* or X"),
        (("0F", "F"), "a step is the number of a stage"),
        (("0F", "-1X"), "a step is the number of a stage"),
        (("0F", "1F", "2F", "3F"), "'3F' after '2F', where the end must come; .* are 0 to 2"),
        (("0F", "1F", "0X", "2F"), "'0X' after '1F', where '1X' or '2F' must come"),
        (("0F", "0X", "0X"), "'0X' after '0X', where '1F' must come"),
        (("0F", "1F", "2F", "2X"), "'2X' after '2F', .*; the exit of the last stage is the model'"),
        (("0F", "1F", "2F", "2B"), "'2B' after '2F', where the end must come; B and D are of Ass"),
    ],
)
def test_steps_that_cannot_run_are_named(given: object, message: str) -> None:
    with pytest.raises(MethodError, match=rf"^inference\(\) of method 'says' .*{message}"):
        steps(given)


def test_an_exit_needs_a_loss_with_a_head() -> None:
    with pytest.raises(MethodError, match="'0X' after '0F', .*; stage 0 has no loss with a head"):
        steps(("0F", "0X", "1F", "2F"), "bp")


def test_codes_go_back_through_all_stages() -> None:
    whole = ("0F", "1F", "2F", "2B", "2D", "1D", "0D")
    assert steps(whole, "al") == whole
    with pytest.raises(MethodError, match="ends after '1D', where '0D' must come"):
        steps(whole[:-1], "al")
    with pytest.raises(MethodError, match="'1D' after '2B', where '2D' must come"):
        steps((*whole[:4], "1D"), "al")


# ---------------------------------------------------------------------- exits


OWN = """
import torch
import torch.nn.functional as F
from torch import nn
from scpl_compile.methods import Method, cross_entropy_loss, module_loss

class Own(nn.Module):
    def __init__(self, *, num_classes, in_shapes):
        super().__init__()
        self.classify = nn.Linear(in_shapes[0][-1], num_classes)
        MADE

    def forward(self, x, *, labels, mask=None):
        return {"own": F.cross_entropy(self.classify(x), labels)}

    LOGITS

class Mine(Method):
    name = "mine"

    def losses(self, view):
        return (cross_entropy_loss(view),) if view.is_last else (
            module_loss(Own, view.sends, view),)

    def inference(self, num_stages):
        return ("0F", "0X", "1F")
"""


def written(folder: Path, logits: str, made: str = "pass") -> str:
    """The method in a file; logits: of its loss."""
    path = folder / "mine.py"
    path.write_text(OWN.replace("LOGITS", logits).replace("MADE", made))
    return f"{path}:Mine"


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ("", r"loss Own has no `logits`; give the class a method logits\(\*features, mask=N"),
        ("logits = 3", "loss Own has no `logits`"),
        ("def logits(self, x): return x", r"`logits` of loss Own gives \(128, .*it must be a meth"),
        ("def logits(self, x): return {}", r"`logits` of loss Own gives dict"),
        ("def logits(self): return 1", r"loss Own fails on \(.*TypeError"),
        ("def logits(self, x): return x.tolist()", "loss Own looks at the values"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_an_exit_that_cannot_be_used_is_told_before_training(
    tmp_path: Path, logits: str, message: str, verify: bool
) -> None:
    method = written(tmp_path, logits)
    with pytest.raises(MethodError, match=f"the exit of stage 0: {message}"):
        compile_model(layers(), "8", num_stages=2, method=method, verify=verify)


@pytest.mark.parametrize(
    ("logits", "made"),
    [
        ("def logits(self, *features, mask=None): return self.classify(features[0])", "pass"),
        ("", "self.logits = self.classify"),
    ],
)
def test_an_exit_of_ones_own_is_evaluated(tmp_path: Path, logits: str, made: str) -> None:
    method = written(tmp_path, logits, made)
    program = compile_model(layers(), "8", num_stages=2, method=method)
    x = torch.randn(6, 8)
    with program.trainer() as trainer:
        early, _ = trainer.predict(x)
        stage = trainer._stages[0].module
        assert torch.equal(early, stage.local_loss.classify(stage(x)))  # type: ignore[operator,union-attr]


def test_an_exit_gets_the_mask(tmp_path: Path) -> None:
    text = "def logits(self, x, mask): return self.classify((x * mask[:, :, None]).mean(1))"
    method = make_method(written(tmp_path, text))
    path = tmp_path / "mine.py"
    path.write_text(path.read_text().replace("self.classify(x)", "self.classify(x.mean(1))"))
    method = make_method(f"{path}:Mine")
    found = [losses_of(method, TEXT), losses_of(method, LAST)]
    assert found[0][0].mask == "mask"
    assert inference_of(method, found, NUM_CLASSES, 8) == ("0F", "0X", "1F")
