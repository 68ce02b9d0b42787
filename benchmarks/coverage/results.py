"""results.csv of the coverage run: one row per model, and what it says: summary, plot, README."""

import csv
import io
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.coverage.one import NUM_STAGES
from benchmarks.coverage.zoo import FAMILIES

__all__ = ["COLUMNS", "as_row", "growth", "plot", "print_summary", "read", "refused", "write",
           "write_report"]  # fmt: skip

COLUMNS = (
    *("family", "model", "counts", "frontend", "opaque_share", "graph_nodes"),
    *(f"{name}_{k}" for k in NUM_STAGES for name in ("stage_us", "best_us", "ratio")),
    *("verified", "seconds", "cpu_seconds", "build_seconds", "error_type", "error", "opaque"),
    *("inputs", "batch", "million_parameters", "config"),
    *("threads", "machine", "versions", "commit", "date"),
)
_REFUSED = ("<!-- refused: begin -->", "<!-- refused: end -->")
_RESULT = ("<!-- result: begin -->", "<!-- result: end -->")
Row = dict[str, str]


def read(path: Path) -> dict[tuple[str, str], Row]:
    """The rows by (model, machine), in the order of the file."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {(row["model"], row["machine"]): row for row in csv.DictReader(file)}


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write results.csv, replacing it whole."""
    order = {family: i for i, family in enumerate(FAMILIES)}
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: (order.get(row["family"], 9), row["model"])))
    partial = path.with_suffix(".partial")
    partial.write_text(text.getvalue(), encoding="utf-8")
    partial.replace(path)


def as_row(found: Mapping[str, Any], common: Mapping[str, str]) -> Row:
    """The row of what one.py printed, and of the machine."""
    row = dict.fromkeys(COLUMNS, "") | dict(common)
    for column in COLUMNS:
        if column in found:
            row[column] = _cell(found[column])
    outcomes = found["outcomes"]
    for k, outcome in ((k, outcomes[str(k)]) for k in NUM_STAGES if str(k) in outcomes):
        row[f"stage_us_{k}"] = " ".join(f"{us:.0f}" for us in outcome["stage_us"])
        row[f"best_us_{k}"] = f"{outcome['best_us']:.0f}"
        row[f"ratio_{k}"] = f"{outcome['ratio']:.3f}"
    whole = bool(outcomes) and len(outcomes) == found["asked"]
    row["verified"] = _cell(whole and all(one["verified"] for one in outcomes.values()))
    row["counts"] = _cell(whole and all(one["counts"] for one in outcomes.values()))
    return row


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------- what the rows say


def refused(rows: Iterable[Row]) -> list[Row]:
    """The rows that do not count."""
    return [row for row in rows if row["counts"] != "yes"]


def growth(rows: Sequence[Row]) -> float:
    """The exponent b of seconds ~ nodes ** b over the models that were compiled (least squares)."""
    points = _points(rows)
    if len(points) < 2:
        return math.nan
    nodes, seconds = np.log(np.array(points)).T
    return float(np.polyfit(nodes, seconds, 1)[0])


def _points(rows: Iterable[Row]) -> list[tuple[float, float]]:
    """(graph nodes, seconds without building)."""
    return [
        (float(row["graph_nodes"]), float(row["seconds"]) - float(row["build_seconds"]))
        for row in rows
        if row["verified"] == "yes" and float(row["graph_nodes"] or 0) > 0
    ]


def _family_lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for family in [*FAMILIES, "all"]:
        mine = [row for row in rows if family in (row["family"], "all")]
        if not mine:
            continue
        good = [row for row in mine if row["counts"] == "yes"]
        times = [float(row["seconds"]) for row in mine if row["verified"] == "yes"]
        cpu = [float(row["cpu_seconds"]) for row in mine if row["verified"] == "yes"]
        lines.append((
            family, str(len(mine)), str(len(good)), f"{len(good) / len(mine):.1%}",
            str(sum(row["verified"] == "yes" for row in mine)),
            f"{statistics.median(times):.1f}" if times else "", f"{max(times, default=0):.1f}",
            f"{statistics.median(cpu):.1f}" if cpu else "",
        ))  # fmt: skip
    return lines


_HEAD = ("family", "models", "count", "share", "verified", "median s", "most s", "median CPU s")


def print_summary(rows: Sequence[Row]) -> None:
    """Counts by family, the growth of the time, and the errors, to stderr."""
    console = Console(stderr=True, markup=False)
    shown = Table(*_HEAD)
    for line in _family_lines(rows):
        shown.add_row(*line)
    console.print(shown)
    console.print(f"seconds grow with graph nodes ** {growth(rows):.2f}")
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for row in refused(rows):
        groups[_kind(row["error"])].append(row["model"])
    for kind, models in sorted(groups.items(), key=lambda item: -len(item[1])):
        console.print(f"{len(models):3d} x {kind}\n      {', '.join(models)}")


def _kind(error: str) -> str:
    """An error with names and numbers taken out, so that equal ones fall together."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", error)
    text = re.sub(r"\([^()]*\.\. [^()]*\)", "(…)", text)
    text = re.sub(r"\w+For\w+|\w+\.py:\d+|(?<=out: )\S+(?= is not)", "…", text)
    return re.sub(r"\b\d+(\.\d+)?(e-\d+)?%?", "#", text)[:160]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Seconds against graph nodes, both logarithmic, one colour per family."""
    import matplotlib  # noqa: PLC0415  # optional

    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0))
    for family in FAMILIES:
        points = _points(row for row in rows if row["family"] == family)
        if points:
            axes.plot(*zip(*points, strict=True), ".", label=family, alpha=0.7)
    axes.set(xscale="log", yscale="log", xlabel="nodes of the captured graph",
             ylabel="seconds, K = 2 and K = 4, verified",
             title=f"time ~ nodes ** {growth(rows):.2f}")  # fmt: skip
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def write_report(readme: Path, rows: Sequence[Row]) -> None:
    """Put the summary and the list of refused models into their marked sections of README.md."""
    text = readme.read_text(encoding="utf-8")
    text = _replaced(text, _RESULT, _result_text(rows))
    text = _replaced(text, _REFUSED, _refused_text(rows))
    readme.write_text(text, encoding="utf-8")


def _replaced(text: str, marks: tuple[str, str], new: str) -> str:
    begin, end = marks
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


def _result_text(rows: Sequence[Row]) -> str:
    lines = [_HEAD, tuple("---" for _ in _HEAD), *_family_lines(rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    machines = Counter((r["machine"], r["threads"], r["versions"], r["commit"]) for r in rows)
    taken = "\n".join(
        f"- {count} rows: {machine}, {threads} {'thread' if threads == '1' else 'threads'}; "
        f"{versions}; commit {commit}"
        for (machine, threads, versions, commit), count in machines.most_common()
    )
    return (
        f"{table}\n\nThe time grows with the number of graph nodes to the power "
        f"{growth(rows):.2f} ([plot](time.png)).\n\n{taken}"
    )


def _refused_text(rows: Sequence[Row]) -> str:
    bad = refused(rows)
    if not bad:
        return "None."
    lines = [f"| {row['model']} | {row['error'].replace('|', '/')} |" for row in bad]
    return "\n".join(["| model | error |", "|---|---|", *lines])
