"""Where the stages first compute something else than the model does."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from scpl_compile.verify.compare import RTOL, difference, same_start

__all__ = ["first_difference"]

Calls = list[tuple[str, list[Tensor]]]
"""(path of a module, the tensors that it gave), in the order of the calls."""


def first_difference(
    model: nn.Module, run_model: Callable[[], object], run_stages: Callable[[], object]
) -> str:
    """A phrase that names the first module of `model` whose result is another one in the stages.

    "" where there is none. Both runs begin in the same state. A module whose forward the stages
    spell out is not called there, so it cannot be compared.
    """
    with torch.no_grad():
        with same_start(model), _recorded(model) as expected:
            run_model()
        with same_start(model), _recorded(model) as actual:
            run_stages()
    found: dict[str, list[list[Tensor]]] = defaultdict(list)
    for path, tensors in actual:
        found[path].append(tensors)
    for path, tensors in expected:
        if not found[path]:
            continue
        others = found[path].pop(0)
        pairs = list(zip(tensors, others, strict=False))
        if len(tensors) != len(others) or any(difference(b, a) > RTOL for a, b in pairs):
            shape = "x".join(map(str, tensors[0].shape)) if tensors else "nothing"
            kind = type(model.get_submodule(path)).__name__
            return f"the first module that gives another result is {path!r} ({kind}, {shape})"
    return ""


@contextmanager
def _recorded(model: nn.Module) -> Iterator[Calls]:
    """Notes what every module gives."""
    calls: Calls = []

    def hook(path: str) -> Callable[[nn.Module, object, object], None]:
        def note(module: nn.Module, given: object, result: object) -> None:
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            calls.append((path, [tensor.clone() for tensor in tensors]))

        return note

    handles = [
        module.register_forward_hook(hook(path)) for path, module in model.named_modules() if path
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
