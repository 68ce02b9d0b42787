"""A plan as a person reads it."""

from rich.console import Console
from rich.table import Table

from scpl_compile.ir import Plan, Scalar, Stage

__all__ = ["plan_facts", "print_plan", "size_text"]


def size_text(nbytes: float) -> str:
    """1536 as "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


def _head_text(stage: Stage) -> str:
    parts = []
    for loss in stage.losses:
        if loss.kind == "local":
            head, pooling = loss.options.get("head", "linear"), loss.options.get("pooling", "")
            parts.append(f"{head} {pooling} ({loss.num_parameters:,} parameters)")
        else:
            parts.append("cross entropy")
    return ", ".join(parts) or "-"


def print_plan(plan: Plan) -> None:
    """The plan as a table on stderr."""
    console = Console(stderr=True)
    table = Table(title=f"{plan.model}: {plan.method}, {plan.num_stages} stages")
    for name in (
        "stage",
        "first",
        "last",
        "parameters",
        "cost",
        "crossing",
        "local loss",
        "device",
    ):
        table.add_column(name, justify="right" if name in ("parameters", "cost") else "left")
    total = sum(stage.cost_us for stage in plan.stages)
    for stage in plan.stages:
        crossing = plan.cuts[stage.index].nbytes if stage.index < plan.num_stages - 1 else 0
        table.add_row(
            str(stage.index),
            stage.nodes[0],
            stage.nodes[-1],
            f"{stage.num_parameters:,}",
            f"{100 * stage.cost_us / total:.0f} %",
            size_text(crossing) if crossing else "-",
            _head_text(stage),
            plan.placement[stage.index],
        )
    console.print(table)
    gap = 100 * (plan.bottleneck_us / plan.lower_bound_us - 1)
    console.print(
        f"slowest stage {plan.bottleneck_us / 1000:.1f} ms modelled at batch {plan.batch_size}, "
        f"{gap:.0f} % above the lower bound; frontend {plan.frontend}, solver {plan.solver}"
    )
    for path, reason in plan.opaque:
        console.print(f"kept whole: {path} ({reason})", highlight=False)


def plan_facts(plan: Plan) -> list[dict[str, Scalar]]:
    """Per stage what a script asks for first."""
    return [
        {
            "index": stage.index,
            "first": stage.nodes[0],
            "last": stage.nodes[-1],
            "num_parameters": stage.num_parameters,
            "cost_us": stage.cost_us,
            "crossing_bytes": plan.cuts[stage.index].nbytes if stage.index < len(plan.cuts) else 0,
            "device": plan.placement[stage.index],
        }
        for stage in plan.stages
    ]
