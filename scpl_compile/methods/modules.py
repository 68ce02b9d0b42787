"""Local losses that are modules of another class than LocalLoss, as a plan records them."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from keyword import iskeyword
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils.flop_counter import FlopCounterMode

from scpl_compile.capture.quiet import quiet
from scpl_compile.errors import LossError, MethodError, OwnCodeError, ScplError, context
from scpl_compile.ir import MULTI_LABEL, LocalLoss, LossSource, Scalar
from scpl_compile.methods.base import StageView, Value, features_of, line_of
from scpl_compile.runtime.loading import file_sha256
from scpl_compile.runtime.objectives import LOSS_CLASSES, build_loss, loss_class

__all__ = ["check_exit", "module_loss"]

_SCALARS = (bool, int, float, str)
"""As ir.Scalar, and none of their subclasses, which a plan reads back as another type."""
_RESERVED = ("self", "num_classes", "in_shapes", "batch_dims", "stop_at")
_READS_DATA = (DataDependentOutputException, DynamicOutputShapeException)
_IS_WITHOUT_DATA = re.compile(r"FakeTensor|tensor subclass")
"""In messages of numpy() and of a format with a precision."""


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

    options: by the name of an argument; scalars, for a plan and the emitted program record them.

    Raises:
        LossError: an option is no scalar; the module is of another kind, or gives a code.
        OwnCodeError: it cannot be built with these options, or cannot run on these shapes
            (MethodError, where it is of scpl_compile).
    """
    _check_kind(module, kind)
    _check_options(module, options)
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


def _check_kind(module: type[nn.Module], kind: str) -> None:
    name = module.__qualname__
    if kind == "own":
        if getattr(module, "gives_code", False):
            raise LossError(
                f"loss {name} gives a code (gives_code), and only the losses of Associated "
                "Learning hand one on; let it give its terms alone, a dict of scalars"
            )
    elif LOSS_CLASSES.get(kind) is not module:
        raise LossError(
            f"loss {name} is not of the kind {kind!r}, which is for a class of scpl_compile; leave "
            "kind out for one of your own"
        )


def _check_options(module: type[nn.Module], options: object) -> None:
    name = module.__qualname__
    if not isinstance(options, Mapping):
        raise LossError(f"loss {name} has the options {options!r:.60}; give them as a dict by name")
    for key, value in options.items():
        if not isinstance(key, str) or not key.isidentifier() or iskeyword(key):
            raise LossError(
                f"loss {name} has an option {key!r:.60}, which is no name of an argument"
            )
        if key in _RESERVED:
            raise LossError(
                f"loss {name} has an option {key!r}, which scpl_compile gives itself; name it "
                "otherwise"
            )
        if type(value) not in _SCALARS:
            raise LossError(
                f"loss {name} has the option {key} = {value!r:.60} ({type(value).__name__}); it "
                f"must be one of {', '.join(one.__name__ for one in _SCALARS)}: give several "
                "values as several options, or as text"
            )


def _source(module: type[nn.Module]) -> LossSource:
    path = inspect.getsourcefile(module)
    if path is None or "<locals>" in module.__qualname__:
        raise LossError(f"loss {module.__qualname__} must stand at the top of a Python file")
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

    def build() -> nn.Module:
        return module(num_classes=num_classes, in_shapes=in_shapes, **more, **dict(options))

    shape = (batch_size, num_classes) if is_multi_label else (batch_size,)
    with _without_data(module, in_shapes):
        made = _built(build)
        features = _features(in_shapes, batch_dims, batch_size)
        given = {"labels": torch.zeros(shape, dtype=torch.bool if is_multi_label else torch.int64)}
        if code_width:
            given["code"] = torch.empty(batch_size, code_width)
        with FlopCounterMode(display=False) as counter:
            terms = made(*features, **given)
    if getattr(module, "gives_code", False):
        terms = terms[0]
    if not isinstance(terms, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) and value.dim() == 0
        for key, value in terms.items()
    ):
        raise LossError(f"loss {name} must give a dict of scalar tensors by name")
    return sum(p.numel() for p in made.parameters()), counter.get_total_flops()


def check_exit(stage: int, loss: LocalLoss, num_classes: int, batch_size: int) -> None:
    """Whether the loss can give the logits of a stage's exit, by running it without data.

    Raises:
        MethodError: it has no `logits`, or that fails or gives something else than logits.
    """
    module = loss_class(loss)
    name = module.__qualname__
    wanted = f"logits(*features, mask=None) that gives (B, {num_classes})"
    with context(f"the exit of stage {stage}"):
        with _without_data(module, loss.in_shapes):
            made = _built(partial(build_loss, loss, num_classes)).eval()
            if not callable(logits := getattr(made, "logits", None)):
                raise LossError(f"loss {name} has no `logits`; give the class a method {wanted}")
            named = {}
            if loss.mask:
                length = next(shape[0] for shape in loss.in_shapes if len(shape) == 2)
                named["mask"] = torch.ones(batch_size, length, dtype=torch.int64)
            found = logits(*_features(loss.in_shapes, loss.batch_dims, batch_size), **named)
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape != (batch_size, num_classes):
            raise LossError(
                f"`logits` of loss {name} gives {shape} for a batch of {batch_size}; it must be a "
                f"method {wanted}"
            )


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    """A loss without memory; with it where its constructor computes with values."""
    try:
        return build()
    except _READS_DATA:
        with unset_fake_temporarily(), torch.random.fork_rng(devices=()):
            return build()


def _features(
    in_shapes: tuple[tuple[int, ...], ...], batch_dims: tuple[int, ...], batch_size: int
) -> list[Tensor]:
    dims = batch_dims or (0,) * len(in_shapes)
    return [
        torch.empty(*shape[:dim], batch_size, *shape[dim:])
        for shape, dim in zip(in_shapes, dims, strict=True)
    ]


@contextmanager
def _without_data(
    module: type[nn.Module], in_shapes: tuple[tuple[int, ...], ...]
) -> Iterator[None]:
    """Runs the block of this loss on tensors without data; how it fails is a MethodError."""
    name = module.__qualname__
    try:
        with quiet(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            yield
    except ScplError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, _READS_DATA) or _IS_WITHOUT_DATA.search(text):
            raise LossError(
                f"loss {name} looks at the values of its tensors ({text}), and its cost is counted "
                "on tensors without data; let it compute with whole tensors: torch.where or a "
                "product with a mask in place of `if`, item(), tolist(), numpy() and x[mask]"
            ) from error
        shapes = ", ".join(map(str, in_shapes))
        kind = MethodError if module in LOSS_CLASSES.values() else OwnCodeError
        raise kind(
            f"loss {name} fails on {shapes}: {type(error).__name__}: {text}{line_of(error, module)}"
        ) from error
