"""A head turns the tensors at a cut into one vector per sample."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scpl_compile.errors import MethodError
from scpl_compile.runtime.head_spec import HeadSpec
from scpl_compile.runtime.heads import Trunk
from whole_head import Head


def pooled(x, pooling, *, mask=None, batch_dim=0, layout="auto"):
    """What the trunk alone gives for one tensor."""
    shape = list(x.shape)
    del shape[batch_dim]
    spec = HeadSpec(head="identity", pooling=pooling, layout=layout)
    return Trunk(spec, (shape,), batch_dims=(batch_dim,))(x, mask=mask)


def test_the_released_head_is_flatten_linear_relu_linear():
    head = Head("mlp", in_shapes=((3, 4, 5),), hidden=7, out=6, pooling="none").double()
    released = nn.Sequential(nn.Flatten(), nn.Linear(60, 7), nn.ReLU(), nn.Linear(7, 6)).double()
    names = ("1.weight", "1.bias", "3.weight", "3.bias")
    released.load_state_dict(dict(zip(names, head.state_dict().values(), strict=True)))
    x = torch.randn(5, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(head(x), released(x))


@pytest.mark.parametrize("training", [True, False])
def test_mlp_bn_normalises_between_two_linear_layers(training):
    head = Head("mlp-bn", in_shapes=((9,),), hidden=7, out=6).double().train(training)
    x = torch.randn(5, 9, dtype=torch.float64)
    hidden = F.linear(x, head.projection.hidden.weight)
    if training:
        mean, var = hidden.mean(0), hidden.var(0, unbiased=False)
        hidden = (hidden - mean) / (var + 1e-5).sqrt()
    else:
        hidden = hidden / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(head(x), head.projection.out(hidden.relu()))


@pytest.mark.parametrize(("shrink", "pool"), [("max", F.max_pool2d), ("avg", F.avg_pool2d)])
def test_conv_is_conv_bn_relu_before_the_pool(shrink, pool):
    options = {"channels": 4, "conv_size": 5, "out": 6, "shrink": shrink}
    head = Head("conv", in_shapes=((3, 9, 9),), **options).double()
    x = torch.randn(5, 3, 9, 9, dtype=torch.float64)
    (conv,) = head.trunk.convs
    y = pool(x, 2, ceil_mode=True)  # 9x9 to at most 5x5
    y = F.conv2d(y, conv.conv.weight, stride=2, padding=1)
    y = F.batch_norm(y, None, None, training=True).relu()
    torch.testing.assert_close(head(x), head.projection.out(y.flatten(1)))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12])
def test_avg_is_the_adaptive_average_where_windows_divide_the_map(size):
    x = torch.randn(2, 3, size, size)
    expected = F.adaptive_avg_pool2d(x, min(size, 4)).flatten(1)
    torch.testing.assert_close(pooled(x, "avg:4"), expected)


def test_avg_gives_a_smaller_last_window_where_they_do_not():
    x = torch.arange(7.0).reshape(1, 1, 1, 7)
    assert pooled(x, "avg:4").tolist() == [[0.5, 2.5, 4.5, 6.0]]
    assert pooled(x, "avg:5").tolist() == [[0.5, 2.5, 4.5, 6.0]]
    assert pooled(x, "avg:3").tolist() == [[1.0, 4.0, 6.0]]


def test_avg_pools_video_in_time_height_and_width():
    x = torch.randn(2, 3, 5, 7, 6)
    expected = F.avg_pool3d(x, (3, 4, 3), ceil_mode=True).flatten(1)
    torch.testing.assert_close(pooled(x, "avg:2"), expected)


def test_avg_pools_a_sequence():
    x = torch.randn(2, 7, 3)
    expected = torch.stack([x[:, :4].mean(1), x[:, 4:].mean(1)], dim=2).flatten(1)
    torch.testing.assert_close(pooled(x, "avg:2"), expected)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 3, 5, 4, 2)])
@pytest.mark.parametrize("pooling", ["gap", "mean", "avg:1"])
def test_gap_is_the_mean_over_all_positions(shape, pooling):
    x = torch.randn(shape)
    torch.testing.assert_close(pooled(x, pooling), x.flatten(2).mean(2))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_mean_counts_the_unmasked_tokens_only(dtype):
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    lengths = (6, 1, 3, 0)
    mask = torch.stack([torch.arange(6) < length for length in lengths]).to(dtype)
    rows = [x[i, :length].mean(0) for i, length in enumerate(lengths[:3])]
    expected = torch.stack([*rows, torch.zeros(3, dtype=torch.float64)])
    torch.testing.assert_close(pooled(x, "mean", mask=mask), expected)
    torch.testing.assert_close(pooled(x, "mean"), x.mean(1))


def test_padding_may_hold_nan():
    x = torch.randn(1, 4, 3, requires_grad=True)
    padded = torch.cat([x, torch.full((1, 2, 3), torch.nan)], dim=1)
    result = pooled(padded, "mean", mask=torch.tensor([[1, 1, 1, 1, 0, 0]]))
    torch.testing.assert_close(result, x.mean(1))
    result.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("mask", [None, torch.ones(1, 4096, dtype=torch.bool)])
def test_a_half_precision_mean_of_many_tokens_does_not_overflow(mask):
    x = torch.full((1, 4096, 1), 30.0, dtype=torch.float16)  # their sum is above float16's range
    assert pooled(x, "mean", mask=mask).item() == 30.0


@pytest.mark.parametrize("mask", [torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 4)])
def test_a_mask_that_does_not_fit_is_refused(mask):
    with pytest.raises(MethodError, match=r"pooling needs bool or integer \(2, 4\)"):
        pooled(torch.randn(2, 4, 3), "mean", mask=mask)


def test_cls_is_the_first_token():
    x = torch.randn(2, 5, 3)
    assert torch.equal(pooled(x, "cls"), x[:, 0])


@pytest.mark.parametrize("pooling", ["none", "avg:2", "gap"])
def test_layout_nhwc_is_nchw_of_the_permuted_map(pooling):
    x = torch.randn(2, 5, 4, 3)
    expected = pooled(x.permute(0, 3, 1, 2), pooling)
    torch.testing.assert_close(pooled(x, pooling, layout="nhwc"), expected)


def test_layout_nchw_makes_a_sequence_channels_first():
    x = torch.randn(2, 3, 7)
    torch.testing.assert_close(pooled(x, "mean", layout="nchw"), x.mean(2))


def test_a_vector_has_nothing_to_pool():
    x = torch.randn(2, 3)
    for pooling in ("auto", "none", "avg:4", "gap", "mean", "cls"):
        assert torch.equal(pooled(x, pooling), x)


def test_an_lstm_cut_pools_each_tensor_and_concatenates():
    sequence, hidden, cell = torch.randn(4, 2, 6), torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 0]] * 4)
    head = Head("identity", in_shapes=((2, 6), (2, 3), (2, 3)), batch_dims=(0, 1, 1))
    expected = torch.cat([sequence[:, 0], hidden.mean(0), cell.mean(0)], dim=1)
    torch.testing.assert_close(head(sequence, hidden, cell, mask=mask), expected)
    with pytest.raises(MethodError, match="2 shapes come with 1 batch_dims"):
        Head("mlp", in_shapes=((6,), (3,)), batch_dims=(0,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("head", ["linear", "mlp", "mlp-bn", "conv"])
def test_features_of_any_precision_train_a_float32_head(head, dtype):
    module = Head(head, in_shapes=((3, 6, 6),), hidden=5, out=4)
    x = torch.randn(4, 3, 6, 6, dtype=dtype, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad.dtype == dtype
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("head", ["linear", "mlp", "mlp-bn", "conv"])
def test_under_autocast_a_head_computes_in_bfloat16(head):
    torch.manual_seed(0)
    module = Head(head, in_shapes=((3, 6, 6),), hidden=5, out=4)
    x = torch.randn(16, 3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), module(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(("head", "shape"), [("mlp-bn", (8,)), ("conv", (3, 2, 2))])
def test_a_training_batch_of_one_uses_the_running_statistics(head, shape):
    # torch's BatchNorm raises "Expected more than 1 value per channel when training" here.
    module = Head(head, in_shapes=(shape,), hidden=5, out=4)
    module(torch.randn(16, *shape) * 3 + 1)
    before = {name: value.clone() for name, value in module.named_buffers()}
    x = torch.randn(1, *shape)
    trained = module(x)
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())
    assert torch.equal(trained, module.eval()(x))
    trained.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("head", ["identity", "linear", "mlp", "mlp-bn", "conv"])
def test_samples_do_not_mix_in_eval(head):
    module = Head(head, in_shapes=((3, 6, 6),), hidden=5, out=4).eval()
    x = torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(module(x), torch.cat([module(row[None]) for row in x]))
