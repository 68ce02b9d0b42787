"""torchvision:NAME becomes a classifier with random weights, or an error with a remedy."""

import pytest
from torchvision.models import GoogLeNet, ResNet

from scpl_compile.errors import SourceError
from scpl_compile.ir import ModelSource
from scpl_compile.sources import derive_inputs, load_model


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


def test_auxiliary_classifiers_are_left_out_with_a_notice():
    notices = []
    model, source = load_model("torchvision:googlenet", notice=notices.append)
    assert isinstance(model, GoogLeNet) and model.aux1 is None
    # init_weights is torchvision's default, and torchvision warns unless it is written out
    assert source.config == {"aux_logits": False, "init_weights": True}
    (notice,) = notices
    assert notice == (
        "torchvision:googlenet is built without its auxiliary classifiers (aux_logits=False)"
    )


def test_auxiliary_classifiers_cannot_be_asked_for():
    with pytest.raises(SourceError, match="aux_logits=true is not taken, .* leave it out"):
        load_model("torchvision:inception_v3", config={"aux_logits": True})


@pytest.mark.parametrize(
    ("name", "config", "side"),
    [
        ("resnet18", {}, 224),
        ("squeezenet1_1", {}, 224),
        ("efficientnet_b1", {}, 240),
        ("vit_b_32", {"image_size": 64}, 64),
        ("vit_h_14", {}, 224),  # its best weights take 518, and no model that is not built for them
    ],
)
def test_the_input_is_what_the_published_weights_take(name, config, side):
    source = ModelSource(spec=f"torchvision:{name}", config=config)
    (spec,) = derive_inputs(None, source)
    assert str(spec) == f"x:float32:3x{side}x{side}"


def test_the_input_of_a_video_model_must_be_given():
    with pytest.raises(SourceError, match="torchvision:r3d_18 is not known .* --input"):
        derive_inputs(None, ModelSource(spec="torchvision:r3d_18"))


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
