"""Well-known models compile, verify, and their emitted programs train from another directory.

Each program is run as a user would, in a process of its own: 20 steps on one fixed batch with Adam
at 1e-3. The runs that are left out here (the second K of most models, VGG-16) are in
benchmarks/programs, which checks all of them.
"""

from functools import cache
from pathlib import Path

import pytest

from benchmarks.programs.main import (
    MODELS,
    STEPS,
    best_bottleneck_us,
    compile_program,
    cut_problem_of,
    train_program,
)
from scpl_compile import Program
from scpl_compile.partition import PartitionProblem, partition

TOLERANCE = 0.06
"""By which the partitioner may leave the best cut for a cleaner one."""

RUN = [
    ("text_lstm", 2), ("text_lstm", 4), ("text_transformer", 4), ("shufflenet_v2_x1_0", 4),
    ("mobilenet_v3_small", 4), ("regnet_y_400mf", 2), ("efficientnet_b0", 4), ("resnet18", 2),
    ("resnet50", 4), ("densenet121", 2), ("convnext_tiny", 2), ("swin_t", 4), ("vit_b_16", 2),
    ("vgg11_bn", 4),
]  # fmt: skip
COMPILE = [
    ("text_transformer", 2), ("shufflenet_v2_x1_0", 2), ("mobilenet_v3_small", 2),
    ("regnet_y_400mf", 4), ("efficientnet_b0", 2), ("resnet18", 4), ("resnet50", 2),
    ("densenet121", 4), ("convnext_tiny", 4), ("swin_t", 2), ("vit_b_16", 4), ("vgg16_bn", 2),
]  # fmt: skip


@cache
def problem(name: str) -> PartitionProblem:
    return cut_problem_of(name)


def check_compiled(name: str, num_stages: int, program: Program) -> None:
    """It is verified, whole, and cut nearly as well as its leaf modules allow."""
    plan = program.plan
    assert program.verification.is_verified
    assert plan.num_stages == num_stages and plan.untrained == ()
    owned = [parameter for stage in plan.stages for parameter in stage.parameters]
    assert sorted(owned) == sorted(name for name, _ in program.model.named_parameters())
    best_us = best_bottleneck_us(problem(name), num_stages)
    assert best_us * (1 - 1e-9) <= plan.bottleneck_us <= best_us * (1 + TOLERANCE)
    assert plan.lower_bound_us <= best_us * (1 + 1e-9)
    assert plan.bottleneck_us == max(stage.cost_us for stage in plan.stages)


@pytest.mark.parametrize(("name", "num_stages"), COMPILE)
def test_a_model_compiles(name: str, num_stages: int, tmp_path: Path) -> None:
    check_compiled(name, num_stages, compile_program(name, num_stages, tmp_path / name))


@pytest.mark.parametrize(("name", "num_stages"), RUN)
def test_an_emitted_program_trains(name: str, num_stages: int, tmp_path: Path) -> None:
    program = compile_program(name, num_stages, tmp_path / "program")
    check_compiled(name, num_stages, program)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    trained = train_program(program, elsewhere)
    assert [len(losses) for losses in trained.losses] == [STEPS] * num_stages
    for k, (first, last) in enumerate(trained.first_and_last):
        assert last < first, f"stage {k}: {trained.losses[k]}"
    # Some have a gradient that is zero but for rounding (the bias of attention's keys, that of a
    # convolution before a batch norm); Adam divides by its size, so they move as well.
    assert trained.still == ()
    assert list(elsewhere.iterdir()) == []  # all that it writes is in its own directory


def test_every_model_is_here() -> None:
    assert {name for name, _ in RUN + COMPILE} == set(MODELS)
    assert {name for name, _ in RUN} == set(MODELS) - {"vgg16_bn"}


@pytest.mark.parametrize("num_stages", [2, 3, 4, 6, 8])
def test_the_best_cut_is_what_the_partitioner_finds_without_a_tolerance(num_stages: int) -> None:
    for name in ("text_transformer", "resnet18"):
        found = partition(problem(name), num_stages, tolerance=0.0)
        assert found.bottleneck_us == pytest.approx(best_bottleneck_us(problem(name), num_stages))
