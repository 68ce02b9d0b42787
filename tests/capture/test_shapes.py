"""What is known about every node: shapes, batch dimension, memory, randomness, recipes."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from capture_nets import floats, ids, node_of
from scpl_compile.capture import BATCH, Capture, capture
from scpl_compile.errors import CaptureError
from scpl_compile.ir import TensorMeta


class Calls(nn.Module):
    """A model whose forward is a given function of (self, x)."""

    def __init__(self, function, **modules: nn.Module) -> None:
        super().__init__()
        self._function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self._function(self, x)


class Opaque(nn.Module):
    """Kept whole (it counts its calls); gives a given function of (self, x)."""

    def __init__(self, function) -> None:
        super().__init__()
        self._function = function
        self.calls = 0
        self.weight = nn.Parameter(torch.ones(4))
        self.table = torch.ones(3, 4)
        self.register_buffer("buffer", torch.ones(4))

    def forward(self, x):
        self.calls += 1
        return self._function(self, x)


def last(captured: Capture) -> dict:
    """The meta of the node that the model returns."""
    return next(n for n in captured.graph.nodes if n.name == captured.outputs[0]).meta


def meta_of(function, *shape: int, **modules: nn.Module) -> dict:
    """The meta of what a model returns, on a batch of 8."""
    return last(capture(Calls(function, **modules), (floats(*shape),)))


def test_images() -> None:
    meta = meta_of(lambda m, x: m.conv(x), 3, 9, 9, conv=nn.Conv2d(3, 5, 3, stride=2))
    assert meta["kind"] == "tensor"
    assert meta["tensor"] == TensorMeta(
        shape=(8, 5, 4, 4), dtype="float32", requires_grad=True, batch_dim=0
    )


def test_the_batch_may_be_any_dimension_but_only_alone() -> None:
    assert meta_of(lambda m, x: x.transpose(0, 1), 8)["tensor"].batch_dim == 1
    assert meta_of(lambda m, x: x @ x.t(), 8)["tensor"].batch_dim is None
    assert meta_of(lambda m, x: x.reshape(-1, 2), 8)["tensor"].batch_dim is None
    assert meta_of(lambda m, x: x.sum(0), 8)["tensor"].batch_dim is None


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_states_have_the_batch_second(kind: type[nn.Module]) -> None:
    captured = capture(kind(3, 5, num_layers=2, batch_first=True), (floats(7, 3, name="input"),))
    metas = [n.meta["tensor"] for n in captured.compute_nodes if n.meta["kind"] == "tensor"]
    assert metas[0].shape == (8, 7, 5) and metas[0].batch_dim == 0
    assert all(meta.shape == (2, 8, 5) and meta.batch_dim == 1 for meta in metas[1:])
    assert len(metas) == (3 if kind is nn.LSTM else 2)


def test_attention_and_transformer_layers() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    meta = meta_of(lambda m, x: m.attention(x, x, x)[0], 5, 8, attention=attention)
    assert meta["tensor"].shape == (8, 5, 8)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    meta = meta_of(lambda m, x: m.layer(x, src_key_padding_mask=x[:, :, 0] > 0), 5, 8, layer=layer)
    assert meta["tensor"].shape == (8, 5, 8)
    assert meta["random"]


def test_integer_inputs_and_masks_carry_no_gradient() -> None:
    model = Calls(lambda m, x: m.table(x) * (x != 0).unsqueeze(-1), table=nn.Embedding(30, 4))
    captured = capture(model, (ids(6, 30, name="x"),))
    by_name = {n.name: n.meta["tensor"] for n in captured.graph.nodes if n.op != "output"}
    assert by_name["x"].dtype == "int64" and not by_name["x"].requires_grad
    assert by_name["ne"].dtype == "bool" and not by_name["ne"].requires_grad
    assert by_name["mul"].requires_grad


def test_frozen_parameters_and_detached_values_carry_no_gradient() -> None:
    frozen = nn.Linear(4, 4).requires_grad_(False)
    assert not meta_of(lambda m, x: m.frozen(x), 4, frozen=frozen)["tensor"].requires_grad
    detached = meta_of(lambda m, x: m.linear(x).detach(), 4, linear=nn.Linear(4, 4))
    assert not detached["tensor"].requires_grad


@pytest.mark.parametrize(
    ("function", "alias"),
    [
        (lambda m, x: x.view(-1, 2, 2), "input"),
        (lambda m, x: m.linear.weight[:2], "parameter"),
        (lambda m, x: m.norm.running_mean.view(2, 2), "buffer"),
        (lambda m, x: m.linear(x).flatten(), ""),
        (lambda m, x: nn.functional.relu(x), ""),
        (lambda m, x: Opaque.forward(m.odd, x), "cache"),
    ],
)
def test_whose_memory_a_value_is(function, alias: str) -> None:
    modules = {"linear": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)}
    if alias == "cache":
        function, modules = (lambda m, x: m.odd(x)), {"odd": Opaque(lambda m, x: m.table)}
    assert meta_of(function, 4, **modules)["alias"] == alias


@pytest.mark.parametrize(
    ("function", "alias"),
    [
        (lambda m, x: m.weight, "parameter"),
        (lambda m, x: m.buffer[None].expand(8, -1), "buffer"),
        (lambda m, x: m.table[1:], "cache"),
        (lambda m, x: x[:, :2], "input"),
        (lambda m, x: x * m.weight, ""),
    ],
)
def test_whose_memory_an_opaque_module_gives(function, alias: str) -> None:
    assert meta_of(lambda m, x: m.odd(x), 4, odd=Opaque(function))["alias"] == alias


def test_a_tensor_that_a_module_computes_once_and_keeps_is_a_cache() -> None:
    def lazily(module, x):
        if not hasattr(module, "kept"):
            module.kept = torch.arange(4.0) * module.weight
        return module.kept

    model = Calls(lambda m, x: m.odd(x), odd=Opaque(lazily))
    assert last(capture(model, (floats(4),)))["alias"] == "cache"
    assert not hasattr(model.odd, "kept")


def test_base_is_the_earliest_node_of_the_same_memory() -> None:
    def function(m, x):
        y = m.linear(x)
        return y.view(-1, 2, 2)[:, 0] + m.other(x).view(-1, 2, 2)[:, 0]

    modules = {"linear": nn.Linear(4, 4), "other": nn.Linear(4, 4)}
    captured = capture(Calls(function, **modules), (floats(4),))
    bases = {n.name: n.meta["base"] for n in captured.graph.nodes if n.op != "output"}
    assert bases["view"] == bases["getitem"] == "linear"
    assert bases["view_1"] == bases["getitem_1"] == "other"
    assert bases["add"] == "add"


def test_in_place_operations_name_what_they_write() -> None:
    def function(m, x):
        y = m.linear(x)
        part = y[:, :2]
        part += 1
        z = m.relu(y)
        return z.mul_(2.0) * F.relu(z)

    modules = {"linear": nn.Linear(4, 4), "relu": nn.ReLU(inplace=True)}
    captured = capture(Calls(function, **modules), (floats(4),))
    written = {n.name: n.meta["mutates"] for n in captured.compute_nodes if n.meta["mutates"]}
    assert written == {"iadd": ("getitem",), "relu": ("linear",), "mul_": ("relu",)}
    assert {n.meta["base"] for n in captured.compute_nodes} == {"linear", "relu_1", "mul"}


@pytest.mark.parametrize(
    ("function", "is_random"),
    [
        (lambda m, x: m.dropout(x), True),
        (lambda m, x: m.no_dropout(x), False),
        (lambda m, x: torch.rand_like(x), True),
        (lambda m, x: torch.bernoulli(x.sigmoid()), True),
        (lambda m, x: x[:, 0].softmax(-1).multinomial(1), True),
        (lambda m, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5), True),
        (lambda m, x: F.scaled_dot_product_attention(x, x, x), False),
        (lambda m, x: F.scaled_dot_product_attention(x, x, x, x[..., :5].sigmoid()), False),
        (lambda m, x: m.lstm(x)[0], True),
        (lambda m, x: m.lstm_plain(x)[0], False),
        (lambda m, x: m.draws(x), True),
        (lambda m, x: m.counts(x), False),
        (lambda m, x: m.recomputes(x), True),
    ],
)
def test_which_nodes_draw_random_numbers(function, is_random: bool) -> None:
    modules = {
        "dropout": nn.Dropout(0.1),
        "no_dropout": nn.Dropout(0.0),
        "lstm": nn.LSTM(8, 8, num_layers=2, dropout=0.1),
        "lstm_plain": nn.LSTM(8, 8, num_layers=2),
        "draws": Opaque(lambda m, x: x * random.random()),
        "counts": Opaque(lambda m, x: x * 2),
        "recomputes": Opaque(lambda m, x: checkpoint(F.dropout, x, use_reentrant=False)),
    }
    captured = capture(Calls(function, **modules), (floats(5, 8),))
    assert any(n.meta["random"] for n in captured.compute_nodes) == is_random


def test_shapes_have_recipes_and_data_has_none() -> None:
    def function(m, x):
        y = m.conv(x)
        batch, channels = y.shape[0], y.size(1)
        return y.view(batch, channels * 2, -1) + y.mean().to(y.dtype)

    captured = capture(Calls(function, conv=nn.Conv2d(3, 4, 3)), (floats(3, 6, 6),))
    recipes = {n.name: n.meta["recipe"] for n in captured.compute_nodes if "recipe" in n.meta}
    assert recipes == {
        "getattr_1": (BATCH, 4, 4, 4),
        "getitem": BATCH,
        "size": 4,
        "mul": 8,
        "getattr_2": torch.float32,
    }
    kinds = {n.name: n.meta["kind"] for n in captured.compute_nodes}
    assert all(kinds[name] == "other" for name in recipes)
    assert kinds["view"] == kinds["mean"] == "tensor"


def test_numbers_that_come_from_data_have_no_recipe() -> None:
    captured = capture(Calls(lambda m, x: x * ((x > 1e9).sum().item() + 1)), (floats(3),))
    assert all("recipe" not in n.meta for n in captured.compute_nodes)


def test_sizes_that_mix_the_batch_with_others_have_no_recipe() -> None:
    captured = capture(Calls(lambda m, x: x.new_ones(x.size(0) * 2)), (floats(3),))
    assert node_of(captured, "size").meta["recipe"] is BATCH
    assert all("recipe" not in n.meta for n in captured.compute_nodes if n.name == "mul")


def test_code_that_looks_at_data_runs_on_real_inputs() -> None:
    def function(m, x):
        kept = x[x[:, 0] > -100]
        return m.norm(kept) if bool(kept.sum() < 1e9) else x

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return function(self, x)

    model = Calls(lambda m, x: m.branches(x), branches=Branches())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    meta = last(capture(model, (floats(4),)))
    assert meta["tensor"].shape == (8, 4) and meta["tensor"].batch_dim == 0
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_wrong_input_names_the_module_and_the_shapes() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x)

    model = Calls(lambda m, x: m.block(x), block=Block())
    message = r"module 'block.conv' \(Conv2d\) fails on 8x1x6x6 float32 at batch size 8.*--input"
    with pytest.raises(CaptureError, match=message):
        capture(model, (floats(1, 6, 6),))
    with pytest.raises(
        CaptureError, match=r"matmul in Calls.forward fails on 8x4 float32.*--input"
    ):
        capture(Calls(lambda m, x: torch.matmul(x, x)), (floats(4),))
    with pytest.raises(CaptureError, match=r"'table' \(Embedding\) fails on 8x4 float32"):
        capture(Calls(lambda m, x: m.table(x), table=nn.Embedding(3, 4)), (floats(4),))


def test_an_opaque_module_that_fails_is_named() -> None:
    model = Calls(lambda m, x: m.odd(x), odd=Opaque(lambda m, x: x.view(3, 7)))
    with pytest.raises(CaptureError, match=r"'odd' \(Opaque\) fails on 8x4 float32"):
        capture(model, (floats(4),))
