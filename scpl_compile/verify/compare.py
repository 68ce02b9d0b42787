"""Running a model twice from one start, and comparing what the two runs gave."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from scpl_compile.capture.state import preserved
from scpl_compile.errors import ScplError, VerifyError
from scpl_compile.runtime.stage import StopGradient

__all__ = [
    "RTOL",
    "Print",
    "compare_gradients",
    "copies",
    "difference",
    "running",
    "same_start",
    "stops_open",
    "taken_gradients",
    "undisturbed",
    "weighted",
]

RTOL = 1e-4
"""Relative to the largest element: the same kernels run in the same order, but a contiguous copy at
a cut may take another code path."""

_SEED = 20260222

# ---------------------------------------------------------------------- running


@contextmanager
def running(what: str) -> Iterator[None]:
    """Makes a failure of the code that runs inside a VerifyError."""
    try:
        yield
    except ScplError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise VerifyError(f"{what} fails: {type(error).__name__}: {text}") from error


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Parameters, buffers, modes, gradients and random states are after the block as before it.

    Within it no parameter is constant: behind a classifier of zeros every gradient would be zero,
    and behind a layer scale of zeros every branch equal.
    """
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    constants: list[tuple[Tensor, Tensor]] = []
    try:
        with preserved(model):
            for parameter in parameters:
                parameter.grad = None
                if _is_constant(parameter):
                    constants.append((parameter, parameter.detach().clone()))
                    _vary(parameter)
            yield
    finally:
        for constant, value in constants:
            constant.data.copy_(value)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _is_constant(parameter: Tensor) -> bool:
    if not parameter.is_floating_point() or parameter.numel() == 0:
        return False
    low, high = torch.aminmax(parameter.detach())
    return bool(low == high)


def _vary(parameter: Tensor) -> None:
    """Other values of the same sign, up to a tenth larger; for zeros, from 0 to 0.1."""
    noise = torch.rand(parameter.shape, generator=_generator()).to(parameter) / 10
    value = parameter.data
    value.copy_(value * (1 + noise) if value.any() else noise)


@contextmanager
def same_start(model: nn.Module) -> Iterator[None]:
    """Runs the block from a fixed random state; what it changes in the model is put back."""
    with preserved(model):
        torch.default_generator.manual_seed(_SEED)
        np.random.seed(_SEED)
        random.seed(_SEED)
        yield


@contextmanager
def stops_open(stages: Sequence[nn.Module]) -> Iterator[None]:
    """The gradient passes the stages' stops inside."""
    stops = [m for stage in stages for m in stage.modules() if isinstance(m, StopGradient)]
    try:
        for stop in stops:
            stop.is_open = True
        yield
    finally:
        for stop in stops:
            stop.is_open = False


def copies(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Leaves of their own, because a model may write its inputs in place."""
    return tuple(v.detach().clone().requires_grad_(v.requires_grad) for v in inputs)


# ---------------------------------------------------------------------- comparing


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest finite element; infinity for other shapes or NaN.

    Equal infinities differ by nothing (the bounds of a clamp that is off).
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    wide, truth = actual.detach().double(), expected.detach().double()
    gap = (wide - truth).abs().masked_fill(wide == truth, 0.0).max()
    scale = truth.abs().masked_fill(truth.isinf(), 0.0).max().clamp_min(1e-12)
    worst = float(gap / scale)
    return worst if worst == worst else float("inf")


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)


def weighted(value: Tensor) -> Tensor:
    """A scalar in which every element counts differently."""
    return (value * torch.randn(value.shape, generator=_generator()).to(value)).sum()


Print = tuple[float, ...]
"""Norm of a gradient, and its products with two fixed random vectors."""


_CHUNK = 2**16
"""Elements of a gradient that are in double precision at a time."""


def _fingerprint(gradient: Tensor, noise: Tensor) -> Print:
    """Two gradients whose difference is d differ in these products by about |d|.

    Kept instead of the gradient: a set of gradients would cost the memory of the parameters.
    noise: float64 (2, _CHUNK). Each chunk has a weight of its own, so that their order counts.
    """
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    square, products = 0.0, torch.zeros(2, dtype=torch.float64)
    for i, chunk in enumerate(gradient.detach().flatten().split(_CHUNK)):
        values = chunk.to("cpu", torch.float64)
        square += float(values.dot(values))
        products += (1 + i % 16 / 16) * (noise[:, : len(values)] @ values)
    return (square**0.5, *products.tolist())


@contextmanager
def taken_gradients(leaves: Mapping[str, Tensor]) -> Iterator[dict[str, Print]]:
    """The fingerprints of the gradients that a backward inside gives; none of them is kept."""
    prints: dict[str, Print] = {}
    noise = torch.randn(2, _CHUNK, generator=_generator()).double()

    def take(name: str, leaf: Tensor) -> None:
        assert leaf.grad is not None
        prints[name] = _fingerprint(leaf.grad, noise)
        leaf.grad = None

    hooks = [
        leaf.register_post_accumulate_grad_hook(partial(take, name))
        for name, leaf in leaves.items()
        if leaf.requires_grad
    ]
    try:
        yield prints
    finally:
        for hook in hooks:
            hook.remove()


def compare_gradients(
    actual: Mapping[str, Print], expected: Mapping[str, Print], sides: tuple[str, str]
) -> float:
    """The largest difference of a gradient relative to its norm.

    Raises:
        VerifyError: it is too large, not finite, or there on one of the `sides` only.
    """
    if odd := sorted(actual.keys() ^ expected.keys()):
        raise VerifyError(f"{odd[0]!r} gets a gradient only in {sides[odd[0] in expected]}")
    largest = max((norm for norm, *_ in expected.values()), default=0.0)
    worst = 0.0
    for name, truth in expected.items():
        for side, found in zip(sides[::-1], (truth, actual[name]), strict=True):
            if not all(map(math.isfinite, found)):
                raise VerifyError(f"the gradient of {name!r} is not finite in {side}")
        scale = max(truth[0], 1e-5 * largest, 1e-30)
        off = max(abs(a - b) for a, b in zip(actual[name], truth, strict=True)) / scale
        worst = max(worst, off)
        if not off <= 10 * RTOL:
            raise VerifyError(f"the gradient of {name!r} differs by {off:.1e} of its norm")
    return worst
