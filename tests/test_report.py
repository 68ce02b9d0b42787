"""print_plan: a plan as a table that fits a terminal of 80 columns."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from scpl_compile.ir import Plan, Stage
from scpl_compile.report import count_text, plan_facts, print_plan, size_text, stages_text
from scpl_compile.runtime.program import read_plan


@pytest.fixture
def plan(compiled: Path) -> Plan:
    """The plan of a small model in two stages."""
    return replace(read_plan(compiled), model="net.py:build_model")


@pytest.fixture(autouse=True)
def terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the test's own terminal is."""
    monkeypatch.setenv("COLUMNS", "80")


def printed(plan: Plan, capsys: pytest.CaptureFixture[str]) -> str:
    """What print_plan writes to stderr, in at most 80 columns."""
    print_plan(plan)
    out, err = capsys.readouterr()
    assert out == ""
    assert max(map(len, err.splitlines())) <= 80
    return err


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**20, "1 MiB"), (490 * 2**20, "490 MiB"),
     (3 * 2**40, "3072 GiB")],
)  # fmt: skip
def test_sizes_have_a_unit(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (9999, "9999"), (10_000, "10 k"), (208_123, "208 k"), (4_917_000, "4.9 M"),
     (7_000_000_000, "7 G")],
)  # fmt: skip
def test_counts_have_a_unit(count: int, text: str) -> None:
    assert count_text(count) == text


def test_one_stage_and_several() -> None:
    assert (stages_text(1), stages_text(2)) == ("1 stage", "2 stages")


def test_a_row_per_stage_with_all_that_was_decided(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(plan, capsys)
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "net.py:build_model: scpl, 2 stages"
    assert re.split(r"  +", lines[2]) == [
        "stage", "modules", "params", "cost", "sends", "head (params)", "device",
    ]  # fmt: skip
    first, second = (re.split(r"  +", line) for line in lines[4:6])
    total = sum(stage.cost_us for stage in plan.stages)
    for k, cells in enumerate((first, second)):
        stage = plan.stages[k]
        assert cells[0] == str(k)
        assert cells[1] == f"{stage.nodes[0]} .. {stage.nodes[-1]}"
        assert cells[2] == str(stage.num_parameters)
        assert cells[3] == f"{100 * stage.cost_us / total:.0f} %"
        assert cells[6] == "cpu"
    loss = plan.stages[0].losses[0]
    assert first[4:6] == [
        size_text(plan.cuts[0].nbytes),
        f"{loss.options['head']} {loss.options['pooling']} ({loss.num_parameters})",
    ]
    assert second[4:6] == ["-", "the model's own"]
    assert "by the cost model" in text and "above\nthe lower bound" in text.replace(" \n", "\n")
    assert "Frontend fx, solver chain-dp." in text


def test_what_was_kept_whole_is_told_with_the_reason(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = replace(plan, opaque=(("blocks.0", "it calls checkpoint()"), ("", "a [bold] loop")))
    text = printed(odd, capsys)
    assert "Kept whole: blocks.0 (it calls checkpoint()).\n" in text
    assert "Kept whole: the model (a [bold] loop).\n" in text


def test_long_names_are_folded_and_nothing_else_is(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "features.denseblock1.denselayer"
    long = replace(plan, stages=tuple(renamed(s, f"{name}{s.index}") for s in plan.stages))
    long = replace(long, placement=("cuda:0", "cuda:1"))
    lines = printed(long, capsys).splitlines()
    column = lines[2].index("modules"), lines[2].index("params")
    start = next(i for i, line in enumerate(lines) if line.startswith(" 0 "))
    end = next(i for i, line in enumerate(lines) if line.startswith(" 1 "))
    cell = "".join(line[column[0] : column[1] - 2].strip() for line in lines[start:end])
    assert cell.replace(" ..", "..").startswith(f"{name}0")
    assert "cuda:0" in lines[start] and "KiB" in lines[start] and "conv avg:4 (" in lines[start]


def renamed(stage: Stage, name: str) -> Stage:
    """The stage with one module of this name before its own."""
    return replace(stage, nodes=("Tensor.size", name, *stage.nodes[1:], "torch.flatten", "add"))


def test_functions_are_not_told_as_first_or_last_module(plan: Plan) -> None:
    odd = replace(plan, stages=tuple(renamed(s, "layer") for s in plan.stages))
    facts = plan_facts(odd)
    assert [(f["first"], f["last"]) for f in facts] == [
        ("layer", plan.stages[0].nodes[-1]), ("layer", plan.stages[1].nodes[-1]),
    ]  # fmt: skip
    bare = replace(plan.stages[0], nodes=("torch.flatten", "add"))
    facts = plan_facts(replace(plan, stages=(bare, plan.stages[1])))
    assert (facts[0]["first"], facts[0]["last"]) == ("torch.flatten", "add")


def test_facts_are_what_a_script_asks_for(plan: Plan) -> None:
    first, second = plan_facts(plan)
    assert first == {
        "index": 0, "first": "0", "last": plan.stages[0].nodes[-1],
        "num_parameters": plan.stages[0].num_parameters, "cost_us": plan.stages[0].cost_us,
        "crossing_bytes": plan.cuts[0].nbytes, "device": "cpu",
    }  # fmt: skip
    assert second["crossing_bytes"] == 0
