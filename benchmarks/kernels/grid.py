"""The triangle rule over a grid: the error of a loss against float64 is at most that of torch in
the same dtype, and a stated tolerance.

    python benchmarks/kernels/grid.py chunked
    TRITON_INTERPRET=1 python benchmarks/kernels/grid.py triton

checks all cases and prints those that fail. tests/kernels checks a part of them in every run.
"""

import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scpl_compile.kernels import supcon_loss  # noqa: E402
from scpl_compile.kernels.reference import supcon_reference  # noqa: E402

__all__ = [
    "CASES",
    "Case",
    "Loss",
    "broken",
    "eager_formula",
    "loss_and_gradient",
    "random_batch",
    "triangle",
]

Loss = Callable[..., Tensor]

SHAPES = (
    (1, 7), (2, 1), (3, 300), (31, 17), (64, 64), (65, 33), (97, 128), (129, 20), (130, 259),
    (200, 1), (257, 129), (300, 48),
)  # fmt: skip
"""(B, D), most of them no multiple of any block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """classes: "few", "one" or "distinct". rows: "plain", "duplicated" or "zero" (some of them)."""

    batch: int
    dim: int
    dtype: torch.dtype
    temperature: float
    classes: str
    rows: str
    divisor: str
    reduction: str

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Features of every length and labels of every sign; the same at every call."""
        features, labels = random_batch(
            self.batch, self.dim, max(2, self.batch // 6), self.dtype, seed=0
        )  # fmt: skip
        features *= torch.logspace(-1, 1, self.batch, dtype=torch.float64)[:, None]
        if self.rows == "duplicated":
            features[self.batch // 2 :] = features[: self.batch - self.batch // 2].clone()
        elif self.rows == "zero":
            features[:: max(2, self.batch // 3)] = 0
        if self.classes == "one":
            labels = torch.full_like(labels, -7)
        elif self.classes == "distinct":
            labels = torch.arange(self.batch) * 2**40 - 2**45
        return features, labels


def _cases() -> tuple[Case, ...]:
    """Every shape, dtype, temperature and kind of labels; the other choices are drawn."""
    draw = random.Random(0)
    return tuple(
        Case(
            batch=batch,
            dim=dim,
            dtype=dtype,
            temperature=temperature,
            classes=classes,
            rows=draw.choice(("plain", "duplicated", "zero")),
            divisor=draw.choice(("scpl", "khosla")),
            reduction=draw.choice(("mean", "none")),
        )
        for (batch, dim), dtype, temperature, classes in itertools.product(
            SHAPES,
            (torch.float32, torch.bfloat16, torch.float16),
            (1.0, 0.1, 0.03, 0.005),
            ("few", "one", "distinct"),
        )
    )


CASES = _cases()


def random_batch(
    batch: int, dim: int, classes: int, dtype: torch.dtype = torch.float64, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Features (batch, dim) and labels (batch,) below `classes`; seed None draws one."""
    generator = torch.Generator()
    generator.manual_seed(int(torch.randint(2**40, ()).item()) if seed is None else seed)
    features = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    return features.to(dtype), torch.randint(0, classes, (batch,), generator=generator)


def loss_and_gradient(
    loss_fn: Loss, features: Tensor, labels: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of its sum with weights 1, 2, 3, 1, 2, 3 and so on; 2 for one."""
    leaf = features.detach().requires_grad_()
    loss = loss_fn(leaf, labels, **options)
    weights = (torch.arange(loss.numel(), device=loss.device) + (loss.dim() == 0)) % 3 + 1
    (grad,) = torch.autograd.grad((loss * weights.view(loss.shape)).sum(), leaf)
    return loss.detach(), grad


def eager_formula(features: Tensor, labels: Tensor, **options: object) -> Tensor:
    """The loss as one writes it in torch, every step in the dtype of the features."""
    temperature = options["temperature"]
    assert isinstance(temperature, float)
    z = torch.nn.functional.normalize(features, dim=1) if options["normalize"] else features
    logits = z @ z.T / temperature
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    lowest = torch.finfo(logits.dtype).min  # not -inf: a batch of one has a gradient then
    log_probability = logits - logits.masked_fill(itself, lowest).logsumexp(1, keepdim=True)
    is_positive = (labels[:, None] == labels) & ~itself
    count = is_positive.sum(1)
    divisors = count + 1 if options["divisor"] == "scpl" else count.clamp_min(1)
    losses = -log_probability.where(is_positive, 0).sum(1) / divisors
    if options["reduction"] == "none":
        return losses
    anchors = len(labels) if options["divisor"] == "scpl" else (count > 0).sum().clamp_min(1)
    return losses.sum() / anchors


def triangle(
    loss_fn: Loss,
    features: Tensor,
    labels: Tensor,
    *,
    roundings: int = 1,
    **options: object,
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(error, what is allowed) of the loss and of the gradient; NaN never passes.

    Allowed are torch's own error (where torch gives NaN: nothing), `roundings` of the dtype of the
    features and float32 rounding of the logits, of the largest element; and, where larger terms
    cancel, the rounding of a logit in the loss, and in the gradient that of a row's and a column's
    times the largest weight, and the least step of the dtype. A normalised row's gradient is taken
    times its length.
    """
    temperature = options["temperature"]
    assert isinstance(temperature, float)
    truth = loss_and_gradient(supcon_reference, features.double(), labels, **options)
    eager = loss_and_gradient(eager_formula, features, labels, **options)
    ours = loss_and_gradient(loss_fn, features, labels, **options)
    bound, lengths = 1.0, torch.linalg.vector_norm(features.double(), dim=1, keepdim=True)
    if not options["normalize"]:
        bound, lengths = lengths.square().max().item(), torch.ones_like(lengths)
    logit = bound / temperature
    info = torch.finfo(features.dtype)
    slack = roundings * info.eps + 2e-7 * (1 + logit)
    weight = 3 if options["reduction"] == "none" else 1  # the mean's 2 is for all anchors together
    least = info.smallest_normal * info.eps * lengths.max().item()
    cancelled = 2e-7 * (1 + logit), 2e-7 * (1 + logit) * 2 * weight + least
    results = []
    for exact, by_torch, value, floor in zip(truth, eager, ours, cancelled, strict=True):
        fits = exact.abs() <= torch.finfo(value.dtype).max  # a row of zeros has a huge gradient
        unit = lengths.clamp_min(1e-12) if exact.dim() == 2 else torch.ones_like(exact)
        by_torch, error = ((t.double() - exact) * unit for t in (by_torch, value))
        scale = (exact * unit).where(fits, 0.0).abs().max().item()
        of_torch = by_torch.where(fits, 0.0).abs().max().nan_to_num(0, 0).item()
        error = error.where(fits | value.isnan(), 0.0).abs().max().item()
        results.append((error, of_torch + slack * scale + floor))
    return results[0], results[1]


def broken(loss_fn: Loss, case: Case, roundings: int = 1) -> str:
    """What of the case fails, in a sentence; nothing where it holds."""
    features, labels = case.inputs()
    results = triangle(
        loss_fn,
        features,
        labels,
        roundings=roundings,
        temperature=case.temperature,
        divisor=case.divisor,
        reduction=case.reduction,
        normalize=True,
    )
    for name, (error, allowed) in zip(("loss", "gradient"), results, strict=True):
        if not error <= allowed:
            return f"{case}: the {name} is off by {error:.3g}, allowed are {allowed:.3g}"
    return ""


def main(impl: str) -> int:
    """All cases by one implementation; the number that fail."""
    roundings = 3 if impl == "triton" else 1  # the interpreter rounds bfloat16 towards zero
    found = [broken(partial(supcon_loss, impl=impl), case, roundings) for case in CASES]
    failures = [sentence for sentence in found if sentence]
    print("\n".join([*failures, f"{len(CASES)} cases, {len(failures)} fail"]))
    return len(failures)


if __name__ == "__main__":
    sys.exit(bool(main(*sys.argv[1:])))
