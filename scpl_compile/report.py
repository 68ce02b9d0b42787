"""A plan as a person reads it."""

import re

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from scpl_compile.ir import SINGLE_LABEL, LocalLoss, Plan, Scalar, Stage, first_and_last

__all__ = ["count_text", "plan_facts", "print_plan", "size_text", "stages_text"]

_NAMES_WIDTH = 18
"""So long may the names of a row be together to stand in one line of a terminal of 80."""


def size_text(nbytes: float) -> str:
    """1536 as "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{_three_digits(nbytes)} {unit}"
        nbytes /= 1024
    return f"{_three_digits(nbytes)} GiB"


def count_text(count: float) -> str:
    """1602112 as "1.6 M"; below 10,000 exact."""
    if count < 10_000:
        return f"{count:.0f}"
    for unit in ("k", "M"):
        count /= 1000
        if count < 1000:
            return f"{_three_digits(count)} {unit}"
    return f"{_three_digits(count / 1000)} G"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}".removesuffix(".0")


def stages_text(num_stages: int) -> str:
    """2 as "2 stages"."""
    return "1 stage" if num_stages == 1 else f"{num_stages} stages"


def print_plan(plan: Plan) -> None:
    """The plan as a table on stderr."""
    console = Console(stderr=True, highlight=False)
    console.print(_table(plan))
    lines = [
        f"The slowest stage takes {_time_text(plan.bottleneck_us)} per batch of {plan.batch_size} "
        f"by the cost model, {100 * (plan.bottleneck_us / plan.lower_bound_us - 1):.0f} % above "
        "the lower bound.",
        f"Frontend {plan.frontend}, solver {plan.solver}.",
        *_opaque_lines(plan),
    ]
    for line in lines:
        console.print(line, markup=False)


def _opaque_lines(plan: Plan) -> list[str]:
    """Which modules were kept whole and why; those of a row of layers in one line."""
    alike: dict[tuple[str, str], list[str]] = {}
    for path, reason in plan.opaque:
        alike.setdefault((re.sub(r"\d+", "*", path), reason), []).append(path)
    lines = []
    for (pattern, reason), paths in alike.items():
        text = f"{len(paths)} like {pattern}" if len(paths) > 1 else paths[0] or "the model"
        lines.append(f"Kept whole: {text} ({reason}).")
    return lines


def _table(plan: Plan) -> Table:
    task = "" if plan.task == SINGLE_LABEL else f", {plan.task}"
    title = f"{plan.model}: {plan.method}, {stages_text(plan.num_stages)}{task}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    table.add_column("modules", overflow="fold")
    for name in ("params", "cost", "sends"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("head (params)", no_wrap=True)
    table.add_column("device", no_wrap=True)
    total = sum(stage.cost_us for stage in plan.stages)
    names = [first_and_last(stage) for stage in plan.stages]
    between = " .. " if max(len(a + b) for a, b in names) <= _NAMES_WIDTH else " ..\n"
    for stage, (first, last) in zip(plan.stages, names, strict=True):
        table.add_row(
            str(stage.index),
            first if first == last else f"{first}{between}{last}",
            count_text(stage.num_parameters),
            f"{100 * stage.cost_us / total:.0f} %",
            size_text(_crossing_bytes(plan, stage)) if stage.index < len(plan.cuts) else "-",
            ", ".join(map(_head_text, stage.losses)) or "-",
            plan.placement[stage.index],
        )
    return table


def _head_text(loss: LocalLoss) -> str:
    if not loss.has_head:
        return "the model's own"
    if loss.kind != "local":
        name = loss.source.name if loss.source else loss.kind
        return f"{name} ({count_text(loss.num_parameters)})"
    head, pooling = loss.options.get("head", "linear"), loss.options.get("pooling", "")
    return f"{head} {pooling}".strip() + f" ({count_text(loss.num_parameters)})"


def _time_text(microseconds: float) -> str:
    if microseconds < 1e5:
        return f"{microseconds / 1e3:.2g} ms"
    return f"{microseconds / 1e3:.0f} ms"


def _crossing_bytes(plan: Plan, stage: Stage) -> int:
    return plan.cuts[stage.index].nbytes if stage.index < len(plan.cuts) else 0


def plan_facts(plan: Plan) -> list[dict[str, Scalar]]:
    """Per stage what a script asks for first."""
    return [
        {
            "index": stage.index,
            "first": first_and_last(stage)[0],
            "last": first_and_last(stage)[1],
            "num_parameters": stage.num_parameters,
            "cost_us": stage.cost_us,
            "crossing_bytes": _crossing_bytes(plan, stage),
            "device": plan.placement[stage.index],
        }
        for stage in plan.stages
    ]
