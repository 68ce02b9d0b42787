"""Local losses that are modules of another class than LocalLoss, as a plan records them."""

import inspect
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from scpl_compile.errors import MethodError
from scpl_compile.ir import MULTI_LABEL, LocalLoss, LossSource, Scalar
from scpl_compile.methods.base import StageView, Value, features_of
from scpl_compile.runtime.loading import file_sha256

__all__ = ["module_loss"]


def module_loss(
    module: type[nn.Module],
    values: tuple[Value, ...],
    view: StageView,
    options: Mapping[str, Scalar] = MappingProxyType({}),
    *,
    kind: str = "own",
    code_width: int = 0,
) -> LocalLoss:
    """The loss that the module `module(num_classes=…, in_shapes=…, **options)` gives of `values`.

    What it must be: see runtime/objectives.py. Its cost is counted by running it once on tensors
    without data. kind: of scpl_compile's own classes; "own": of a class in a Python file.
    code_width: of the code of the labels that it takes, 0 where it takes none.

    Raises:
        MethodError: it cannot be built with these options, or cannot run on these shapes.
    """
    shapes, batch_dims, layout = features_of(values)
    if layout != "auto" and "layout" in inspect.signature(module).parameters:
        options = {"layout": layout, **options}
    batch_size = values[0].meta.shape[batch_dims[0]]
    in_shapes = tuple(tuple(shape) for shape in shapes)
    num_parameters, flops = _cost(
        module,  # type: ignore[arg-type]  # mypy takes a module's __hash__ for its class's
        view.num_classes,
        in_shapes,
        batch_dims,
        batch_size,
        tuple(options.items()),
        code_width,
        view.task == MULTI_LABEL,
    )
    lengths = {shape[0] for shape in in_shapes if len(shape) == 2}
    return LocalLoss(
        name="local_loss",
        kind=kind,
        reads=tuple(value.name for value in values),
        mask=view.mask.name if view.mask and lengths == {view.mask.length} else "",
        in_shapes=in_shapes,
        batch_dims=batch_dims,
        options=options,
        num_parameters=num_parameters,
        flops=flops,
        source=_source(module) if kind == "own" else None,
    )


def _source(module: type[nn.Module]) -> LossSource:
    path = inspect.getsourcefile(module)
    if path is None or "<locals>" in module.__qualname__:
        raise MethodError(f"loss {module.__qualname__} must stand at the top of a Python file")
    path = str(Path(path).resolve())
    return LossSource(path=path, name=module.__qualname__, sha256=file_sha256(path))


@lru_cache(maxsize=256)
def _cost(
    module: type[nn.Module],
    num_classes: int,
    in_shapes: tuple[tuple[int, ...], ...],
    batch_dims: tuple[int, ...],
    batch_size: int,
    options: tuple[tuple[str, Scalar], ...],
    code_width: int,
    is_multi_label: bool,
) -> tuple[int, int]:
    """(elements of its parameters, forward FLOPs); the same for all cuts of the same shapes."""
    more: Mapping[str, object] = {"batch_dims": batch_dims} if any(batch_dims) else {}
    name = module.__qualname__
    try:
        with FakeTensorMode(), torch.no_grad():
            made = module(num_classes=num_classes, in_shapes=in_shapes, **more, **dict(options))
            features = [
                torch.empty(*shape[:dim], batch_size, *shape[dim:])
                for shape, dim in zip(in_shapes, batch_dims, strict=True)
            ]
            shape = (batch_size, num_classes) if is_multi_label else (batch_size,)
            kind = torch.bool if is_multi_label else torch.int64
            given = {"labels": torch.zeros(shape, dtype=kind)}
            if code_width:
                given["code"] = torch.empty(batch_size, code_width)
            with FlopCounterMode(display=False) as counter:
                terms = made(*features, **given)
    except Exception as error:
        if isinstance(error, MethodError):
            raise
        text = " ".join(str(error).split())
        shapes = ", ".join(map(str, in_shapes))
        raise MethodError(
            f"loss {name} fails on {shapes}: {type(error).__name__}: {text}"
        ) from error
    if getattr(module, "gives_code", False):
        terms = terms[0]
    if not isinstance(terms, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) and value.dim() == 0
        for key, value in terms.items()
    ):
        raise MethodError(f"loss {name} must give a dict of scalar tensors by name")
    return sum(p.numel() for p in made.parameters()), counter.get_total_flops()
