"""What every node of a graph gives: shape, batch dimension, memory, randomness (`node.meta`).

The graph runs at two batch sizes. A dimension is the batch if it alone differs, and is the batch
size in both runs. captured.py says what the keys mean.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from scpl_compile.capture.captured import BATCH, DEVICE
from scpl_compile.capture.run import Seen
from scpl_compile.ir import TensorMeta

__all__ = ["annotate"]

_SHAPE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device"})
_SHAPE_METHODS = frozenset({"size", "dim", "numel"})
_NO_RECIPE = object()
_CONSTANT_TYPES = (bool, int, float, str, type(None), torch.dtype)


def annotate(
    graph: Graph, first: Mapping[Node, Seen], second: Mapping[Node, Seen], batch_size: int
) -> None:
    """Write what two runs saw into the meta of the nodes.

    first, second: of runs on `batch_size` and `batch_size + 1` samples; the shapes of the first
    are reported.
    """
    bases: dict[int, str] = {}
    for node in (n for n in graph.nodes if n.op != "output"):
        seen, other = first[node], second[node].value
        tensor = seen.value if isinstance(seen.value, torch.Tensor) else None
        node.meta["kind"] = "other" if tensor is None else "tensor"
        node.meta["tensor"] = None if tensor is None else _tensor_meta(tensor, other, batch_size)
        node.meta["alias"] = seen.alias
        shared = () if tensor is None else seen.storages
        node.meta["base"] = next((bases.setdefault(key, node.name) for key in shared), node.name)
        node.meta["mutates"] = seen.mutates
        node.meta["ops"] = seen.ops
        node.meta["random"] = seen.draws or any(op.random for op in seen.ops)
        if tensor is None and _is_shape_query(node):
            recipe = _recipe(seen.value, other, batch_size)
            if recipe is not _NO_RECIPE:
                node.meta["recipe"] = recipe


def _tensor_meta(value: torch.Tensor, other: Any, batch_size: int) -> TensorMeta:
    shape = tuple(value.shape)
    batch_dim = None
    if isinstance(other, torch.Tensor) and other.dim() == len(shape):
        pairs = list(enumerate(zip(shape, other.shape, strict=True)))
        differing = [(dim, sizes) for dim, sizes in pairs if sizes[0] != sizes[1]]
        if len(differing) == 1 and differing[0][1] == (batch_size, batch_size + 1):
            batch_dim = differing[0][0]
    return TensorMeta(
        shape=shape,
        dtype=str(value.dtype).removeprefix("torch."),
        requires_grad=value.requires_grad,
        batch_dim=batch_dim,
    )


def _is_shape_query(node: Node) -> bool:
    """Whether `node` asks a tensor for its shape or dtype, or reckons with such answers."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    if node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES:
        return True
    arithmetic = getattr(node.target, "__module__", "") in ("_operator", "math", "builtins")
    return arithmetic and all("recipe" in n.meta for n in node.all_input_nodes)


def _recipe(value: Any, other: Any, batch_size: int) -> Any:
    """`value` with BATCH where it is the batch size in both runs, else _NO_RECIPE."""
    if isinstance(value, torch.device):
        return DEVICE
    if isinstance(value, (tuple, list)) and isinstance(other, (tuple, list)):
        if len(value) != len(other):
            return _NO_RECIPE
        items = [_recipe(a, b, batch_size) for a, b in zip(value, other, strict=True)]
        return _NO_RECIPE if any(item is _NO_RECIPE for item in items) else tuple(items)
    if type(value) is not type(other) or not isinstance(value, _CONSTANT_TYPES):
        return _NO_RECIPE
    if value == other:
        return value
    return BATCH if (value, other) == (batch_size, batch_size + 1) else _NO_RECIPE
