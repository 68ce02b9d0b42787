"""file.py:name and package.module:name become the user's own model."""

import hashlib

import pytest
from torch import nn

from scpl_compile.errors import SourceError
from scpl_compile.ir import ModelSource
from scpl_compile.sources import derive_inputs, load_model

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4, num_classes=3):
        super().__init__()
        self.body = nn.Linear(5, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.body(x))

def build(width):
    return Net(width)

def broken():
    raise RuntimeError("no such layer")

ready = Net()
number = 3
def text(): return "a model"
"""


@pytest.fixture
def net_file(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


def test_a_file_names_a_function_a_class_or_a_model(net_file):
    built, source = load_model(f"{net_file}:build", config={"width": 6}, num_classes=3)
    assert built.body.out_features == 6
    assert source == ModelSource(
        spec=f"{net_file}:build",
        config={"width": 6},
        path=str(net_file),
        sha256=hashlib.sha256(net_file.read_bytes()).hexdigest(),
    )
    assert load_model(f"{net_file}:Net")[0].body.out_features == 4
    assert load_model(f"{net_file}:ready")[0].head.out_features == 3


def test_a_relative_file_is_recorded_with_its_absolute_path(net_file, monkeypatch):
    monkeypatch.chdir(net_file.parent)
    _, source = load_model("net.py:Net")
    assert (source.spec, source.path) == ("net.py:Net", str(net_file))


def test_a_package_names_a_callable():
    model, source = load_model(
        "torch.nn:Linear", config={"in_features": 3, "out_features": 2, "bias": False}
    )
    assert isinstance(model, nn.Linear) and model.bias is None
    assert source.path is None and source.sha256 is None


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("build", {}, "failed with TypeError: .*'width'; its arguments come from --config"),
        ("build", {"depth": 2}, "failed with TypeError: .*'depth'"),
        ("broken", {}, "net.py:broken failed with RuntimeError: no such layer"),
        ("ready", {"width": 2}, "is a model already and takes no config .width.; name a function"),
        ("number", {}, "is of type int; it must be an nn.Module or a callable"),
        ("text", {}, "returned str, not an nn.Module"),
        ("absent", {}, "absent"),
    ],
)
def test_a_name_in_a_file_that_gives_no_model(net_file, name, config, message):
    with pytest.raises(SourceError, match=message):
        load_model(f"{net_file}:{name}", config=config)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", "'resnet18' names no constructor; write torchvision:resnet18"),
        ("net.py:", "names no constructor"),
        ("timm:", "write torchvision:resnet18, timm:resnet18, hf:bert, file.py:build or package"),
        ("absent_dir/net.py:build", "absent_dir"),
        ("absent_package.models:build", "absent_package"),
    ],
)
def test_specs_that_name_nothing(spec, message):
    with pytest.raises(SourceError, match=message):
        load_model(spec)


def test_the_input_of_ones_own_model_must_be_given(net_file):
    model, source = load_model(f"{net_file}:Net")
    for known in (source, None):
        with pytest.raises(SourceError, match="no input is given, .* --input, as in 3x32x32"):
            derive_inputs(model, known)
