"""`scpl bench kernels`: the contrastive loss on the device at hand, beside its alternatives.

::

    sizes x candidates ─▶ time, memory, error ─▶ kernels.csv · kernels.png · a table

A size that would not fit, or would take too long, is a row with the reason in place of figures.
"""

import csv
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scpl_compile.errors import ScplError
from scpl_compile.kernels import supcon_loss

__all__ = [
    "Row",
    "bench_kernels",
    "bench_offline",
    "candidates",
    "memory_note",
    "naive",
    "released",
]

Loss = Callable[[Tensor, Tensor], Tensor]

TEMPERATURE = 0.1
BYTES = {
    "fused": 0, "eager": 34, "compiled": 28, "metric learning": 53, "released": 42, "inf-cl": 0,
}  # fmt: skip
"""Of peak memory, for each element of the B x B matrix, measured on CPU in float32."""
SAME = ("fused", "eager", "compiled", "released")
"""Of the same loss: metric learning takes another mean, inf-cl one positive for each anchor."""
SIZES = ((256, 1024, 4096, 16384, 65536), (64, 128, 512, 2048))
QUICK = ((256, 1024), (64, 128))
LIMIT_S = 20.0
ERROR_BATCH = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One candidate at one size.

    Times in ms of forward and backward, and the medians of each alone; memory in MiB above what was
    held before. error: of the gradient against float64, relative, in the Euclidean norm, where the
    candidate computes the same loss. roofline_ms: 6 B² D operations at the rate of a product of
    large matrices of the dtype on this device.
    """

    device: str
    batch: int
    dim: int
    dtype: str
    candidate: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    peak_mib: float | None = None
    error: float | None = None
    roofline_ms: float | None = None
    note: str = ""


def naive(features: Tensor, labels: Tensor) -> Tensor:
    """The released SCPL loss as one writes it in torch, in the dtype of the features."""
    z = torch.nn.functional.normalize(features, dim=1)
    others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    positives = (labels[:, None] == labels) & others
    logits = z @ z.T / TEMPERATURE
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    log_sum = (logits.exp() * others).sum(dim=1, keepdim=True).log()
    return -((logits - log_sum) * positives).sum(1).div(positives.sum(1) + 1).mean()


def released(features: Tensor, labels: Tensor) -> Tensor:
    """The loss of the released SCPL code (minyaho/scpl, model/loss_fn.py), with its operations: in
    float32, masks of float32, the diagonal by scatter, and taken out after the exponential. A batch
    of one gives NaN, where ours gives 0.
    """
    z = torch.nn.functional.normalize(features.float(), dim=1)
    same = torch.eq(labels[:, None], labels[None, :]).float()
    numbers = torch.arange(len(z), device=z.device)[:, None]
    others = torch.scatter(torch.ones_like(same), 1, numbers, 0)
    logits = torch.div(torch.matmul(z, z.T), TEMPERATURE)
    logits = logits - torch.max(logits, dim=1, keepdim=True).values.detach()
    log_sum = torch.log((torch.exp(logits) * others).sum(1, keepdim=True))
    log_probability = (same * others * (logits - log_sum)).sum(1)
    return -(log_probability / same.sum(1)).mean()


def candidates(compiled: bool, device: str = "cpu") -> dict[str, Loss]:
    """The losses by name; torch.compile of the naive one, where asked, takes seconds a size.

    On "cuda" also the released formula and, where the package inf_cl is installed, its loss.
    """
    found: dict[str, Loss] = {"fused": lambda f, y: supcon_loss(f, y, temperature=TEMPERATURE)}
    found["eager"] = naive
    if compiled:
        found["compiled"] = torch.compile(naive, dynamic=False)
    if find_spec("pytorch_metric_learning"):
        losses = import_module("pytorch_metric_learning.losses")
        found["metric learning"] = losses.SupConLoss(temperature=TEMPERATURE)
    if device == "cuda":
        found["released"] = released
        if find_spec("inf_cl"):
            found["inf-cl"] = _inf_cl(import_module("inf_cl").cal_inf_loss)
    return found


def _inf_cl(cal_inf_loss: Callable[..., Tensor]) -> Loss:
    """InfoNCE of the batch with itself: the same products, and one positive for each anchor."""

    def loss(features: Tensor, _: Tensor) -> Tensor:
        z = torch.nn.functional.normalize(features.float(), dim=1)
        return cal_inf_loss(z, z, scale=z.new_tensor(1 / TEMPERATURE), head_dim=min(256, z.size(1)))

    return loss


def bench_kernels(out: Path, quick: bool) -> list[Row]:
    """Measure, print a table to stderr, write kernels.csv and kernels.png into `out`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
    batches, dims = QUICK if quick else SIZES
    losses = candidates(compiled=not quick, device=device)
    rates = {dtype: _flops_per_second(device, dtype) for dtype in dtypes}
    rows = [
        _measure(name, loss, batch, dim, dtype, device, rates[dtype])
        for dtype in dtypes
        for dim in dims
        for batch in batches
        for name, loss in losses.items()
    ]
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "kernels.csv", rows)
    _plot(out / "kernels.png", rows)
    _print(rows)
    return rows


def bench_offline(names: str = "") -> None:
    """Compile the kernels whose names match for all architectures, and print what came out.

    Raises:
        ScplError: Triton is missing, or a kernel exceeds its budget.
    """
    if not find_spec("triton"):
        raise ScplError("--offline compiles the kernels: it needs the package triton")
    offline = import_module("scpl_compile.kernels.offline")
    found = offline.facts(names=names)
    lines = [
        (architecture, name, *("" if value is None else str(value) for value in facts.values()))
        for architecture, kernels in found.items()
        for name, facts in kernels.items()
    ]
    columns = [field.name for field in fields(offline.Facts)]
    _table(("architecture", "kernel", *columns), lines)
    if exceeded := offline.over_budget(found):
        raise ScplError("; ".join(exceeded))


def _measure(
    name: str, loss: Loss, batch: int, dim: int, dtype: torch.dtype, device: str, rate: float
) -> Row:
    base = Row(
        device=_device_name(device),
        batch=batch,
        dim=dim,
        dtype=str(dtype).removeprefix("torch."),
        candidate=name,
        roofline_ms=6e3 * batch**2 * dim / rate,
    )
    if reason := _too_large(name, batch, dim, device, rate):
        return _with(base, note=f"skipped: {reason}")
    features, labels = _inputs(batch, dim, dtype, device)

    def both() -> None:
        features.grad = None
        loss(features, labels).backward()

    def forward() -> Tensor:
        features.grad = None
        return loss(features, labels)

    try:
        both()
        times = _times(lambda _: both(), device)
        return _with(
            base,
            median_ms=statistics.median(times),
            p20_ms=times[len(times) // 5],
            p80_ms=times[-1 - len(times) // 5],
            forward_ms=statistics.median(_times(lambda _: forward(), device)),
            backward_ms=statistics.median(_times(Tensor.backward, device, forward)),
            peak_mib=_peak_mib(both, device),
            error=_error(loss, features, labels) if name in SAME and batch <= ERROR_BATCH else None,
        )
    except torch.OutOfMemoryError as error:
        return _with(base, note=f"out of memory: {str(error).splitlines()[0]}")


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def _with(row: Row, **changes: object) -> Row:
    return Row(**{**asdict(row), **changes})


def _inputs(batch: int, dim: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, dim, generator=generator).to(device, dtype)
    num_classes = max(2, min(100, batch // 8))
    labels = torch.randint(0, num_classes, (batch,), generator=generator)
    return features.requires_grad_(), labels.to(device)


def _too_large(name: str, batch: int, dim: int, device: str, rate: float) -> str:
    """Why a size is left out, or nothing: over half of the free memory, or too long."""
    if reason := memory_note(name, batch, device):
        return reason
    seconds = 10 * 6 * batch**2 * dim / rate
    return f"about {seconds:.0f} s for a call" if seconds > LIMIT_S else ""


def memory_note(name: str, batch: int, device: str) -> str:
    """What a candidate would need, where that is over half of the free memory; else nothing."""
    needed = BYTES[name] * batch**2
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else _free_bytes()
    return f"{needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free" if needed > free / 2 else ""


def _free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _times(
    run: Callable[[Any], object], device: str, prepare: Callable[[], object] = lambda: None
) -> list[float]:
    """ms, sorted: at least 5 calls, else as many as half a second holds.

    run takes what `prepare` gave just before, whose time does not count.
    """
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 500 and len(times) < 200):
        prepared = prepare()
        _synchronize(device)
        start = time.perf_counter()
        run(prepared)
        _synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_mib(run: Callable[[], None], device: str) -> float | None:
    """Above what is held now: torch's allocator, or the resident memory where Linux tells it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc
        trim(0)  # a call that reuses freed heap would seem to need nothing
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def _error(loss: Loss, features: Tensor, labels: Tensor) -> float:
    truth = features.detach().double().requires_grad_()
    supcon_loss(truth, labels, temperature=TEMPERATURE).backward()
    features.grad = None
    loss(features, labels).backward()
    assert features.grad is not None and truth.grad is not None
    return ((features.grad.double() - truth.grad).norm() / truth.grad.norm()).item()


def _flops_per_second(device: str, dtype: torch.dtype) -> float:
    """Of a product of two large matrices (whether float32 is TF32 is torch's own choice)."""
    size = 1024 if device == "cpu" else 8192
    left = torch.randn(size, size, device=device).to(dtype)
    torch.mm(left, left)
    return 2 * size**3 / (_times(lambda _: torch.mm(left, left), device)[0] / 1e3)


def _write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def _plot(path: Path, rows: Sequence[Row]) -> None:
    """Time by batch, a panel for each (dtype, dim); nothing where matplotlib is missing."""
    if not find_spec("matplotlib"):
        return
    os.environ.setdefault("MPLBACKEND", "Agg")
    pyplot = import_module("matplotlib.pyplot")
    panels = sorted({(row.dtype, row.dim) for row in rows})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.5), squeeze=False)
    for axis, (dtype, dim) in zip(axes[0], panels, strict=True):
        shown = [row for row in rows if (row.dtype, row.dim) == (dtype, dim) and row.median_ms]
        for name in dict.fromkeys(row.candidate for row in shown):
            line = [(row.batch, row.median_ms) for row in shown if row.candidate == name]
            axis.plot(*zip(*line, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", title=f"{dtype}, D = {dim}", xlabel="batch")
    axes[0][0].set_ylabel("forward and backward, ms")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _print(rows: Sequence[Row]) -> None:
    names = [f.name for f in fields(Row) if f.name not in ("device", "p20_ms", "p80_ms")]

    def cells(row: Row) -> Iterator[str]:
        for name in names:
            value = getattr(row, name)
            number = f"{value:.3g}" if isinstance(value, float) else str(value)
            yield "" if value is None else number

    _table(names, [tuple(cells(row)) for row in rows])


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """To stderr."""
    shown = import_module("rich.table").Table(*columns)
    for line in lines:
        shown.add_row(*line)
    import_module("rich.console").Console(stderr=True, markup=False).print(shown)
