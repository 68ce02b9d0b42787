"""What each node of a captured graph costs: a roofline over the operations inside it.

An operation takes max(arithmetic / peak, bytes / bandwidth) and a constant. Counting flops alone is
wrong by far: normalisation, activations, pooling, embeddings and, on a CPU, LSTM and attention have
none in torch's own counter. The rates of a device are what its kernels reach, not its data sheet.
Only ratios between nodes matter for balancing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any, Final

from torch.fx import Node

from scpl_compile.capture import Capture, node_parameters
from scpl_compile.capture.record import Op, OpTensor
from scpl_compile.ir import NodeCost

__all__ = ["DEVICES", "DeviceSpec", "Work", "node_costs", "op_cost", "op_work"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """What one device reaches in float32.

    Rates are per second, launch_us is the cost of starting an operation. filter_passes: how often
    the filters of a convolution go through memory to be laid out anew, (forward, backward); on a
    CPU this outweighs the arithmetic of the last layers of a ResNet on small images.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    launch_us: float
    filter_passes: tuple[float, float] = (0.0, 0.0)


DEVICES: Final[Mapping[str, DeviceSpec]] = MappingProxyType(
    {
        # One core of a server CPU with AVX-512, one thread: fitted to measured modules.
        "cpu": DeviceSpec(
            name="cpu",
            flops_per_s=170e9,
            bytes_per_s=12e9,
            launch_us=5.0,
            filter_passes=(1.0, 4.0),
        ),
        # A100: half of the data sheet's 156 Tflop/s in TF32, 80 % of its 1.55 TB/s.
        "cuda": DeviceSpec(name="cuda", flops_per_s=78e12, bytes_per_s=1.24e12, launch_us=5.0),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one operation does, forward and backward (backward 0: it carries no gradient).

    flops: additions and multiplications of matrix products and convolutions, forward.
    arithmetic: what counts against the device's peak: flops, more where kernels are slow.
    nbytes: bytes read and written. filter_nbytes: of a convolution's filters.
    """

    flops: int
    arithmetic: float
    nbytes: float
    backward_arithmetic: float
    backward_nbytes: float
    filter_nbytes: int = 0

    def forward_us(self, device: DeviceSpec) -> float:
        """Microseconds forward."""
        relayout = device.filter_passes[0] * self.filter_nbytes / device.bytes_per_s
        return op_cost(self.arithmetic, self.nbytes, device) + 1e6 * relayout

    def backward_us(self, device: DeviceSpec) -> float:
        """Microseconds backward."""
        if not self.backward_arithmetic and not self.backward_nbytes:
            return 0.0
        relayout = device.filter_passes[1] * self.filter_nbytes / device.bytes_per_s
        return op_cost(self.backward_arithmetic, self.backward_nbytes, device) + 1e6 * relayout


def op_cost(flops: float, nbytes: float, device: DeviceSpec) -> float:
    """Microseconds of one operation on `device`; 0 if it does nothing."""
    if not flops and not nbytes:
        return 0.0
    return device.launch_us + 1e6 * max(flops / device.flops_per_s, nbytes / device.bytes_per_s)


def node_costs(capture: Capture, device: DeviceSpec = DEVICES["cpu"]) -> dict[str, NodeCost]:
    """The cost of every compute node, at the batch size of the capture.

    activation_bytes: of the tensor that the node gives.
    """
    parameters = node_parameters(capture)
    nbytes = {name: p.numel() * p.element_size() for name, p in capture.model.named_parameters()}
    reasons = dict(capture.opaque)
    costs = {}
    for node in capture.compute_nodes:
        works = [op_work(op) for op in node.meta["ops"]]
        forward = sum(work.forward_us(device) for work in works)
        backward = sum(work.backward_us(device) for work in works)
        meta = node.meta["tensor"]
        costs[node.name] = NodeCost(
            name=node.name,
            forward_us=forward,
            backward_us=_hidden_backward(node, forward, backward, reasons),
            flops=sum(w.flops for w in works),
            bytes_moved=int(sum(w.nbytes for w in works)),
            param_bytes=sum(nbytes[name] for name in parameters[node.name]),
            activation_bytes=0 if meta is None else meta.nbytes,
            source="roofline",
        )
    return costs


def _hidden_backward(
    node: Node, forward: float, backward: float, opaque: Mapping[str, str]
) -> float:
    """Backward time with what autograd does not show while running forward."""
    if backward == 0 and node.meta["tensor"] is not None and node.meta["tensor"].requires_grad:
        backward = 2 * forward  # a custom autograd.Function
    if "checkpoint" in opaque.get(str(node.target), ""):
        backward += forward
    return backward


def op_work(op: Op) -> Work:
    """What one operation does."""
    if op.name in _PRODUCTS:
        work = _PRODUCTS[op.name](op)
    elif op.name == "embedding":
        work = _embedding(op)
    else:
        work = _streaming(op)
    if op.has_backward:
        return work
    return replace(work, backward_arithmetic=0.0, backward_nbytes=0.0)


# ---------------------------------------------------------------- products of matrices


def _matmul(op: Op) -> Work:
    """(…, m, k) @ (…, k, n): mm and bmm take the factors first, addmm and baddbmm a bias before."""
    left, right = op.inputs[-2:]
    return _product(op, 2 * left.numel * right.shape[-1], (left, right))


def _convolution(op: Op) -> Work:
    """Every output (transposed: input) element takes one filter; args[6] is `transposed`."""
    data, weight = op.inputs[:2]
    transposed = bool(op.args[6])
    filters = data if transposed else op.outputs[0]
    flops = 2 * filters.numel * prod(weight.shape[1:])
    if transposed:
        channels, per_group = weight.shape[0], weight.shape[1]
        groups = op.outputs[0].shape[1] // per_group
    else:
        channels, per_group = data.shape[1], weight.shape[1]
        groups = channels // per_group
    work = _product(op, flops, (data, weight))
    forward, backward = _convolution_slowness(prod(filters.shape[2:]), groups, weight)
    return replace(
        work,
        arithmetic=work.arithmetic * forward,
        backward_arithmetic=work.backward_arithmetic * backward,
        filter_nbytes=weight.nbytes,
    )


def _convolution_slowness(positions: int, groups: int, weight: OpTensor) -> tuple[float, float]:
    """How much slower than the peak a convolution is, forward and backward (fitted)."""
    if groups == 1:
        forward, backward = (min(3.0, max(1.0, few / positions)) for few in _FEW_POSITIONS)
        return forward, backward
    narrow = max(1.0, _NARROW_GROUP / weight.shape[1])
    is_wide_depthwise = weight.shape[1] == 1 and weight.shape[-1] > 3
    return narrow, narrow * (_WIDE_DEPTHWISE if is_wide_depthwise else 1.0)


def _attention(op: Op) -> Work:
    """softmax(q k^T) v for q (b, h, l, e), k (b, h, s, e), v (b, h, s, d)."""
    query, key, value = op.inputs[:3]
    scores = prod(query.shape[:-1]) * key.shape[-2]
    return _product(op, 2 * scores * (query.shape[-1] + value.shape[-1]), (query, key))


def _rnn_layer(op: Op) -> Work:
    """One layer over all steps (mkldnn_rnn_layer): x (t, b, i), then the two weight matrices."""
    return _recurrent(op, op.inputs[0], op.inputs[1:3])


def _rnn(op: Op) -> Work:
    """All layers (lstm, gru, rnn_tanh, rnn_relu): x, states, then the list of parameters."""
    lists = [arg for arg in op.args if isinstance(arg, (list, tuple)) and arg]
    matrices = [w for w in lists[-1] if isinstance(w, OpTensor) and len(w.shape) == 2]
    return _recurrent(op, op.inputs[0], matrices)


def _recurrent(op: Op, data: OpTensor, matrices: Any) -> Work:
    rows = prod(data.shape[:2])
    flops = sum(2 * rows * matrix.numel for matrix in matrices)
    return _product(op, flops, tuple(matrices))


def _product(op: Op, flops: int, factors: tuple[OpTensor, ...]) -> Work:
    """A product costs its flops once more for every factor that needs a gradient."""
    nbytes = _moved(op)
    backward = sum(factor.requires_grad for factor in factors)
    return Work(
        flops=flops,
        arithmetic=float(flops),
        nbytes=nbytes,
        backward_arithmetic=float(flops * backward),
        backward_nbytes=nbytes * backward,
    )


_FEW_POSITIONS: Final = (6, 10)
"""Positions in a feature map below which a convolution slows down, forward and backward."""
_NARROW_GROUP: Final = 10
"""Channels per group below which a grouped convolution no longer fills the vector units."""
_WIDE_DEPTHWISE: Final = 4.0
"""The gradient of depthwise filters wider than 3 takes a slower way on CPUs."""

_PRODUCTS: Final[Mapping[str, Callable[[Op], Work]]] = MappingProxyType(
    {
        **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "_addmm_activation"), _matmul),
        **dict.fromkeys(("convolution", "_convolution"), _convolution),
        **dict.fromkeys(
            (
                "_scaled_dot_product_flash_attention_for_cpu",
                "_scaled_dot_product_flash_attention",
                "_scaled_dot_product_efficient_attention",
                "_scaled_dot_product_cudnn_attention",
                "_scaled_dot_product_fused_attention_overrideable",
            ),
            _attention,
        ),
        "mkldnn_rnn_layer": _rnn_layer,
        **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _rnn),
    }
)

# ---------------------------------------------------------------- everything else


def _embedding(op: Op) -> Work:
    """Rows that are read and written; backward fills a gradient of the whole table."""
    table, rows = op.inputs[0], op.outputs[0].nbytes
    return Work(
        flops=0,
        arithmetic=0.0,
        nbytes=2.0 * rows,
        backward_arithmetic=0.0,
        backward_nbytes=table.nbytes + 3.0 * rows,
    )


def _streaming(op: Op) -> Work:
    """An operation whose time is that of moving its operands."""
    moved = 2 * sum(t.nbytes for t in op.outputs) if op.name in _LOOKUPS else _moved(op)
    passes, backward_passes = _PASSES.get(op.name, (1.0, 1.25))
    return Work(
        flops=0,
        arithmetic=_slow_arithmetic(op),
        nbytes=moved * passes,
        backward_arithmetic=0.0,
        backward_nbytes=moved * backward_passes,
    )


def _slow_arithmetic(op: Op) -> float:
    """Operations that a CPU does element by element, in flops that take as long."""
    elements = sum(t.numel for t in op.outputs)
    if op.name in _RANDOM:
        return 800.0 * elements
    if op.name.startswith("max_pool") and op.name.endswith("_with_indices"):
        window: int = prod(op.args[1])
        return 240.0 * elements * window
    return 0.0


def _moved(op: Op) -> int:
    return sum(t.nbytes for t in (*op.inputs, *op.outputs))


_LOOKUPS: Final = frozenset({"index", "index_select", "gather", "take", "embedding_renorm_"})
_RANDOM: Final = frozenset({"bernoulli", "bernoulli_", "native_dropout", "rand", "rand_like"})
# How often operands and result pass through memory, forward and backward.
_PASSES: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {
        **dict.fromkeys(
            ("native_batch_norm", "native_layer_norm", "native_group_norm", "cudnn_batch_norm"),
            (2.0, 1.75),
        ),
        **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax"), (1.5, 1.5)),
        **dict.fromkeys(("add", "add_", "sub", "sub_"), (1.0, 0.7)),
        **dict.fromkeys(("clone", "copy_", "_to_copy", "cat", "stack"), (1.0, 1.0)),
        **dict.fromkeys(("mean", "sum", "_adaptive_avg_pool2d", "avg_pool2d"), (1.0, 2.0)),
        "max_pool2d_with_indices": (1.0, 2.0),
    }
)
