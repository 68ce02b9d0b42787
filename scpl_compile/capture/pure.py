"""Which nodes may be left out where nothing reads what they give."""

import operator

import torch
from torch.fx import Node

from scpl_compile.capture.proxies import IN_PLACE

__all__ = ["is_pure"]

_PURE_METHODS = frozenset(
    "size dim numel __getitem__ to view reshape expand unsqueeze transpose".split()
)
_FACTORIES = frozenset(
    {torch.arange, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.linspace}
)


def is_pure(node: Node) -> bool:
    """Whether nothing would be missed of `node` but its result, which nothing reads."""
    if node.op == "call_method":
        return node.target in _PURE_METHODS
    if node.op == "call_function":
        operators = getattr(node.target, "__module__", "") == "_operator"
        if node.target is getattr or node.target in _FACTORIES:
            return True
        return operators and node.target not in (*IN_PLACE, operator.setitem)
    return node.op == "get_attr"
