"""stages.py: one class per stage, and the functions around them."""

import ast
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from scpl_compile.api import Program, compile_model
from scpl_compile.errors import EmitError, ProgramError
from scpl_compile.runtime.program import load_stages

NUM_CLASSES = 4


def compiled(model: nn.Module | str, inputs: str = "6", **options: Any) -> Program:
    known = {"num_classes": NUM_CLASSES, "batch_size": 4, "threads_per_stage": 1}
    return compile_model(model, inputs, **{**known, **options})


def source_of(program: Program) -> str:
    return (program.directory / "stages.py").read_text()


def method_of(program: Program, stage: int, name: str) -> str:
    """The text of one method."""
    tree = ast.parse(source_of(program))
    owner = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == f"Stage{stage}")
    method = next(n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == name)
    return ast.unparse(method)


class Net(nn.Module):
    """Two layers with whatever `between` does between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))

    def between(self, x: Tensor) -> Tensor:
        return x


# ---------------------------------------------------------------------- forward


class Sizes(Net):
    def between(self, x: Tensor) -> Tensor:
        batch, width = x.shape
        x = F.relu(x)
        return x.view(batch, 2, width // 2).transpose(1, 2).reshape(batch, width)


def test_a_size_that_another_stage_needs_is_found_there_and_not_here() -> None:
    program = compiled(Sizes(), split_at=("relu",))
    assert method_of(program, 0, "forward").count("\n") == 2
    assert "relu.view(relu.shape[0], 2, floordiv)" in method_of(program, 1, "forward")


class ThroughAView(Net):
    def between(self, x: Tensor) -> Tensor:
        first_half = x[:, :3]
        first_half.mul_(2)
        return x


def test_a_received_tensor_that_is_written_through_a_view_is_cloned() -> None:
    program = compiled(ThroughAView(), split_at=("first",))
    forward = method_of(program, 1, "forward")
    assert forward.index("first = first.clone()") < forward.index("mul_(2)")
    with program.trainer() as trainer:  # the sender's backward would notice
        for _ in range(3):
            trainer.step(torch.randn(4, 6), torch.arange(4))
        trainer.drain()


def test_what_is_written_in_the_stage_that_made_it_is_not_cloned() -> None:
    assert ".clone()" not in source_of(compiled(ThroughAView(), split_at=("mul_",)))


class DropsInPlace(nn.Module):
    """The classifier begins by writing the feature that the local loss reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.classifier = nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(6, NUM_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.second(torch.relu(self.first(x))))


def test_a_feature_that_the_classifier_writes_is_cloned_behind_the_stop() -> None:
    program = compiled(DropsInPlace(), split_at=("first",), preset="paper")
    assert "self.classifier(self.stop(second).clone())" in method_of(program, 1, "forward")
    stage = load_stages(program.directory, program.plan).Stage1(program.model).train()
    feature, _ = stage(torch.randn(4, 6))
    assert (feature != 0).all()


class ReadsWeight(Net):
    def between(self, x: Tensor) -> Tensor:
        return F.linear(x, self.first.weight)


def test_the_weight_of_a_module_of_the_stage_is_read_from_it() -> None:
    program = compiled(ReadsWeight(), split_at=("linear",))
    assert "take(self, model, 'first')" in method_of(program, 0, "__init__")
    assert "self.first.weight" in method_of(program, 0, "forward")


def test_a_model_that_is_a_container_is_read_by_index() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, NUM_CLASSES))
    program = compiled(model, split_at=("1",))
    assert "class Stage1(Part):" in source_of(program)
    assert "return self[2](" in method_of(program, 1, "forward")


def test_a_model_that_is_one_module_is_called_whole() -> None:
    program = compiled(nn.Linear(6, NUM_CLASSES), "input:6", num_stages=1)
    assert "return self.model(input=input_)" in method_of(program, 0, "forward")
    assert source_of(program).endswith("STAGES = (Stage0,)\n")


class Switched(Net):
    def between(self, x: Tensor) -> Tensor:
        return F.dropout(x, p=0.5, training=self.training)


def test_a_constant_of_the_mode_follows_the_mode() -> None:
    program = compiled(Switched(), split_at=("first",))
    assert "training=self.training" in method_of(program, 1, "forward")
    assert program.verification.random_stages == (1,)
    x = torch.randn(4, 6)
    with program.trainer() as trainer:
        assert torch.equal(trainer.predict(x)[0], trainer.predict(x)[0])
        expected = program.model.eval()(x)
        torch.testing.assert_close(trainer.predict(x)[0], expected)


class ManyValues(nn.Module):
    """More tensors with long names cross than one line can hold."""

    def __init__(self) -> None:
        super().__init__()
        names = [f"a_module_with_a_rather_long_name_{i}" for i in range(5)]
        self.parts = nn.ModuleDict({name: nn.Linear(6, 6) for name in names})
        self.fc = nn.Linear(6, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        values = [part(x) for part in self.parts.values()]
        return self.fc(sum(values[1:], values[0]))


def test_long_lines_are_folded() -> None:
    for method in ("scpl", "bp"):
        cut = "parts.a_module_with_a_rather_long_name_4"
        source = source_of(compiled(ManyValues(), split_at=(cut,), method=method))
        assert max(map(len, source.splitlines())) <= 100
    assert "        return (\n" in source and "        sent = (\n" in source


# ---------------------------------------------------------------------- names


class Hiding(nn.Module):
    """Inputs and modules with the names of everything that an emitted file has."""

    def __init__(self) -> None:
        super().__init__()
        self.take = nn.Linear(6, 6)
        self.cut = nn.ReLU()
        self.LocalLoss = nn.Linear(6, 6)
        self.losses = nn.Identity()
        self.print = nn.Linear(6, 6)
        self.cross_entropy = nn.Linear(6, NUM_CLASSES)

    def forward(self, labels: Tensor, input: Tensor) -> Tensor:
        x = self.cut(self.take(labels)) + input
        return self.cross_entropy(self.print(self.losses(self.LocalLoss(x))))


def test_names_that_hide_builtins_or_the_files_own() -> None:
    program = compiled(Hiding(), "labels:6,input:6", split_at=("cut", "losses"))
    assert "labels_: Tensor, input_: Tensor, *, labels: Tensor" in source_of(program)
    with program.trainer() as trainer:
        trainer.step((torch.randn(4, 6), torch.randn(4, 6)), torch.arange(4))
        trainer.drain()


class Numbered(Net):
    """torch.fx calls the first input's node as the second input is called."""

    def forward(self, input: Tensor, input_1: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(input)) - input_1)


def test_inputs_that_torch_renames_stay_apart() -> None:
    program = compiled(Numbered(), "input:6,input_1:6", split_at=("first",))
    assert "(self, input_: Tensor, input_1: Tensor)" in source_of(program)


HOSTILE = ('x");import os;("', '"""\nimport os\n', "a-b", "class", "α", "\\")


class Hostile(nn.Module):
    """Modules and a parameter whose names are no identifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        for name in HOSTILE:
            self.add_module(name, nn.Linear(6, 6))
        self.register_parameter("w-x", nn.Parameter(torch.rand(6)))
        self.fc = nn.Linear(6, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)) * getattr(self, "w-x")
        for name in HOSTILE:
            x = self._modules[name](x)
        return self.fc(x)


def test_names_that_are_no_identifiers_never_are_code() -> None:
    program = compiled(Hostile(), num_stages=3)
    tree = ast.parse(source_of(program))
    imported = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert all(not isinstance(n, ast.Import) or n.names[0].name == "torch" for n in imported)
    strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    assert set(HOSTILE) <= strings
    assert {name for stage in program.plan.stages for name in stage.parameters} == {
        name for name, _ in program.model.named_parameters()
    }


@pytest.mark.parametrize("name", ["stop", "local_loss", "exit", "training_step"])
def test_names_that_stages_need_are_refused(name: str) -> None:
    model = Net()
    model.add_module(name, nn.Linear(6, 6))
    model.between = lambda x: torch.relu(getattr(model, name)(x))
    options = {"method": "early_exit", "options": {"last": "released"}}
    cut = "first" if name == "stop" else name  # the last stage has the stop, others the rest
    with pytest.raises(EmitError, match=f"the model's '{name}' .* rename it in the model"):
        compiled(model, split_at=(cut,), **options)


# ---------------------------------------------------------------------- functions of others


def wrapped(x: Tensor) -> Tensor:
    return x * 2 if bool((x > -math.inf).all()) else x


fx.wrap("wrapped")


class CallsFunction(Net):
    def between(self, x: Tensor) -> Tensor:
        return wrapped(F.relu(x))


def test_a_function_of_a_module_is_imported_from_it() -> None:
    program = compiled(CallsFunction(), split_at=("relu",))
    assert f"from {__name__} import wrapped\n" in source_of(program)
    assert "wrapped_ = wrapped(relu)" in method_of(program, 1, "forward")


NET_FILE = """
import torch
from torch import fx, nn


def helper(x):
    return x * 2 if bool((x > -1e9).all()) else x


fx.wrap("helper")


class Net(nn.Module):
    def __init__(self, wrap=True):
        super().__init__()
        self.first, self.second, self.wrap = nn.Linear(6, 6), nn.Linear(6, 4), wrap

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.second(helper(x) if self.wrap else x)


ready = Net(wrap=False)
"""


@pytest.fixture
def net_py(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(NET_FILE)
    return path


def test_a_function_of_the_models_own_file_is_an_error_that_names_it(
    net_py: Path, tmp_path: Path
) -> None:
    with pytest.raises(EmitError, match=r"stage \d: function 'helper' of .*submodule"):
        compiled(f"{net_py}:Net", out=tmp_path / "out", num_stages=2)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- build_model


def build_model_of(program: Program) -> str:
    return ast.unparse(
        next(
            n for n in ast.parse(source_of(program)).body
            if isinstance(n, ast.FunctionDef) and n.name == "build_model"
        )
    )  # fmt: skip


def builds_again(program: Program) -> None:
    """build_model() gives a model with the names and shapes of the compiled one."""
    again = load_stages(program.directory, program.plan).build_model().state_dict()
    state = program.model.state_dict()
    assert {n: v.shape for n, v in again.items()} == {n: v.shape for n, v in state.items()}


def test_a_model_of_a_file_is_loaded_by_path_name_and_digest(net_py: Path) -> None:
    program = compiled(f"{net_py}:Net", config={"wrap": False}, num_stages=2)
    text = build_model_of(program)
    assert repr(str(net_py)) in text and "'Net'" in text and "build(wrap=False)" in text
    assert re.search(r"'[0-9a-f]{64}'", text)
    builds_again(program)


def test_an_object_of_a_file_is_copied(net_py: Path) -> None:
    program = compiled(f"{net_py}:ready", num_stages=2)
    assert "return deepcopy(model)" in build_model_of(program)
    builds_again(program)
    stages = load_stages(program.directory, program.plan)
    assert stages.build_model() is not stages.build_model()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "zoo_of_this_test"
    folder.mkdir()
    text = NET_FILE + "\n\nbuild_model = cut = Net\n\n\nclass Zoo:\n    build = Net\n"
    (folder / "models.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield "zoo_of_this_test.models"
    for name in [name for name in sys.modules if name.startswith("zoo_of_this_test")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Net", "return Net(wrap=False)"),
        ("build_model", "return build_model_(wrap=False)"),
        ("cut", "return cut_(wrap=False)"),
        ("Zoo.build", "return Zoo.build(wrap=False)"),
    ],
)
def test_a_model_of_a_package_is_imported(package: str, name: str, text: str) -> None:
    program = compiled(f"{package}:{name}", config={"wrap": False}, num_stages=2)
    assert text in build_model_of(program)
    builds_again(program)


def test_an_object_of_a_package_is_copied(package: str) -> None:
    program = compiled(f"{package}:ready", num_stages=2)
    assert "return deepcopy(ready)" in build_model_of(program)
    builds_again(program)


def test_a_function_of_a_package_is_imported(package: str) -> None:
    program = compiled(f"{package}:Net", num_stages=2)
    assert f"from {package} import Net, helper\n" in source_of(program)
    assert "helper_ = helper(" in source_of(program)


def test_a_module_that_no_import_statement_can_name_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-net.py").write_text(NET_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EmitError, match="'Net' of 'my-net' cannot be imported"):
        compiled("my-net:Net", config={"wrap": False}, num_stages=2)


def test_a_torchvision_model_is_built_without_weights() -> None:
    program = compiled(
        "torchvision:squeezenet1_1", "3x32x32", config={"dropout": 0.25}, num_stages=2
    )
    assert build_model_of(program).endswith(
        "return squeezenet1_1(weights=None, dropout=0.25, num_classes=4)"
    )
    builds_again(program)


def test_a_model_given_as_an_object_cannot_be_built_again() -> None:
    program = compiled(Net(), num_stages=2)
    with pytest.raises(ProgramError, match="compiled from a model object; compile it with source"):
        load_stages(program.directory, program.plan).build_model()


def test_config_that_is_no_argument_is_an_error(net_py: Path) -> None:
    text = net_py.read_text() + "\n\ndef build(**config):\n    return Net(wrap=False)\n"
    net_py.write_text(text)
    with pytest.raises(EmitError, match="config 'a b' is no name of an argument"):
        compiled(f"{net_py}:build", config={"a b": 1}, num_stages=2)


# ---------------------------------------------------------------------- the file


def test_the_docstring_says_what_the_stages_are(package: str) -> None:
    program = compiled(f"{package}:Net", config={"wrap": False}, num_stages=2, method="bp")
    doc = ast.get_docstring(ast.parse(source_of(program)))
    assert doc.startswith(f"The stages of {package}:Net, method bp.")
    rows = re.findall(r"stage (\d)   (.+): ([\d,]+) parameters, (\d+) % of the cost", doc)
    assert [int(row[0]) for row in rows] == [0, 1]
    assert [int(row[2]) for row in rows] == [s.num_parameters for s in program.plan.stages]
    assert sum(int(row[3]) for row in rows) in (99, 100, 101)
    assert "plain backpropagation" in doc


def test_the_first_line_is_the_stamp_of_the_plan() -> None:
    program = compiled(Net(), num_stages=2)
    first = source_of(program).splitlines()[0]
    assert re.fullmatch(r"# Generated by scpl_compile \S+, plan [0-9a-f]{32}", first)
    assert program.plan.digest.startswith(first[-32:])
