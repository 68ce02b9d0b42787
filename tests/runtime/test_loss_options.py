"""The options of a local loss are checked, and its cost is known before it is built."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from scpl_compile.errors import MethodError
from scpl_compile.runtime.head_spec import HeadSpec
from scpl_compile.runtime.loss_options import (
    PAPER,
    LossOptions,
    objective_flops,
    objective_parameters,
)
from scpl_compile.runtime.losses import LocalLoss
from whole_head import head_parameters

WEIGHTS = st.sampled_from(((1.0, 1.0), (0.5, 2.0), (1.0, 0.0), (0, 1)))
OPTIONS = st.fixed_dictionaries(
    {"hidden": st.integers(1, 5), "out": st.integers(1, 5)},
    optional={
        "head": st.sampled_from(("auto", "identity", "linear", "mlp", "mlp-bn")),
        "classifier": st.sampled_from(("linear", "mlp", "mlp-bn")),
        "pooling": st.sampled_from(("none", "avg:2", "gap")),
        "layout": st.sampled_from(("nchw", "nhwc")),
        "channels": st.integers(0, 3),
        "channel_limit": st.integers(1, 5),
        "conv_size": st.integers(0, 5),
        "shrink": st.sampled_from(("max", "avg")),
        "temperature": st.sampled_from((0.07, 0.5)),
        "divisor": st.sampled_from(("scpl", "khosla")),
        "impl": st.sampled_from(("auto", "chunked", "reference")),
        "objective": st.sampled_from(("supcon", "deinforeg")),
        "detach_classifier": st.booleans(),
    },
)
IN_SHAPES = st.sampled_from(
    (((3, 5, 4),), ((2, 7),), ((6,),), ((4, 5, 5), (2, 3)), ((2, 5, 5), (3, 5, 5)), ((5, 1, 1),))
)


def with_weights(options, weights):
    """A classifier alone reads with a gradient."""
    detached = options.get("detach_classifier", False) and weights[0] > 0
    more = {"contrast": weights[0], "cross_entropy": weights[1], "detach_classifier": detached}
    return {**options, **more}


def built(options, in_shapes):
    torch.manual_seed(0)
    return LocalLoss(num_classes=3, in_shapes=in_shapes, **options)


@settings(deadline=None, max_examples=100)
@given(OPTIONS, WEIGHTS, IN_SHAPES)
def test_cost_is_predicted_exactly(options, weights, in_shapes):
    options = with_weights(options, weights)
    loss = built(options, in_shapes)
    with FlopCounterMode(display=False) as counter:
        pooled = loss.trunk(*(torch.randn(4, *shape) for shape in in_shapes))
        z = loss.projection(pooled) if loss.projection else pooled[:, :0]
        if loss.classifier:
            loss.classifier(pooled)
    spec = LossOptions.from_options(options)
    flops = counter.get_total_flops() + 2 * 4 * 4 * z.shape[1]
    if spec.objective == "deinforeg" and loss.projection:
        flops += 2 * 4 * 4 * 3 + 2 * 4 * z.shape[1] ** 2
    assert objective_flops(spec, in_shapes, 3, batch_size=4) == flops
    parameters = sum(p.numel() for p in loss.parameters())
    assert objective_parameters(spec, in_shapes, num_classes=3) == parameters


@settings(deadline=None, max_examples=100)
@given(OPTIONS, WEIGHTS, IN_SHAPES)
def test_arguments_build_the_same_loss(options, weights, in_shapes):
    options = with_weights(options, weights)
    arguments = LossOptions.from_options(options).arguments(in_shapes)
    assert "auto" not in arguments.values() or len(in_shapes) > 1 or in_shapes == ((6,),)
    first, second = built(options, in_shapes), built(json.loads(json.dumps(arguments)), in_shapes)
    assert first.state_dict().keys() == second.state_dict().keys()
    features = [torch.randn(4, *shape) for shape in in_shapes]
    labels = torch.tensor([0, 0, 1, 2])
    for name, value in first(*features, labels=labels).items():
        assert torch.equal(value, second(*features, labels=labels)[name])


def test_arguments_show_only_what_has_an_effect():
    assert LossOptions().arguments(((64, 32, 32),)) == {
        "head": "conv",
        "out": 64,
        "pooling": "avg:4",
        "channels": 64,
        "stride": 2,
        "conv_size": 7,
        "shrink": "max",
        "temperature": 0.1,
        "divisor": "scpl",
        "contrast": 1.0,
        "cross_entropy": 1.0,
    }
    assert LossOptions(impl="triton").arguments(((64,),))["impl"] == "triton"
    early_exit = LossOptions(head="mlp", contrast=0.0, impl="chunked", classifier="mlp", hidden=512)
    assert early_exit.arguments(((16, 300),)) == {
        "head": "identity",
        "hidden": 512,
        "pooling": "mean",
        "contrast": 0.0,
        "cross_entropy": 1.0,
        "classifier": "mlp",
    }


def test_arguments_of_deinforeg_have_no_temperature():
    options = LossOptions(head="mlp", objective="deinforeg", detach_classifier=True)
    assert options.arguments(((300,),)) == {
        "head": "mlp",
        "hidden": 256,
        "out": 64,
        "pooling": "auto",
        "contrast": 1.0,
        "cross_entropy": 1.0,
        "objective": "deinforeg",
        "detach_classifier": True,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "barlow"}, "objective is 'barlow'; it must be one of supcon, deinforeg"),
        ({"detach_classifier": True, "contrast": 0.0}, "so nothing would train it"),
        ({"detach_classifier": 1}, "detach_classifier is 1; it must be of type bool"),
    ],
)
def test_an_objective_that_cannot_be_is_refused(options, message):
    with pytest.raises(MethodError, match=message):
        LossOptions.from_options(options)


def test_arguments_leave_the_channels_open_where_the_tensors_differ_in_them():
    in_shapes = ((2, 5, 5), (3, 5, 5))
    arguments = LossOptions(channel_multiplier=3.0, channel_limit=8).arguments(in_shapes)
    loss = LocalLoss(num_classes=3, in_shapes=in_shapes, **arguments)
    assert [conv.conv.out_channels for conv in loss.trunk.convs] == [6, 8]


def test_paper_is_the_contrastive_loss_alone_on_the_released_head():
    vision, text = (LossOptions.from_options(PAPER[kind]) for kind in ("vision", "text"))
    head = HeadSpec(head="mlp", hidden=512, out=1024, pooling="none")
    in_shapes = ((256, 16, 16),)
    assert objective_parameters(vision, in_shapes, 10) == head_parameters(head, in_shapes)
    assert objective_parameters(text, ((60, 300),), 2) == 0
    for options in (vision, text):
        assert (options.temperature, options.divisor) == (0.1, "scpl")
        assert (options.contrast, options.cross_entropy) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatur": 1.0}, "option 'temperatur' is unknown; did you mean temperature"),
        ({"temperature": 0.0}, "option temperature is 0.0; it must be a number above 0"),
        ({"temperature": float("nan")}, "option temperature is nan"),
        ({"divisor": "mean"}, "option divisor is 'mean'; it must be one of scpl, khosla"),
        ({"impl": "cuda"}, "option impl is 'cuda'; it must be one of auto, triton, chunked, ref"),
        ({"contrast": -1.0}, "option contrast is -1.0; it must be a weight of 0 or more"),
        ({"cross_entropy": float("inf")}, "option cross_entropy is inf"),
        ({"contrast": 0, "cross_entropy": 0}, "contrast and cross_entropy are both 0"),
        ({"classifier": "conv"}, "option classifier is 'conv'; it must be one of linear, mlp"),
        ({"hidden": 0, "classifier": "mlp"}, "option hidden is 0; .* for classifier mlp"),
        ({"head": "cnn"}, "option head is 'cnn'"),
        ({"contrast": "1"}, "option contrast is '1'; it must be of type float"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(MethodError, match=message):
        LossOptions.from_options(options)


def test_the_default_head_is_cheap():
    # The bounds that the default was chosen under: 12 % of the training FLOPs of the small net of
    # benchmarks/models.py (29.5 MFLOP a sample), 5 % of FLOPs and 10 % of parameters of resnet18 at
    # 224x224 (3.627 GFLOP, 11.18 million), each in four stages.
    batch_size, default = 256, LossOptions()

    def cost(shapes):
        flops = sum(objective_flops(default, (s,), 10, batch_size) for s in shapes) / batch_size
        return flops, sum(objective_parameters(default, (s,), 10) for s in shapes)

    small_flops, _ = cost(((32, 14, 14), (64, 7, 7), (96, 3, 3)))
    assert small_flops <= 0.12 * 29.54e6
    resnet_flops, resnet_parameters = cost(((64, 56, 56), (128, 28, 28), (256, 14, 14)))
    assert resnet_flops <= 0.05 * 3.627e9
    assert resnet_parameters <= 0.10 * 11.18e6
