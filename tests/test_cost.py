"""The cost of operations against hand counts, and of nodes against what is known about them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scpl_compile.capture import capture, coarsen
from scpl_compile.cost import DEVICES, DeviceSpec, node_costs, op_cost
from scpl_compile.ir import InputSpec, NodeCost

BATCH = 8
PLAIN = DeviceSpec(name="plain", flops_per_s=1e6, bytes_per_s=1e6, launch_us=0.0)
"""One flop or one byte per microsecond."""


class Calls(nn.Module):
    """A model whose forward is a given function of (self, x)."""

    def __init__(self, function, **modules: nn.Module) -> None:
        super().__init__()
        self._function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


def costs_of(
    function, *shape: int, device: DeviceSpec = PLAIN, high: int | None = None, **modules: nn.Module
) -> dict[str, NodeCost]:
    spec = InputSpec(name="x", dtype="int64" if high else "float32", shape=shape, high=high)
    return node_costs(capture(Calls(function, **modules), (spec,), BATCH), device)


def cost_of(module: nn.Module, *shape: int, high: int | None = None) -> NodeCost:
    """The cost of one module whose input needs no gradient."""
    return costs_of(lambda m, x: m.module(x), *shape, high=high, module=module)["module"]


def test_op_cost_is_the_roofline() -> None:
    device = DeviceSpec(name="x", flops_per_s=2e9, bytes_per_s=1e9, launch_us=3.0)
    assert op_cost(4000, 1000, device) == pytest.approx(3 + 2)
    assert op_cost(1000, 4000, device) == pytest.approx(3 + 4)
    assert op_cost(0, 0, device) == 0


def test_linear() -> None:
    cost = cost_of(nn.Linear(6, 10), 5, 6)
    assert cost.flops == 2 * BATCH * 5 * 6 * 10
    assert cost.param_bytes == 4 * (6 * 10 + 10)
    assert cost.activation_bytes == 4 * BATCH * 5 * 10
    assert cost.source == "roofline"


def test_reshaping_around_a_product_is_free() -> None:
    cost = cost_of(nn.Linear(6, 10, bias=False), 5, 6)
    assert cost.bytes_moved == 4 * (BATCH * 5 * 6 + 6 * 10 + BATCH * 5 * 10)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolution(groups: int) -> None:
    cost = cost_of(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups, bias=False), 4, 10, 10)
    assert cost.flops == 2 * BATCH * (8 * 5 * 5) * (4 // groups) * 9
    assert cost.bytes_moved == 4 * (BATCH * 400 + 8 * (4 // groups) * 9 + BATCH * 200)


def test_transposed_convolution() -> None:
    cost = cost_of(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), 4, 5, 5)
    assert cost.flops == 2 * BATCH * (4 * 5 * 5) * (6 // 2) * 9


def test_convolution_of_one_dimension() -> None:
    assert cost_of(nn.Conv1d(3, 5, 4), 3, 20).flops == 2 * BATCH * 5 * 17 * 3 * 4


@pytest.mark.parametrize(("layers", "directions"), [(1, 1), (2, 1), (1, 2)])
def test_lstm(layers: int, directions: int) -> None:
    lstm = nn.LSTM(6, 5, layers, batch_first=True, bidirectional=directions == 2)
    steps = BATCH * 7
    first = 2 * steps * 4 * 5 * (6 + 5) * directions
    rest = 2 * steps * 4 * 5 * (5 * directions + 5) * directions * (layers - 1)
    cost = costs_of(lambda m, x: m.lstm(x)[0], 7, 6, lstm=lstm)["lstm"]
    assert cost.flops == first + rest
    assert cost.param_bytes == 4 * sum(p.numel() for p in lstm.parameters())


@pytest.mark.parametrize(("kind", "gates"), [(nn.GRU, 3), (nn.RNN, 1)])
def test_gru_and_rnn(kind: type[nn.Module], gates: int) -> None:
    found = costs_of(lambda m, x: m.rnn(x)[0], 7, 6, rnn=kind(6, 5, batch_first=True))
    assert found["rnn"].flops == 2 * BATCH * 7 * gates * 5 * (6 + 5)


def test_attention() -> None:
    def attention(m, x):
        q, k = x[:, :, :5], x[:, :, 5:]
        return F.scaled_dot_product_attention(q, k, k[..., :4])

    found = costs_of(attention, 3, 12, 8)
    products = 3 * 5 * 7 * (8 + 4)
    assert found["scaled_dot_product_attention"].flops == 2 * BATCH * products
    fused = costs_of(lambda m, x: F.scaled_dot_product_attention(x, x, x), 3, 5, 8)
    assert fused["scaled_dot_product_attention"].flops == 2 * BATCH * 3 * 5 * 5 * (8 + 8)


def test_embedding_reads_rows_and_fills_a_gradient_table() -> None:
    cost = cost_of(nn.Embedding(1000, 6), 7, high=1000)
    rows = 4 * BATCH * 7 * 6
    assert cost.flops == 0
    assert cost.bytes_moved == cost.forward_us == 2 * rows
    assert cost.backward_us == 4 * 1000 * 6 + 3 * rows


@pytest.mark.parametrize(
    "module",
    [nn.BatchNorm2d(3), nn.ReLU(), nn.GELU(), nn.MaxPool2d(2, 1), nn.LayerNorm(6), nn.Softmax(-1)],
    ids=lambda module: type(module).__name__,
)
def test_what_has_no_flops_still_moves_bytes(module: nn.Module) -> None:
    cost = cost_of(module, 3, 6, 6)
    assert cost.flops == 0
    assert cost.bytes_moved >= 2 * 4 * BATCH * 3 * 27
    assert cost.forward_us >= 0.999 * cost.bytes_moved


def test_views_and_shapes_are_free() -> None:
    def views(m, x):
        return m.a(x).view(x.size(0), 2, 2).transpose(1, 2)[:, 0].unsqueeze(1).expand(-1, 3, -1)

    found = costs_of(views, 4, device=DEVICES["cpu"], a=nn.Linear(4, 4))
    assert {name for name, cost in found.items() if cost.total_us} == {"a"}


def test_backward_of_a_product_is_one_more_product_per_factor_that_needs_a_gradient() -> None:
    modules = {"a": nn.Linear(64, 64, bias=False), "b": nn.Linear(64, 64, bias=False)}
    found = costs_of(lambda m, x: m.b(m.a(x)), 64, **modules)
    assert found["a"].backward_us == found["a"].forward_us
    assert found["b"].backward_us == 2 * found["b"].forward_us
    modules["b"].requires_grad_(False)
    found = costs_of(lambda m, x: m.b(m.a(x)), 64, **modules)
    assert found["b"].backward_us == found["b"].forward_us


def test_what_carries_no_gradient_costs_nothing_backward() -> None:
    def function(m, x):
        mask = (x > 0).float()
        return m.a(x) * mask + m.frozen(x)

    frozen = nn.Linear(4, 4).requires_grad_(False)
    found = costs_of(function, 4, a=nn.Linear(4, 4), frozen=frozen)
    trained = {name for name, cost in found.items() if cost.backward_us}
    assert trained == {"a", "mul", "add"}
    assert all(cost.forward_us > 0 for cost in found.values())


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Hidden(nn.Module):
    """Two linear layers inside checkpoint(), and the same without."""

    def __init__(self, function) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


def test_what_autograd_hides_is_added_backward() -> None:
    plain = costs_of(lambda m, x: m.h(x), 4, h=Hidden(lambda m, x: m.layers(x)))
    forward = sum(cost.forward_us for cost in plain.values())
    backward = sum(cost.backward_us for cost in plain.values())
    hidden = Hidden(lambda m, x: checkpoint(m.layers, x, use_reentrant=False))
    found = costs_of(lambda m, x: m.h(x), 4, h=hidden)["h"]
    assert (found.forward_us, found.backward_us) == (forward, backward + forward)
    custom = costs_of(
        lambda m, x: m.h(m.a(x)), 4, a=nn.Linear(4, 4), h=Hidden(lambda m, x: Sign.apply(x))
    )
    assert custom["h"].backward_us == 2 * custom["h"].forward_us > 0


def test_an_opaque_module_costs_what_its_parts_cost() -> None:
    def parts(m, x):
        return m.layers(x).tanh()

    def counted(m, x):
        m.calls = getattr(m, "calls", 0) + 1
        return parts(m, x)

    opened = costs_of(lambda m, x: m.h(x), 4, h=Hidden(parts))
    whole = costs_of(lambda m, x: m.h(x), 4, h=Hidden(counted))
    assert list(whole) == ["h"]
    assert whole["h"].total_us == sum(cost.total_us for cost in opened.values())
    assert whole["h"].flops == sum(cost.flops for cost in opened.values())
    assert whole["h"].param_bytes == sum(cost.param_bytes for cost in opened.values())


def test_coarse_nodes_cost_what_their_parts_cost() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4))
    captured = capture(model, (InputSpec(name="input", dtype="float32", shape=(4,)),), BATCH)
    coarse, _ = coarsen(captured, {n.name: 0 for n in captured.compute_nodes})
    fine, found = node_costs(captured), node_costs(coarse)
    assert len(found) == 2
    for field in ("total_us", "flops", "bytes_moved", "param_bytes"):
        total = sum(getattr(cost, field) for cost in found.values())
        assert total == pytest.approx(sum(getattr(cost, field) for cost in fine.values()))


def test_costs_grow_with_the_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    spec = InputSpec(name="input", dtype="float32", shape=(4,))
    small, large = (node_costs(capture(model, (spec,), size), PLAIN) for size in (64, 128))
    for name, cost in small.items():
        assert cost.total_us < large[name].total_us <= 2 * cost.total_us


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_large_layers_outweigh_small_ones_on_every_device(device: DeviceSpec) -> None:
    modules = {
        "wide": nn.Conv2d(256, 256, 3, padding=1),
        "depthwise": nn.Conv2d(256, 256, 3, padding=1, groups=256),
        "norm": nn.BatchNorm2d(256),
        "relu": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1),
    }

    def function(m, x):
        return m.pool(m.relu(m.norm(m.depthwise(m.wide(x)))))

    found = costs_of(function, 256, 64, 64, device=device, **modules)
    order = sorted(found, key=lambda name: -found[name].total_us)
    assert order[0] == "wide" and order[-1] == "pool"
    assert found["norm"].total_us > found["relu"].total_us
    assert found["depthwise"].flops * 256 == found["wide"].flops
