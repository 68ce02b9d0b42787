"""Tables and pictures of results.csv: `report.md`, `curves.png`, `wall_clock.png`, `losses.png`."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import matplotlib

from benchmarks.accuracy.cases import METHODS, TASKS
from benchmarks.measure import read_rows

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402

__all__ = ["write"]

_TEST = "test accuracy"
_VALIDATION = "validation accuracy"


@dataclass(frozen=True)
class Figures:
    """All values of results.csv by (task, K, budget), candidate and metric, over the seeds."""

    values: Mapping[tuple[str, str, str], Mapping[str, Mapping[str, Sequence[float]]]]

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, str]]) -> "Figures":
        """Rows of other cases than cases.py makes are left out."""
        found: dict[tuple[str, str, str], dict[str, dict[str, list[float]]]] = {}
        for row in rows:
            parts = row["case"].split(", ")
            if parts[0] not in TASKS or not parts[-1].startswith("seed "):
                continue
            key = (", ".join(parts[:-3]), parts[-3], parts[-2])
            values = found.setdefault(key, {}).setdefault(row["candidate"], defaultdict(list))
            values[row["metric"]].append(float(row["value"]))
        return cls(found)

    def get(self, task: str, k: int, budget: str, candidate: str, metric: str) -> Sequence[float]:
        """One value per seed; bp, which does not depend on the cuts, from its two stages."""
        stages = 2 if candidate == "bp" else k
        by_candidate = self.values.get((task, f"K={stages}", budget), {})
        return by_candidate.get(candidate, {}).get(metric, ())


def write(results: Path) -> None:
    """Everything beside `results`."""
    figures = Figures.of(read_rows(results))
    text = "\n\n".join([_accuracies(figures), _costs(figures)])
    results.with_name("report.md").write_text(f"# What results.csv says\n\n{text}\n")
    _curves(figures, results.with_name("curves.png"))
    _wall_clock(figures, results.with_name("wall_clock.png"))


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def _accuracies(figures: Figures) -> str:
    lines = [
        "Accuracy on the test split in %, mean and standard deviation of the seeds. *equal time*: two "
        "stages on two cores, as long as backpropagation over the same two stages takes.",
        "",
        "| model | method | K = 2 | K = 4 | K = 2, equal time | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        for name in METHODS:
            found = [
                figures.get(task, k, budget, name, _TEST)
                for k, budget in ((2, "equal epochs"), (4, "equal epochs"), (2, "equal time"))
            ]
            if name == "bp":
                found = [found[0]] * 3
            if any(found):
                shown = " | ".join(map(_spread, found))
                lines.append(f"| {task} | {name} | {shown} | {max(map(len, found))} |")
    return "\n".join(lines)


def _costs(figures: Figures) -> str:
    lines = [
        "What the heads add, for one training step: parameters, FLOPs (matrix products and "
        "convolutions, forward and backward), peak memory of one process; a step of `stream` on two "
        "ranks over one of bp on the same two.",
        "",
        "| model | method | K | parameters | FLOPs | memory, MiB | step over bp's |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        for name in METHODS:
            for k in (2,) if name == "bp" else (2, 4):
                lines += _cost_line(figures, task, name, k)
    return "\n".join(lines)


def _cost_line(figures: Figures, task: str, name: str, k: int) -> list[str]:
    def one(metric: str, candidate: str = name) -> float | None:
        return next(iter(figures.get(task, k, "equal epochs", candidate, metric)), None)

    flops, whole = one("FLOPs of a training step"), one("FLOPs of a training step", "bp")
    heads, model = one("parameters of heads"), one("parameters of the model")
    if None in (flops, whole, heads, model):
        return []
    assert flops and whole and model and heads is not None, "checked above"
    share, memory = one("step time over bp's"), one("peak memory")
    told = "" if share is None or name == "bp" else f"{share:.2f}"
    added = f"+{100 * heads / model:.1f} % | {100 * (flops / whole - 1):+.1f} %"
    return [f"| {task} | {name} | {k} | {added} | {memory:.0f} | {told} |"]


def _curve(figures: Figures, task: str, k: int, name: str) -> list[float]:
    """Mean validation accuracy after every epoch."""
    means = []
    while values := figures.get(
        task, k, "equal epochs", name, f"{_VALIDATION}, epoch {len(means) + 1}"
    ):
        means.append(mean(values))
    return means


def _curves(figures: Figures, path: Path) -> None:
    """Validation accuracy by epoch: a row per model, a column per K."""
    figure, axes = plt.subplots(len(TASKS), 2, figsize=(10, 3.2 * len(TASKS)), sharex="row",
                                sharey="row", layout="constrained")  # fmt: skip
    for line, task in zip(axes, TASKS, strict=True):
        for axis, k in zip(line, (2, 4), strict=True):
            for name in METHODS:
                if curve := _curve(figures, task, k, name):
                    axis.plot(range(1, len(curve) + 1), curve, marker="o", label=name)
            axis.set(title=f"{task}, K = {k}", xlabel="epoch", ylabel="validation accuracy, %")
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _wall_clock(figures: Figures, path: Path) -> None:
    """Validation accuracy by time on two cores: epochs times the measured time of a step."""
    figure, axes = plt.subplots(1, len(TASKS), figsize=(4.2 * len(TASKS), 4), layout="constrained")
    for axis, task in zip(axes, TASKS, strict=True):
        for name in METHODS:
            curve = _curve(figures, task, 2, name)
            shares = figures.get(task, 2, "equal epochs", name, "step time over bp's")
            share = 1.0 if name == "bp" else next(iter(shares), None)
            if curve and share is not None:
                axis.plot([share * i for i in range(1, len(curve) + 1)], curve, "o-", label=name)
        axis.set(title=f"{task}, K = 2 on two cores", xlabel="time, in epochs of bp on the same two",
                 ylabel="validation accuracy, %")  # fmt: skip
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
