"""Random networks, cut at random, compile into programs that train as they do, or are refused.

And where an edge of such a program is bent, a gradient lost or let through, verify says so.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from scpl_compile import Program, compile_model
from scpl_compile.errors import PartitionError, ScplError
from scpl_compile.sources import example_inputs
from test_mutations import text_of, verified

GENERATE = (Phase.generate,)  # a failing example is small; compiling smaller ones takes minutes
BATCH = 6
WIDTH = 6


class Block(nn.Module):
    """(B, 6), (B, 6) → (B, 6), opened where a cut lies inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True))
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, other):
        y = self.last(self.layers(self.norm(x)))
        y += x
        return {"value": y, "sum": y + other}


class Step(nn.Module):
    """One step of a random network; a kind is the name of a function of two (B, 6) tensors."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "linear":
            self.linear = nn.Linear(WIDTH, WIDTH)
        elif kind == "cat":
            self.linear = nn.Linear(2 * WIDTH, WIDTH)
        elif kind == "norm":
            self.norm = nn.BatchNorm1d(WIDTH)
        elif kind == "dropout":
            self.dropout = nn.Dropout(0.3)
        elif kind == "block":
            self.block = Block()
        elif kind == "scale":
            self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x, other):
        return getattr(self, f"_{self.kind}")(x, other)

    def _linear(self, x, other):
        return torch.relu(self.linear(x))

    def _cat(self, x, other):
        return self.linear(torch.cat([x, other], dim=1))

    def _norm(self, x, other):
        return self.norm(x)

    def _dropout(self, x, other):
        return self.dropout(x)

    def _block(self, x, other):
        given = self.block(x, other=other)
        return given["sum"] - given["value"].tanh()

    def _scale(self, x, other):
        return x * self.scale + self.scale.expand(other.shape[0], -1).sigmoid()

    def _subtract(self, x, other):
        return 1.5 * x - other / 2

    def _gate(self, x, other):
        return x * torch.sigmoid(other)

    def _permute(self, x, other):
        return x.view(x.size(0), 2, 3).permute(0, 2, 1).reshape(x.size(0), -1)

    def _slice(self, x, other):
        return torch.cat([x[:, 4:], other[:, :4]], 1)

    def _chunk(self, x, other):
        first, second, third = x.chunk(3, dim=1)
        return torch.cat([third, first + second, first], 1)

    def _add_in_place(self, x, other):
        y = x * 1.5
        y += other
        return y

    def _write_in_view(self, x, other):
        y = x * 2
        part = y[:, 1:3]
        part.clamp_(-1, 1)
        return y

    def _view(self, x, other):
        return x.view(other.shape)

    def _maximum(self, x, other):
        return torch.stack([x, other + 0.1]).max(dim=0).values


KINDS = sorted(n[1:] for n, f in vars(Step).items() if n.startswith("_") and n[1] != "_")
PARAMETERISED = ("linear", "cat", "block")


@dataclass(frozen=True)
class Recipe:
    """Steps as (kind, which value, which other value); whether there is a second output."""

    steps: tuple[tuple[str, int, int], ...]
    has_early_output: bool


class RandomNet(nn.Module):
    """(B, 6) → (B, 4)."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.first = nn.Linear(WIDTH, WIDTH)
        self.steps = nn.ModuleList(Step(kind) for kind, _, _ in recipe.steps)
        self.fc = nn.Linear(WIDTH, 4)

    def forward(self, x):
        values = [x, self.first(x)]
        for step, (_, i, j) in zip(self.steps, self.recipe.steps, strict=True):
            values.append(step(values[-1 - i % (len(values) - 1)], values[-1 - j % len(values)]))
        logits = self.fc(values[-1])
        if self.recipe.has_early_output:
            return {"early": values[len(values) // 2].mean(1), "logits": logits}
        return logits


def recipes(first: st.SearchStrategy[int]) -> st.SearchStrategy[Recipe]:
    """first: how far back the first value of a step lies."""
    kinds = st.sampled_from(KINDS) | st.sampled_from(PARAMETERISED)
    steps = st.lists(st.tuples(kinds, first, st.integers(0, 5)), min_size=2, max_size=7)
    return st.builds(Recipe, steps.map(tuple), st.booleans())


ANY = recipes(st.sampled_from([0, 0, 0, 1, 2]))
ALIVE = recipes(st.just(0))
"""Every step has an effect on the logits, so that every mutation of it does."""


def compiled(recipe: Recipe, frontend: str, **options: Any) -> Program:
    torch.manual_seed(0)
    return compile_model(
        RandomNet(recipe), "6", batch_size=BATCH, threads_per_stage=1, frontend=frontend,
        output="logits" if recipe.has_early_output else None, **options,
    )  # fmt: skip


def state_after_training(program: Program, schedule: str) -> dict[str, Tensor]:
    with program.trainer(lr=0.05, schedule=schedule, seed=1) as trainer:
        for step in range(2):
            inputs = example_inputs(program.plan.inputs, BATCH, step)
            trainer.step(inputs, torch.arange(BATCH) % 4)
        return trainer.state_dict()


def cut_at_random(recipe: Recipe, frontend: str, num_stages: int, cut: int | None) -> Program:
    """Balanced, or after one of the steps."""
    names = [f"steps.{i}" for i, step in enumerate(recipe.steps) if step[0] in PARAMETERISED]
    if cut is None or not names:
        return compiled(recipe, frontend, num_stages=num_stages)
    return compiled(recipe, frontend, split_at=[names[cut % len(names)]])


@pytest.mark.parametrize("frontend", ["fx", "record"])
@settings(max_examples=15, deadline=None, derandomize=True, phases=GENERATE)
@given(recipe=ANY, num_stages=st.integers(2, 4), cut=st.none() | st.integers(0, 30))
def test_a_random_network_trains_as_it_does(
    frontend: str, recipe: Recipe, num_stages: int, cut: int | None
) -> None:
    try:
        program = cut_at_random(recipe, frontend, num_stages, cut)
    except PartitionError as error:  # too few places to cut, a dead step
        assert re.search(
            "place.? to cut|output does not depend|belong in one stage|trains|nothing to train",
            str(error),
        )
        return
    assert program.plan.opaque == ()
    assert program.verification.is_verified
    stream = state_after_training(program, "stream")
    sequential = state_after_training(program, "sequential")
    assert [name for name in stream if not torch.equal(stream[name], sequential[name])] == []


# ---------------------------------------------------------------------- mutations


Edit = tuple[int, int, int, str]
"""(line, from column, to column, what stands there afterwards); lines from 1."""


def functions(text: str, name: str) -> Iterator[ast.FunctionDef]:
    """The functions `name` of the stage classes."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Stage"):
            yield from (f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == name)


def reads(function: ast.FunctionDef) -> Iterator[tuple[ast.Name, list[str]]]:
    """Every read of a local variable, with the variables that are known there."""
    known = [argument.arg for argument in function.args.args[1:]]
    for line in function.body:
        for node in ast.walk(line):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in known:
                yield node, list(known)
        if isinstance(line, ast.Assign):
            known += [n.id for n in ast.walk(line) if isinstance(n, ast.Name) and n.id not in known]


def place(node: ast.expr, new: str) -> Edit:
    assert node.end_col_offset is not None
    return node.lineno, node.col_offset, node.end_col_offset, new


def wrong_edges(text: str) -> Iterator[Edit]:
    """Another variable is read."""
    for function in functions(text, "forward"):
        for node, known in reads(function):
            yield from (place(node, other) for other in known if other not in ("self", node.id))


def extra_detaches(text: str) -> Iterator[Edit]:
    for function in functions(text, "forward"):
        for node, _ in reads(function):
            if node.id != "x":  # the input has no gradient
                yield place(node, f"{node.id}.detach()")


def missing_detaches(text: str) -> Iterator[Edit]:
    """What is sent keeps its gradient."""
    for function in functions(text, "training_step"):
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "cut":
                yield place(node, ast.unparse(node.args[0]))


def swapped_arguments(text: str) -> Iterator[Edit]:
    for function in functions(text, "forward"):
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
                yield place(node, f"{ast.unparse(node.right)} - {ast.unparse(node.left)}")
            elif isinstance(node, ast.List) and len({*map(ast.unparse, node.elts)}) == 2:
                yield place(node, f"[{', '.join(map(ast.unparse, reversed(node.elts)))}]")


MUTATIONS: dict[str, Callable[[str], Iterator[Edit]]] = {
    "wrong edge": wrong_edges,
    "extra detach": extra_detaches,
    "missing detach": missing_detaches,
    "swapped arguments": swapped_arguments,
}


def edited(text: str, edit: Edit) -> str:
    line, start, end, new = edit
    lines = text.splitlines(keepends=True)
    lines[line - 1] = lines[line - 1][:start] + new + lines[line - 1][end:]
    return "".join(lines)


@pytest.mark.parametrize("what", MUTATIONS)
@settings(max_examples=10, deadline=None, derandomize=True, phases=GENERATE)
@given(recipe=ALIVE, choice=st.integers(0, 1000), frontend=st.sampled_from(["fx", "record"]))
def test_verify_finds_a_mutation_of_a_random_program(
    what: str, recipe: Recipe, choice: int, frontend: str
) -> None:
    try:
        program = compiled(recipe, frontend, num_stages=2)
    except PartitionError:
        return
    text = text_of(program)
    edits = list(MUTATIONS[what](text))
    assume(edits)
    mutant = edited(text, edits[choice % len(edits)])
    with TemporaryDirectory() as folder, pytest.raises(ScplError):
        verified(program, mutant, Path(folder))
