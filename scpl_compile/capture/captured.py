"""What capture hands on: the graph of a model whose nodes call the model's own modules.

An argument of a node is a node, a constant, a Switch, or a container of these. Every node carries
these facts in `node.meta`:

=========  =====================================================================================
scope      keys of the module calls that enclose it, outermost first ("layer1", "layer1.0"; the
           second call of a module is "head@1"); empty for the model's own forward
kind       "tensor" or "other" (a tuple, an int, None …)
tensor     its TensorMeta at the example batch size, None unless kind is "tensor"
alias      "" (fresh memory) or whose memory it is: "parameter", "buffer", "input", "cache"
base       name of the earliest node whose memory it shares; its own name when fresh
mutates    names of the argument nodes that it writes in place
random     whether it draws random numbers in training mode
varies     present where the size of its tensor depends on data
moved      present where it runs earlier than in the model's code
recipe     of a node of kind "other" that any stage can compute again: its value, with BATCH for
           the batch size and DEVICE for the device; the key is absent otherwise
ops        the tensor operations that ran inside it, for the cost model
=========  =====================================================================================
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn
from torch.fx import Graph, Node

from scpl_compile.ir import InputSpec

__all__ = ["BATCH", "DEVICE", "Capture", "ModuleCall", "Switch", "blank_meta"]


class _Known:
    """One of the values that stand, inside a recipe, for what every stage knows."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


BATCH: Final = _Known("BATCH")
"""The batch size."""
DEVICE: Final = _Known("DEVICE")
"""The device that the tensors are on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """A constant argument of a node that depends on the mode (`training=self.training`)."""

    training: bool | int | float | str | None
    evaluation: bool | int | float | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleCall:
    """One call of a module that was traced through.

    args, kwargs and result are what the call was given and what it returned, as nested Python
    containers with the graph's nodes in place of values. has_gradient: it was not called under
    no_grad, which the graph of its nodes says and a call of the module would not.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any
    has_gradient: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Capture:
    """The graph of `model`; module docstring: what its nodes carry.

    Targets of call_module and get_attr nodes are paths in `model`, which is the user's own object
    (the path "" is the model itself).

    frontend: which one made it. opaque: (path, why it was not opened) of the modules kept whole.
    outputs: names of the nodes that the model returns, in order. batch_size: of the shapes.
    calls: the module calls that were traced through, by scope key.
    """

    model: nn.Module
    graph: Graph
    frontend: str
    opaque: tuple[tuple[str, str], ...]
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    batch_size: int
    calls: Mapping[str, ModuleCall]

    @property
    def compute_nodes(self) -> tuple[Node, ...]:
        """The nodes that compute something, in the order of execution."""
        return tuple(n for n in self.graph.nodes if n.op.startswith("call_"))


def blank_meta(node: Node, scope: tuple[str, ...]) -> dict[str, Any]:
    """The meta of a node that gives no tensor, and does nothing that must be known."""
    return {
        "scope": scope,
        "kind": "other",
        "tensor": None,
        "alias": "",
        "base": node.name,
        "mutates": (),
        "ops": (),
        "random": False,
    }
