"""What a user names becomes a model and inputs, or an error that says what to write instead."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torchvision.models import GoogLeNet, ResNet

from scpl_compile.errors import SourceError
from scpl_compile.ir import InputSpec, ModelSource
from scpl_compile.runtime.checkpoint import save_tensors
from scpl_compile.sources import (
    check_output,
    example_inputs,
    load_model,
    load_weights,
    output_shapes,
    parse_config,
    parse_inputs,
)

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


def test_torchvision_gets_num_classes_and_config():
    model, source = load_model(
        "torchvision:resnet18", num_classes=7, config={"zero_init_residual": True}
    )
    assert isinstance(model, ResNet)
    assert model.fc.out_features == 7
    assert not model.layer1[0].bn2.weight.any()
    assert source == ModelSource(
        spec="torchvision:resnet18", config={"num_classes": 7, "zero_init_residual": True}
    )


def test_torchvision_without_num_classes_keeps_its_own():
    model, source = load_model("torchvision:squeezenet1_1")
    assert model.num_classes == 1000
    assert source.config == {}


def test_torchvision_models_that_warn_are_given_their_default():
    model, source = load_model("torchvision:googlenet", config={"aux_logits": False})
    assert isinstance(model, GoogLeNet)
    assert source.config == {"aux_logits": False, "init_weights": True}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "torchvision has no model 'resnet81'; did you mean resnet18"),
        ("zzz", "torchvision has no model 'zzz'; as in torchvision:resnet18"),
        ("fasterrcnn_resnet50_fpn", "is a detection model; scpl compiles classifiers"),
        ("keypointrcnn_resnet50_fpn", "is a detection model"),
        ("fcn_resnet50", "is a segmentation model"),
        ("raft_small", "is an optical flow model"),
        ("quantized_resnet18", "is a quantized model, which does not train"),
    ],
)
def test_torchvision_names_that_cannot_be_used(name, message):
    with pytest.raises(SourceError, match=message):
        load_model(f"torchvision:{name}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"widht": 3}, "failed with TypeError: .*'widht'; its arguments come from --config"),
        ({"num_classes": 5}, "--num-classes says 10, --config says num_classes=5"),
        ({"weights": "DEFAULT"}, "config weights is not taken, nothing is downloaded"),
        ({"pretrained": True}, "config pretrained is not taken"),
    ],
)
def test_torchvision_config_that_does_not_fit(config, message):
    with pytest.raises(SourceError, match=message):
        load_model("torchvision:resnet18", num_classes=10, config=config)


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
        ("timm:vit_tiny", "timm: models come later; for now name a callable"),
        ("hf:config.json", "hf: models come later; .* file.py:build"),
        ("absent_dir/net.py:build", "absent_dir"),
        ("absent_package.models:build", "absent_package"),
    ],
)
def test_specs_that_name_nothing(spec, message):
    with pytest.raises(SourceError, match=message):
        load_model(spec)


def test_weights_are_loaded_by_name(net_file, tmp_path):
    saved, _ = load_model(f"{net_file}:Net")
    path = tmp_path / "net.safetensors"
    save_file(saved.state_dict(), path)
    loaded, _ = load_model(f"{net_file}:Net", weights=path)
    assert all(
        torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True)
    )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.output = nn.Linear(3, 5, bias=False)
        self.output.weight = self.embedding.weight


@pytest.mark.parametrize("keep", ["embedding.weight", "output.weight"])
def test_a_tied_weight_may_be_stored_under_either_name(tmp_path, keep):
    path = tmp_path / "tied.safetensors"
    value = torch.randn(5, 3)
    save_file({keep: value}, path)
    model = Tied()
    load_weights(model, path)
    assert torch.equal(model.embedding.weight, value)
    assert model.output.weight is model.embedding.weight


def test_our_own_files_are_weights(tmp_path):
    path = tmp_path / "tied.safetensors"
    saved, loaded = Tied(), Tied()
    save_tensors(path, saved.state_dict(), {})
    load_weights(loaded, path)
    assert torch.equal(loaded.output.weight, saved.embedding.weight)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.ones(2, 3)}, r"not this model's: 1 missing \(bias\)"),
        (
            {"w": torch.ones(2, 3), "b": torch.ones(2)},
            r"2 missing \(weight, bias\) and 2 unexpected \(.*\)",
        ),
        (
            {"weight": torch.ones(2, 4), "bias": torch.ones(2)},
            r"weight is \(2, 4\), the model's is \(2, 3\)",
        ),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, tensors, message):
    path = tmp_path / "other.safetensors"
    save_file(tensors, path)
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(SourceError, match=message):
        load_weights(model, path)
    assert torch.equal(model.weight, before)


def test_a_torn_or_missing_or_pickled_file_is_refused(tmp_path):
    path = tmp_path / "torn.safetensors"
    save_file(nn.Linear(30, 20).state_dict(), path)
    content = path.read_bytes()
    for length in (0, 5, 60, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(SourceError, match="torn.safetensors is damaged"):
            load_weights(nn.Linear(30, 20), path)
    with pytest.raises(SourceError, match="absent.safetensors is missing"):
        load_weights(nn.Linear(3, 2), tmp_path / "absent.safetensors")
    with pytest.raises(SourceError, match="must be a .safetensors file"):
        load_weights(nn.Linear(3, 2), tmp_path / "model.pt")


def test_an_unnamed_input_is_the_parameter_at_its_position():
    assert parse_inputs("3x32x32", ["x"]) == (
        InputSpec(name="x", dtype="float32", shape=(3, 32, 32)),
    )
    assert [spec.name for spec in parse_inputs("4, int64:5<9", ["image", "ids"])] == [
        "image",
        "ids",
    ]


def test_named_inputs_have_dtypes_and_bounds():
    assert parse_inputs("mask:int64:128<2,ids:int64:128<30000", ["ids", "mask"]) == (
        InputSpec(name="mask", dtype="int64", shape=(128,), high=2),
        InputSpec(name="ids", dtype="int64", shape=(128,), high=30000),
    )
    assert parse_inputs("bfloat16:8x4", ["x"])[0].dtype == "bfloat16"
    assert parse_inputs("age:int64:<100", ["age"])[0].shape == ()


NAMES = st.sampled_from(("x", "ids", "mask"))
SIZES = st.lists(st.integers(1, 99), max_size=4).map(tuple)
FLOATS = st.sampled_from(("float32", "bfloat16", "bool"))
INTEGERS = st.sampled_from(("int64", "uint8"))
FLOAT_SPECS = st.builds(InputSpec, name=NAMES, dtype=FLOATS, shape=SIZES)
INTEGER_SPECS = st.builds(
    InputSpec, name=NAMES, dtype=INTEGERS, shape=SIZES, high=st.integers(1, 200)
)


@given(st.lists(st.one_of(FLOAT_SPECS, INTEGER_SPECS), min_size=1, unique_by=lambda s: s.name))
def test_inputs_read_back_what_their_text_says(specs):
    assert parse_inputs(",".join(map(str, specs)), ["ids", "mask", "x"]) == tuple(specs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "input '' is not"),
        ("3x32x", "input '3x32x' is not .*SHAPE.*, as in 3x32x32"),
        ("a:b:c:3", "input 'a:b:c:3' is not"),
        ("x:float31:3", "dtype 'float31' is not one of float32"),
        ("y:3", "forward has no 'y'; it has x, mask"),
        ("3,4,5", "input '5': forward takes 2 inputs, not more"),
        ("mask:3,4", "input '4': mask is given twice"),
        ("3x0", "input '3x0': a size or a bound is 0"),
        ("x:int64:8<0", "a size or a bound is 0"),
        ("x:int64:8", "int64 needs its bound <high, as in"),
        ("x:3<9", "float32 takes no bound <9"),
    ],
)
def test_a_wrong_input_is_named(text, message):
    with pytest.raises(SourceError, match=message):
        parse_inputs(text, ["x", "mask"])


def test_config_values_are_read_by_their_look():
    text = "a=1,b=2.5, c=true,d=text,e=-3,f=1e-3,g=False,h=,i=a=b,j=1_0,k=nan"
    read = parse_config(text)
    assert "".join(read) == "abcdefghijk"
    values = [1, 2.5, True, "text", -3, 1e-3, False, "", "a=b", "1_0", "nan"]
    assert [(type(value), value) for value in read.values()] == [(type(v), v) for v in values]
    assert parse_config("") == {}


@given(
    st.dictionaries(
        st.sampled_from(("a", "b2", "c_d")),
        st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
    )
)
def test_config_reads_back_numbers(config):
    text = ",".join(f"{name}={value}" for name, value in config.items())
    read = parse_config(text)
    assert read == config
    assert [type(value) for value in read.values()] == [type(value) for value in config.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "config 'a' is not name=value"),
        ("=3", "config '=3' is not name=value"),
        ("a b=3", "config 'a b=3' is not name=value"),
        ("a=1,a=2", "config 'a=2': a is given twice"),
    ],
)
def test_a_wrong_config_is_named(text, message):
    with pytest.raises(SourceError, match=message):
        parse_config(text)


def test_example_inputs_have_their_shapes_dtypes_and_bounds():
    text = "image:3x8,ids:int64:6<50,low:bfloat16:2,age:int32:<9,flag:bool:3"
    specs = parse_inputs(text, ["image", "ids", "low", "age", "flag"])
    image, ids, low, age, flag = example_inputs(specs, batch_size=64)
    assert (image.shape, image.dtype) == ((64, 3, 8), torch.float32)
    assert abs(image.mean()) < 0.2 and abs(image.std() - 1) < 0.2
    assert (ids.shape, ids.dtype) == ((64, 6), torch.int64)
    assert ids.min() >= 0 and ids.max() < 50 and len(ids.unique()) > 30
    assert (low.shape, low.dtype) == ((64, 2), torch.bfloat16)
    assert (age.shape, age.dtype) == ((64,), torch.int32)
    assert (flag.shape, flag.dtype) == ((64, 3), torch.bool)


@pytest.mark.parametrize("text", ["int64:5<2", "bool:5", "bool:5x5"])
def test_no_row_of_a_mask_is_empty(text):
    (mask,) = example_inputs(parse_inputs(text, ["mask"]), batch_size=32)
    assert mask[..., 0].all()
    assert not mask.all()


def test_the_seed_decides_the_example():
    specs = parse_inputs("3,int64:4<100", ["x", "ids"])
    state = torch.get_rng_state()
    first, again, other = (example_inputs(specs, 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_classifier_says_its_number_of_classes():
    shapes = output_shapes(torch.zeros(8, 10))
    assert check_output(shapes, num_classes=10, batch_size=8) == 10
    assert check_output(shapes, num_classes=None, batch_size=8) == 10


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(8, 1000), "gives 1000 classes, --num-classes says 10; pass --config num_"),
        (torch.zeros(8, 1), r"gives \(8, 1\): one number per sample is a regression"),
        (torch.zeros(8), r"gives \(8,\): one number per sample is a regression"),
        (torch.zeros(8, 20, 500), r"\(8, 20, 500\): a prediction per token .*: pool over"),
        (torch.zeros(8, 21, 4, 4), r"\(8, 21, 4, 4\): a prediction per pixel"),
        (torch.zeros(()), r"gives \(\) for a batch of 8; name a callable"),
        (torch.zeros(160, 10), r"gives \(160, 10\) for a batch of 8"),
        ([{"boxes": torch.zeros(3, 4)}] * 8, "gives 8 outputs; name a callable"),
        ((torch.zeros(8, 10), torch.zeros(8, 10)), "gives 2 outputs; .*aux_logits=false"),
        ({"logits": torch.zeros(8, 10), "cache": None}, r"a dict \(logits, cache\); name"),
        (None, "gives 0 outputs"),
    ],
)
def test_what_is_no_classifier_is_refused_with_a_remedy(output, message):
    with pytest.raises(SourceError, match=message):
        check_output(output_shapes(output), num_classes=10, batch_size=8)
