"""Tables and pictures of results.csv: report.md, and a .png for each question."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import matplotlib

from benchmarks.accuracy.cases import (
    AGREEMENTS,
    CONFIDENCES,
    METHODS,
    SOONER,
    TASKS,
    VARIANTS,
    WITH_EXITS,
)
from benchmarks.measure import read_rows

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

__all__ = ["write"]

_TEST = "test accuracy"
_VALIDATION = "validation accuracy"
_SHARE = "step time over bp's"
_MAY_LOSE = 0.3
_SHOWN = 25.0
"""Points of accuracy that a picture shows at most; what lies below is in report.md."""
Point = tuple[float, Sequence[float]]


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
        """One value per seed; of what was not trained by itself, that of the run that stands for it
        (cases.py): bp does not depend on the cuts and has two stages, and the default may have been
        trained with exits.
        """
        stages = 2 if candidate == "bp" else k
        by_candidate = self.values.get((task, f"K={stages}", budget), {})
        names = (candidate, "scpl with exits") if candidate == "scpl" else (candidate,)
        for name in names:
            if found := by_candidate.get(name, {}).get(metric, ()):
                return found
        return ()


def write(results: Path) -> None:
    """Everything beside `results`."""
    figures = Figures.of(read_rows(results))
    parts = [
        _accuracies(figures), _costs(figures), _exits(figures), _variants(figures), _hours(figures)
    ]  # fmt: skip
    text = "\n\n".join(part for part in parts if part)
    results.with_name("report.md").write_text(f"# What results.csv says\n\n{text}\n")
    _curves(figures, results.with_name("curves.png"))
    _wall_clock(figures, results.with_name("wall_clock.png"))
    _exit_curves(figures, results.with_name("exits.png"))
    _answers(figures, results.with_name("answers.png"))


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def _accuracies(figures: Figures) -> str:
    lines = [
        "Accuracy on the test split in %, mean and standard deviation of the seeds. *equal time*: "
        "two stages on two cores, as long as naive backpropagation over the same two takes.",
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
    values = {task: figures.get(task, 2, SOONER, "scpl", _TEST) for task in TASKS}
    sooner = [f"{task} {_spread(found)}" for task, found in values.items() if found]
    if sooner:
        lines += ["", f"The default in nine tenths of that time: {', '.join(sooner)}."]
    return "\n".join(lines)


def _costs(figures: Figures) -> str:
    lines = [
        "What the heads add, for one training step: parameters, FLOPs (matrix products and "
        "convolutions, forward and backward). Memory of one process: parameters, gradients and "
        "optimizer, + what a step takes besides. A step of `stream` on two ranks over one of "
        "naive bp on the same two, of which one always waits; (ddp): the unsplit model on both, "
        "half of the batch on each.",
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
    share, memory, step = one(_SHARE), one("memory held"), one("peak memory")
    if name == "bp":
        share = one(_SHARE, "ddp")
    told = "" if share is None else f"{share:.2f}{' (ddp)' if name == 'bp' else ''}"
    added = f"+{100 * heads / model:.1f} % | {100 * (flops / whole - 1):+.1f} %"
    return [f"| {task} | {name} | {k} | {added} | {memory:.0f} + {step:.0f} | {told} |"]


def _curve(figures: Figures, task: str, k: int, name: str) -> list[float]:
    """Mean validation accuracy after every epoch."""
    means = []
    while values := figures.get(
        task, k, "equal epochs", name, f"{_VALIDATION}, epoch {len(means) + 1}"
    ):
        means.append(mean(values))
    return means


def _trained(figures: Figures) -> list[str]:
    """The tasks of which there are rows."""
    return [task for task in TASKS if any(_curve(figures, task, 2, name) for name in METHODS)]


def _curves(figures: Figures, path: Path) -> None:
    """Validation accuracy by epoch: a row per model, a column per K."""
    tasks = _trained(figures)
    figure, axes = plt.subplots(len(tasks), 2, figsize=(10, 3.2 * len(tasks)), sharex="row",
                                sharey="row", layout="constrained", squeeze=False)  # fmt: skip
    for line, task in zip(axes, tasks, strict=True):
        for axis, k in zip(line, (2, 4), strict=True):
            for color, name in enumerate(METHODS):
                if curve := _curve(figures, task, k, name):
                    epochs = range(1, len(curve) + 1)
                    axis.plot(epochs, curve, "o-", color=f"C{color}", label=name)
            axis.set(title=f"{task}, K = {k}", xlabel="epoch", ylabel="validation accuracy, %")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
        lowest, highest = line[0].get_ylim()
        line[0].set_ylim(bottom=max(lowest, highest - _SHOWN))
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _wall_clock(figures: Figures, path: Path) -> None:
    """Validation accuracy by time on two cores: epochs times the measured time of a step."""
    tasks = _trained(figures)
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(4.8 * len(tasks), 4), layout="constrained", squeeze=False
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        for color, name in enumerate(METHODS):
            curve = _curve(figures, task, 2, name)
            shares = figures.get(task, 2, "equal epochs", name, _SHARE)
            share = 1.0 if name == "bp" else next(iter(shares), None)
            if curve and share is not None:
                times = [share * i for i in range(1, len(curve) + 1)]
                axis.plot(times, curve, "o-", color=f"C{color}", label=name)
        lowest, highest = axis.get_ylim()
        axis.set_ylim(bottom=max(lowest, highest - _SHOWN))
        axis.set(
            title=f"{task}, K = 2 on two cores",
            xlabel="time, in epochs of bp on the same two",
            ylabel="validation accuracy, %",
        )
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _exit_points(
    figures: Figures, task: str, name: str, split: str, rules: Sequence[str]
) -> list[list[tuple[float, float]]]:
    """For every rule (compute, accuracy) of each seed, in %; none where compute is unknown."""
    found = []
    for rule in rules:
        columns = (
            figures.get(task, 4, "equal epochs", name, f"{split} {what}, {rule}")
            for what in ("compute", "accuracy")
        )
        found.append(list(zip(*columns, strict=False)))
    return found


def _chosen(
    figures: Figures, task: str, name: str, rules: Sequence[str] = CONFIDENCES
) -> list[tuple[float, float, float]]:
    """Per seed (compute, accuracy, accuracy at full depth) on the test split, in %.

    Of the rules that lose at most 0.3 points on the validation split the one that computes least
    there; where all lose more, the last.
    """
    validation = _exit_points(figures, task, name, "validation", rules)
    test = _exit_points(figures, task, name, "test", rules)
    full = figures.get(task, 4, "equal epochs", name, _VALIDATION)
    told = figures.get(task, 4, "equal epochs", name, _TEST)
    found = []
    for seed in range(min(map(len, validation), default=0)):
        kept = [
            i for i, points in enumerate(validation) if points[seed][1] >= full[seed] - _MAY_LOSE
        ]
        best = min(kept, key=lambda i: validation[i][seed][0], default=len(validation) - 1)
        found.append((*test[best][seed], told[seed]))
    return found


def _exits(figures: Figures) -> str:
    lines = [
        "Leaving early, four stages: the limit that computes least among those that lose at "
        f"most {_MAY_LOSE} points on the validation split; figures of the test split, in %.",
        "",
        "| model | method | rule | compute | accuracy | accuracy at full depth | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        for name in ("early_exit", "predsim", "deinforeg", *WITH_EXITS):
            for kind, rules in (("confidence", CONFIDENCES), ("agreement", AGREEMENTS)):
                if rows := _chosen(figures, task, name, rules):
                    shown = " | ".join(_spread(column) for column in zip(*rows, strict=True))
                    lines.append(f"| {task} | {name} | {kind} | {shown} | {len(rows)} |")
    return "\n".join(lines) if len(lines) > 4 else ""


def _exit_curves(figures: Figures, path: Path) -> None:
    """Accuracy against compute on the test split, mean of the seeds."""
    tasks = [task for task in TASKS if any(_chosen(figures, task, name) for name in WITH_EXITS)]
    if not tasks:
        return
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(5 * len(tasks), 4), layout="constrained", squeeze=False
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        for color, name in enumerate(("early_exit", *WITH_EXITS)):
            _draw_exits(axis, figures, task, name, f"C{color}")
        axis.set(title=f"{task}, K = 4", xlabel="compute, % of full depth",
                 ylabel="test accuracy, % (dotted: full depth)")  # fmt: skip
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_exits(axis: Axes, figures: Figures, task: str, name: str, color: str) -> None:
    for rules, style, kind in ((CONFIDENCES, "o-", "confidence"), (AGREEMENTS, "s", "agreement")):
        points = [
            tuple(map(mean, zip(*seeds, strict=True)))
            for seeds in _exit_points(figures, task, name, "test", rules)
            if seeds
        ]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=color, label=f"{name}, {kind}")
    if full := figures.get(task, 4, "equal epochs", name, _TEST):
        axis.axhline(mean(full), linestyle=":", color=color)


def _answers(figures: Figures, path: Path) -> None:
    """What reviewers asked, on resnet18: how many losses, which batch, what two views cost."""
    if not figures.get("resnet18", 2, "equal epochs", "scpl, batch 32", _TEST):
        return
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    test = partial(figures.get, "resnet18", budget="equal epochs", metric=_TEST)
    _points(
        axes[0],
        {"scpl": [(k, test(k=k, candidate="bp" if k == 1 else "scpl")) for k in (1, 2, 4, 8)]},
        "stages, each with a loss (1: backpropagation)",
    )
    sizes = (32, 128, 1024)
    batches = {
        name: [(b, test(k=2, candidate=name if b == 128 else f"{name}, batch {b}")) for b in sizes]
        for name in ("bp", "scpl")
    }
    _points(axes[1], batches, "batch")
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(sizes, [str(size) for size in sizes])
    _views(axes[2], figures)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _views(axis: Axes, figures: Figures) -> None:
    """Accuracy over the processor's time without augmentation, with one view, and with two."""
    of = partial(figures.get, "resnet18", 2, "equal epochs")
    lines: dict[str, list[Point]] = {}
    for name in ("bp", "scpl"):
        for told in ("not augmented", "one augmented view", "two views"):
            candidate = name if told == "not augmented" else f"{name}, {told}"
            accuracy, seconds = of(candidate, _TEST), of(candidate, "processor time")
            if accuracy and seconds:
                x = mean(seconds)
                lines.setdefault(name, []).append((x, accuracy))
                where = (x, mean(accuracy))
                axis.annotate(told, where, (0, -14), textcoords="offset points", ha="center")
    _points(axis, lines, "seconds of processor")
    axis.margins(0.25)


def _points(axis: Axes, lines: Mapping[str, list[Point]], label: str) -> None:
    """Mean and deviation over the seeds; a line per candidate."""
    for name, points in lines.items():
        known = [(x, values) for x, values in points if values]
        spread = [stdev(values) if len(values) > 1 else 0.0 for _, values in known]
        means = [mean(values) for _, values in known]
        xs, color = [x for x, _ in known], "C0" if name == "bp" else "C1"
        axis.errorbar(xs, means, spread, marker="o", capsize=3, label=name, color=color)
    axis.set(xlabel=label, ylabel="test accuracy, %", title="resnet18, equal epochs")
    axis.grid(alpha=0.3)
    axis.legend()


def _variants(figures: Figures) -> str:
    lines = [
        "Tried for the default; accuracy on the validation split in %, FLOPs of a training step "
        "over those of bp.",
        "",
        "| model | variant | K = 2 | K = 4 | FLOPs at K = 2 and 4 | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        for name in ("bp", "scpl", *VARIANTS):
            found = [figures.get(task, k, "equal epochs", name, _VALIDATION) for k in (2, 4)]
            if any(found):
                shown = " | ".join(map(_spread, found))
                added = ", ".join(_added(figures, task, k, name) for k in (2, 4))
                lines.append(f"| {task} | {name} | {shown} | {added} | {max(map(len, found))} |")
    return "\n".join(lines) if VARIANTS else ""


def _added(figures: Figures, task: str, k: int, name: str) -> str:
    metric = "FLOPs of a training step"
    own = figures.get(task, k, "equal epochs", name, metric)
    whole = figures.get(task, k, "equal epochs", "bp", metric)
    return f"{100 * (own[0] / whole[0] - 1):+.1f} %" if own and whole else "?"


def _hours(figures: Figures) -> str:
    """What the runs that `main.py` makes by itself took, so far."""
    runs = [
        values
        for (task, _, _), by_candidate in figures.values.items()
        for candidate, metrics in by_candidate.items()
        if task in TASKS and candidate not in VARIANTS and (values := metrics["processor time"])
    ]
    hours = sum(map(sum, runs)) / 3600
    fastest = sum(len(values) * min(values) for values in runs) / 3600
    return (
        f"{sum(map(len, runs))} training runs, {hours:.1f} hours of processor time, {fastest:.1f} "
        "if all seeds took as long as the fastest (training and validation; not compiling and the "
        "test split)."
    )
