"""Local losses that are modules of another class, a method of one's own among their users."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from views import FIRST, LAST, NUM_CLASSES, TEXT, value

from own_files import own_file
from scpl_compile.errors import LossError, MethodError, SourceError
from scpl_compile.ir import LocalLoss
from scpl_compile.methods import Method, StageView, make_method, module_loss
from scpl_compile.methods.base import losses_of
from scpl_compile.runtime.loading import file_sha256, load_callable
from scpl_compile.runtime.objectives import build_loss
from scpl_compile.runtime.predsim import PredSim

VECTOR = replace(FIRST, sends=(value("features", 8, 12),))
OWN = Path(__file__).parents[1] / "own_method.py"


def test_its_cost_is_counted_on_the_shapes() -> None:
    loss = module_loss(PredSim, FIRST.sends, FIRST, kind="predsim")
    made = build_loss(loss, NUM_CLASSES)
    assert isinstance(made, PredSim)
    assert loss.num_parameters == sum(p.numel() for p in made.parameters())
    convolution, classifier = 9 * 16 * 16 * 36, 16 * 9 * 10
    similarities = 8 * 8 * (16 + 10)
    assert loss.flops == 2 * (8 * (convolution + classifier) + similarities)


def test_predsim_is_in_every_stage_but_the_last() -> None:
    method = make_method("predsim", options={"similarity": 0.5, "pooling": "gap"})
    (loss,) = method.losses(FIRST)
    assert (loss.kind, loss.options) == ("predsim", {"similarity": 0.5, "pooling": "gap"})
    assert [loss.kind for loss in method.losses(LAST)] == ["cross_entropy"]
    assert method.losses(TEXT)[0].mask == "mask"


# ---------------------------------------------------------------------- of one's own


def test_a_method_of_ones_own_says_where_its_loss_is() -> None:
    (loss,) = make_method(f"{OWN}:Cosine", options={"scale": 3.0}).losses(TEXT)
    assert (loss.kind, loss.options, loss.mask) == ("own", {"scale": 3.0}, "mask")
    assert loss.source is not None and loss.source.sha256 == file_sha256(OWN)
    made = build_loss(loss, NUM_CLASSES)
    assert type(made) is load_callable(OWN, "Directions")
    assert loss.num_parameters == NUM_CLASSES * 12 and loss.flops > 0


OWN_TEXT = """
import torch
from torch import nn
from scpl_compile.methods import Method, cross_entropy_loss, module_loss

class Loss(nn.Module):
    def __init__(self, *, num_classes, in_shapes):
        super().__init__()
    def forward(self, *features, labels, mask=None):
        {body}

class Mine(Method):
    name = "{name}"
    def losses(self, view):
        return (module_loss(Loss, view.sends, view),)

class NoMethod:
    pass
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return features[0].sum()", "loss Loss must give a dict of scalar tensors by name"),
        ("return {'x': features[0]}", "loss Loss must give a dict of scalar tensors by name"),
        ("return {'x': features[0] @ labels}", r"loss Loss fails on \(16, 6, 6\): RuntimeError"),
    ],
)
def test_a_loss_that_cannot_be_used_is_told(tmp_path: Path, body: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN_TEXT.format(body=body, name="mine"))
    with pytest.raises(MethodError, match=message):
        make_method(f"{path}:Mine").losses(FIRST)


LOOKS = [
    "return {'x': features[0].sum() * (1 + labels.tolist()[0])}",
    "return {'x': features[0].sum() * labels.max().item()}",
    "return {'x': features[0][labels > 0].sum()}",
    "return {'x': features[0].sum() * len(labels.unique())}",
    "return {'x': features[0].sum() if features[0].sum() > 0 else features[0].mean()}",
    "return {'x': features[0].sum() * float(labels.numpy()[0])}",
    "return {'x': torch.tensor(sum(int(label) for label in labels))}",
]


@pytest.mark.parametrize("body", LOOKS)
def test_a_loss_that_looks_at_data_is_told_what_to_do(tmp_path: Path, body: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN_TEXT.format(body=body, name="mine"))
    message = r"loss Loss looks at the values of its tensors .*; let it compute with .* torch.where"
    with pytest.raises(MethodError, match=message):
        make_method(f"{path}:Mine").losses(FIRST)


def test_a_loss_may_read_a_tensor_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    text = OWN_TEXT.format(body="return {'x': (features[0] * WEIGHTS).sum()}", name="mine")
    path.write_text(f"{text}\nWEIGHTS = torch.ones(6)\n")
    assert make_method(f"{path}:Mine").losses(FIRST)[0].num_parameters == 0


def test_codes_are_of_associated_learning_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    text = OWN_TEXT.format(body="return {'x': features[0].sum()}, labels", name="mine")
    path.write_text(text.replace("def __init__", "gives_code = True\n    def __init__", 1))
    with pytest.raises(MethodError, match=r"loss Loss gives a code \(gives_code\), and only the"):
        make_method(f"{path}:Mine").losses(FIRST)


class Coded(Method):
    """predsim, whose losses take or give a code."""

    name = "coded"

    def __init__(self, **codes: str) -> None:
        self.codes = codes

    def losses(self, view: StageView) -> tuple[LocalLoss, ...]:
        (loss,) = make_method("predsim").losses(view)
        return (replace(loss, **self.codes),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "{'x': torch.tensor(2.0)}",
            r"the option x = tensor\(2.\) \(Tensor\); it must be one of bo",
        ),
        (
            "{'n': None}",
            r"the option n = None \(NoneType\); it must be one of bool, int, float, str",
        ),
        (
            "{'weights': [1.0, 2.0]}",
            r"the option weights = \[1.0, 2.0\] \(list\); it must be one of",
        ),
        ("{'a b': 1}", "an option 'a b', which is no name of an argument"),
        ("{'class': 1}", "an option 'class', which is no name of an argument"),
        ("{3: 4}", "an option 3, which is no name of an argument"),
        ("{'num_classes': 4}", "an option 'num_classes', which scpl_compile gives itself"),
        ("{'stop_at': 'relu'}", "an option 'stop_at', which scpl_compile gives itself"),
        ("[1]", r"the options \[1\]; give them as a dict by name"),
    ],
)
def test_an_option_that_no_plan_can_record_is_told(
    options: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(LossError, match=f"^loss Loss has {message}"):
        make_method(own_file(tmp_path, options=options)).losses(VECTOR)


@pytest.mark.parametrize("options", ["{}", "{'a': True, 'b': -3, 'c': 0.5, 'd': 'x'}"])
def test_options_are_scalars(options: str, tmp_path: Path) -> None:
    (loss,) = make_method(own_file(tmp_path, options=options)).losses(VECTOR)
    assert repr(loss.options) == options


@pytest.mark.parametrize("field", ["code", "gives"])
def test_a_loss_of_another_kind_has_no_code(field: str) -> None:
    with pytest.raises(MethodError, match="of method 'coded' gives a loss that takes or gives a c"):
        losses_of(Coded(**{field: "c"}), FIRST)


@pytest.mark.parametrize("kind", ["predsim", "al", "local", "mine"])
def test_a_kind_is_of_its_own_class(kind: str) -> None:
    own = load_callable(OWN, "Directions")
    with pytest.raises(MethodError, match=f"loss Directions is not of the kind '{kind}'"):
        module_loss(own, FIRST.sends, FIRST, kind=kind)


@pytest.mark.parametrize(
    ("spec", "name", "options", "error", "message"),
    [
        ("mine.py:Mine", "scpl", {}, MethodError, "has the name 'scpl'; give the class a `name`"),
        ("mine.py:Mine", "ddp", {}, MethodError, "has the name 'ddp'"),
        ("mine.py:Mine", "my method", {}, MethodError, "has the name 'my method'"),
        (
            "mine.py:Mine",
            "mine",
            {"x": 1},
            MethodError,
            "method 'mine' has no option 'x'; it has none",
        ),
        ("mine.py:NoMethod", "mine", {}, MethodError, "is no subclass of scpl_compile.methods.Me"),
        ("mine.py:Gone", "mine", {}, SourceError, "'Gone'"),
        ("gone.py:Mine", "mine", {}, SourceError, "gone.py"),
    ],
)
def test_a_method_that_cannot_be_used_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spec: str,
    name: str,
    options: dict[str, int],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN_TEXT.format(body="return {}", name=name))
    with pytest.raises(error, match=message):
        make_method(spec, options=options)


def test_a_constructor_that_fails_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    made = "def __init__(self, scale=1):\n        self.scale = {1: 1}[scale]\n    def losses"
    path.write_text(OWN_TEXT.format(body="return {}", name="mine").replace("def losses", made))
    with pytest.raises(MethodError, match="method 'mine': KeyError: 3"):
        make_method(f"{path}:Mine", options={"scale": 3})


def test_a_preset_that_it_does_not_have_is_told(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="method 'cosine' has no preset 'paper'"):
        make_method(f"{OWN}:Cosine", preset="paper")


def test_a_loss_inside_a_function_has_no_name_to_be_found_by() -> None:
    class Inner(nn.Module):
        def __init__(self, *, num_classes: int, in_shapes: object) -> None:
            super().__init__()

        def forward(self, *features: torch.Tensor, labels: torch.Tensor) -> dict[str, object]:
            return {"x": features[0].sum()}

    with pytest.raises(MethodError, match="must stand at the top of a Python file"):
        module_loss(Inner, FIRST.sends, FIRST)


BROKEN = """
from scpl_compile.methods import Method, cross_entropy_loss, module_loss
from scpl_compile.runtime.predsim import PredSim

class Mine(Method):
    name = "mine"
    def losses(self, view):
        {body}
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return {}['x']", r"losses\(\) of method 'mine' fails: KeyError: 'x'"),
        ("return None", "must give a tuple of losses, not None"),
        ("return module_loss(PredSim, view.sends, view, kind='predsim')", "must give a tuple of"),
        ("return 2 * (module_loss(PredSim, view.sends, view, kind='predsim'),)", "a stage has one"),
        ("return (cross_entropy_loss(view),)", "stage 0 does not have the model's logits"),
    ],
)
def test_losses_that_cannot_be_used_are_told(tmp_path: Path, body: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(BROKEN.format(body=body))
    with pytest.raises(MethodError, match=message):
        losses_of(make_method(f"{path}:Mine"), FIRST)
