"""The kernels compile for every architecture within a committed budget, and it within the bars.

A process of its own compiles: this one may have loaded Triton for the interpreter. Of 160 kernels
for each architecture it takes those of the default loss; `scpl bench kernels --offline` takes all.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from scpl_compile.kernels.offline import (
    ARCHITECTURES,
    BUDGET,
    occupancy,
    over_budget,
    variants,
)

SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""KiB a block may have: CUDA C++ programming guide, compute capabilities; CDNA 3 ISA, LDS."""


def budget(architecture: str) -> dict[str, dict[str, float]]:
    return json.loads(BUDGET.read_text())[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_budget_has_no_spills_and_fits(architecture: str) -> None:
    facts = budget(architecture)
    assert facts.keys() == variants(architecture).keys()
    assert {one["spills"] for one in facts.values()} == {0}
    assert max(one["shared"] for one in facts.values()) <= SHARED[architecture] * 1024
    assert min(one["occupancy"] for one in facts.values()) >= 1
    rows = ("prologue", "finalise", "project")
    assert all(one["matrix"] > 0 for name, one in facts.items() if name.split()[0] not in rows)


def test_the_budget_is_in_the_package() -> None:
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())
    assert "kernels/budget.json" in project["tool"]["setuptools"]["package-data"]["scpl_compile"]


def test_the_budget_holds_the_bars_for_hopper() -> None:
    facts = budget("sm_90")
    forwards = ("forward bf16 D128", "triangle bf16 D128", "triangle tall bf16 D128")
    assert all(facts[name]["per_element"] <= 3.5 for name in forwards)
    assert facts["backward bf16 D128"]["per_element"] <= 5.5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_triangle_takes_fewer_instructions_than_rows(architecture: str) -> None:
    facts = budget(architecture)
    triangles = [name for name in facts if name.startswith("triangle")]
    assert len(triangles) >= 12
    for name in triangles:
        by_rows = facts[name.replace("triangle", "forward").replace(" tall", "")]
        assert facts[name]["per_element"] < by_rows["per_element"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernels_keep_to_the_budget(architecture: str, environment: dict[str, str]) -> None:
    names = "^(forward|backward|forward keeps|product|triangle) bf16 D128( labels)?$"
    done = subprocess.run(
        [sys.executable, "-m", "scpl_compile.kernels.offline", architecture, "--names", names],
        env={**environment, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found[architecture]) == 7
    assert over_budget(found) == []


def test_occupancy_by_hand() -> None:
    assert occupancy("sm_90", 198, 99328, 8) == 1  # 200 x 256 registers of 65,536
    assert occupancy("sm_90", 128, 49152, 8) == 2
    assert occupancy("sm_90", 32, 0, 8) == 8  # 64 warps
    assert occupancy("sm_80", 64, 49152, 4) == 3  # 164 KiB of 49 each
    assert occupancy("gfx942", 128, 0, 4) == 4
    assert occupancy("gfx942", 129, 40000, 4) == 1


def test_what_exceeds_the_budget_is_named() -> None:
    facts = {**budget("sm_90")["forward bf16 D128"], "spills": 8}
    (sentence,) = over_budget({"sm_90": {"forward bf16 D128": facts}})
    assert sentence == "sm_90: forward bf16 D128: spills is 8, budgeted 0"
