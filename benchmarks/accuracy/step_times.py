"""Time of a training step on two ranks, one core each: a method streaming, bp in turn, and ddp."""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.accuracy.cases import TASKS, Case
from benchmarks.measure import Stats
from benchmarks.ranks import launch

__all__ = ["step_time_rows", "time_share"]

_MS_PER_CALL = 2000.0
"""So long that filling the pipeline is a small part of a timed call."""
_SHARE = "step time over bp's"


def step_time_rows(case: Case) -> list[dict[str, object]]:
    """Milliseconds per step of this method by `stream`, and over those of bp in the same run.

    Beside the default also those of bp and of `ddp`, the unsplit model on both ranks with half of
    the batch on each: the three are compared with each other, and so are of one run.
    """
    timed = _case(case)
    is_default = case.candidate == "scpl"
    names = ("stream", "bp", "ddp") if is_default else ("stream", "bp")
    with tempfile.TemporaryDirectory() as folder:
        programs = launch.compile_case(timed, Path(folder))
        short = launch.run_case(timed, programs, names, repeats=1)
        steps = max(2, round(_MS_PER_CALL / short["bp"].median_ms))
        stats = launch.run_case(replace(timed, steps=steps), programs, names, repeats=5)
    bp = stats["bp"].median_ms
    found = {case.candidate: stats["stream"]}
    if is_default:
        found |= {name: stats[name] for name in ("bp", "ddp")}
    return [
        row
        for name, own in found.items()
        for row in (
            _row(replace(case, candidate=name), timed, "step time", "ms", own),
            _row(replace(case, candidate=name), timed, _SHARE, "x", own.median_ms / bp),
        )
    ]


def time_share(rows: Iterable[Mapping[str, str]], case: Case) -> float | None:
    """The method's step over bp's; None where it was not measured. With all batches of one size."""
    first = replace(case, seed=0)
    found = [
        float(row["value"]) for row in rows
        if (row["metric"], row["case"], row["candidate"]) == (_SHARE, first.name, case.candidate)
    ]  # fmt: skip
    return found[0] if found else None


def _case(case: Case) -> launch.Case:
    task, chosen = TASKS[case.task], case.chosen
    return launch.Case(
        model=f"benchmarks.accuracy.models:{task.model}",
        inputs=task.inputs,
        num_classes=task.num_classes,
        batch_size=chosen.batch_size or task.batch_size,
        steps=4,
        config={"width": task.full_width if case.is_full_width else task.width},
        method=chosen.method,
        preset=chosen.preset,
        options=chosen.options,
        trainer=task.trainer,
    )


def _row(
    case: Case, timed: launch.Case, metric: str, unit: str, value: Stats | float
) -> dict[str, object]:
    found: dict[str, object] = {"value": value, "n": 5}
    if isinstance(value, Stats):
        found = {"value": value.median_ms, "p20": value.p20_ms, "p80": value.p80_ms,
                 "n": value.n, "note": value.note}  # fmt: skip
    config = {"batch": timed.batch_size, "inputs": timed.inputs, **timed.config, **timed.trainer}
    return {
        "benchmark": "accuracy", "case": case.name, "candidate": case.candidate, "metric": metric,
        "unit": unit, "threads": 1, "device": "cpu", "config": config, **found,
    }  # fmt: skip
