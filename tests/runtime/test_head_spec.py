"""The options of a head are checked, and its cost is known before it is built."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from scpl_compile.errors import MethodError
from scpl_compile.runtime.head_spec import HeadSpec
from whole_head import Head, head_flops, head_parameters

SHAPES = st.one_of(
    st.tuples(st.integers(1, 6)),
    st.tuples(st.integers(1, 5), st.integers(1, 6)),
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
)
SPECS = st.fixed_dictionaries(
    {"head": st.sampled_from(("auto", "identity", "linear", "mlp", "mlp-bn"))},
    optional={
        "hidden": st.integers(1, 5),
        "out": st.integers(1, 5),
        "pooling": st.sampled_from(("auto", "none", "avg:1", "avg:2", "avg:3", "gap", "mean")),
        "layout": st.sampled_from(("auto", "nchw", "nhwc")),
        "channels": st.integers(0, 4),
        "channel_multiplier": st.sampled_from((0.1, 1.0, 2.5)),
        "channel_limit": st.integers(1, 5),
        "stride": st.integers(1, 3),
    },
)


def counted(options, in_shapes, batch_size):
    """(parameters, forward FLOPs) of the head itself."""
    head = Head(in_shapes=in_shapes, **options)
    features = [torch.randn(batch_size, *shape) for shape in in_shapes]
    with FlopCounterMode(display=False) as counter:
        head(*features)
    return sum(p.numel() for p in head.parameters()), counter.get_total_flops()


@settings(deadline=None, max_examples=150)
@given(SPECS, st.lists(SHAPES, min_size=1, max_size=3), st.integers(1, 3))
def test_cost_is_predicted_exactly(options, in_shapes, batch_size):
    spec = HeadSpec.from_options(options)
    predicted = head_parameters(spec, in_shapes), head_flops(spec, in_shapes, batch_size)
    assert predicted == counted(options, in_shapes, batch_size)


@pytest.mark.parametrize("hidden", [0, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_cost_of_a_convolution_is_predicted_exactly(hidden, stride):
    options = {"head": "conv", "hidden": hidden, "out": 4, "stride": stride}
    in_shapes = ((3, 8, 7), (5,), (40, 9))
    spec = HeadSpec.from_options(options)
    predicted = head_parameters(spec, in_shapes), head_flops(spec, in_shapes, 2)
    assert predicted == counted(options, in_shapes, 2)


def test_released_heads_have_the_released_size():
    # VGG8 as released: four MLP heads of 512 and 1024 on flattened maps, 57.7 million parameters.
    spec = HeadSpec(head="mlp", hidden=512, out=1024, pooling="none")
    maps = ((256, 16, 16), (512, 8, 8), (512, 4, 4), (512, 2, 2))
    assert sum(head_parameters(spec, (shape,)) for shape in maps) == 57_677_824


@pytest.mark.parametrize(
    ("in_shapes", "head", "pooling", "channels"),
    [
        (((64, 32, 32),), "conv", "avg:4", 64),
        (((512, 7, 7),), "conv", "avg:4", 96),
        (((512, 1, 1),), "mlp", "avg:4", 0),
        (((128, 768),), "mlp", "mean", 0),
        (((64, 8, 14, 14),), "mlp", "avg:2", 0),
        (((300,),), "mlp", "auto", 0),
        (((128, 768), (300,)), "mlp", "mean", 0),
        (((8, 9, 9), (4, 16)), "conv", "auto", 8),
        (((8, 9, 9), (16, 9, 9)), "conv", "avg:4", 0),
    ],
)
def test_resolve_decides_what_the_shapes_decide(in_shapes, head, pooling, channels):
    resolved = HeadSpec().resolve(in_shapes)
    assert (resolved.head, resolved.pooling, resolved.channels) == (head, pooling, channels)
    assert resolved.resolve(in_shapes) == resolved
    assert head_parameters(resolved, in_shapes) == head_parameters(HeadSpec(), in_shapes)


def test_resolve_keeps_what_was_asked():
    spec = HeadSpec(head="linear", pooling="gap", channels=7)
    assert spec.resolve(((8, 9, 9),)) == spec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"haed": "mlp"}, "option 'haed' is unknown; did you mean head"),
        ({"head": "MLP"}, "option head is 'MLP'; it must be one of auto, identity, linear"),
        ({"pooling": "avg:0"}, "option pooling is 'avg:0'; it must be one of .*avg:N"),
        ({"pooling": "avg"}, "option pooling is 'avg'"),
        ({"layout": "hwc"}, "option layout is 'hwc'; it must be one of auto, nchw, nhwc"),
        ({"hidden": 0, "head": "mlp"}, "option hidden is 0; it must be 1 or more"),
        ({"out": 0}, "option out is 0; it must be 1 or more"),
        ({"channels": -1}, "option channels is -1; it must be 0 or more"),
        ({"stride": 0}, "option stride is 0; it must be 1 or more"),
        ({"channel_multiplier": 0.0}, "option channel_multiplier is 0.0; it must be more than 0"),
        ({"hidden": "256"}, "option hidden is '256'; it must be of type int, as in hidden=256"),
        ({"out": True}, "option out is True; it must be of type int"),
        ({"out": 1.5}, "option out is 1.5; it must be of type int"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(MethodError, match=message):
        HeadSpec.from_options(options)


@pytest.mark.parametrize(
    ("options", "in_shapes", "message"),
    [
        ({"head": "conv"}, ((16, 32),), r"needs a feature map .* \('B', 16, 32\); use head=mlp"),
        ({"pooling": "cls"}, ((3, 8, 8),), r"not of \(B, 3, 8, 8\); use gap or avg:4"),
        ({}, ((2, 2, 2, 2, 2),), "2 to 5 dimensions, batch included, not 6"),
        ({}, ((),), "2 to 5 dimensions, batch included, not 1"),
        ({}, (), "at least one tensor"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(options, in_shapes, message):
    with pytest.raises(MethodError, match=message):
        head_parameters(HeadSpec.from_options(options), in_shapes)
