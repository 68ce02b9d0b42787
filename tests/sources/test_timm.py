"""timm:NAME becomes a model with random weights, its input what timm says."""

import pytest
import timm
import torch

from scpl_compile.errors import SourceError
from scpl_compile.ir import ModelSource
from scpl_compile.sources import derive_inputs, example_inputs, load_model


def test_timm_gets_num_classes_and_config():
    model, source = load_model("timm:resnet10t", num_classes=7, config={"in_chans": 1})
    assert isinstance(model, timm.models.ResNet)
    assert model.fc.out_features == 7 and model.conv1[0].in_channels == 1
    assert source == ModelSource(spec="timm:resnet10t", config={"in_chans": 1, "num_classes": 7})


def test_a_tag_is_part_of_the_name():
    model, source = load_model("timm:resnet10t.c3_in1k", config={"pretrained": False})
    assert model.num_classes == 1000 and source.config == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet10x", "timm has no model 'resnet10x'; did you mean resnet10t or "),
        ("@@", "timm has no model '@@'; as in timm:resnet18"),
        ("hf-hub:timm/resnet10t.c3_in1k", "timm has no model 'hf-hub:timm/resnet10t.c3_in1k'"),
        ("local-dir:/tmp", "timm has no model 'local-dir:/tmp'"),
    ],
)
def test_only_names_of_the_registry_are_taken(name, message):
    with pytest.raises(SourceError, match=message):
        load_model(f"timm:{name}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"widht": 3}, "failed with TypeError: .*'widht'; its arguments come from --config"),
        ({"num_classes": 5}, "--num-classes says 10, --config says num_classes=5"),
        ({"pretrained": True}, "config pretrained is not taken, nothing is downloaded; save"),
        ({"checkpoint_path": "x.pth"}, "config checkpoint_path is not taken"),
    ],
)
def test_config_that_does_not_fit(config, message):
    with pytest.raises(SourceError, match=message):
        load_model("timm:resnet10t", num_classes=10, config=config)


@pytest.mark.parametrize(
    ("name", "config", "text"),
    [
        ("resnet10t", {}, "x:float32:3x176x176"),
        ("resnet10t", {"in_chans": 1}, "x:float32:1x176x176"),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}, "x:float32:3x32x32"),
    ],
)
def test_the_input_is_what_timm_says_unless_config_does(name, config, text):
    model, source = load_model(f"timm:{name}", num_classes=4, config=config)
    specs = derive_inputs(model, source)
    assert ",".join(map(str, specs)) == text
    with torch.no_grad():
        assert model(*example_inputs(specs, 2)).shape == (2, 4)
