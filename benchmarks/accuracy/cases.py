"""What is trained: models with their data, methods, and how long."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scpl_compile.ir import Scalar

__all__ = [
    "AGREEMENTS",
    "CONFIDENCES",
    "GROUPS",
    "METHODS",
    "SOONER",
    "TASKS",
    "VARIANTS",
    "WITH_EXITS",
    "Candidate",
    "Case",
    "Group",
    "Task",
    "at_equal_time",
    "cases",
    "once",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model and its data. width: of the narrow net, and of the released one. epochs: of both
    budgets; `equal time` gives every method the time that backpropagation takes for them.
    """

    model: str
    width: int
    full_width: int
    data: str
    inputs: str
    num_classes: int
    batch_size: int
    epochs: int
    trainer: Mapping[str, Any] = field(default_factory=dict)


_FAST = {"amp": "bf16", "channels_last": True}
_IMAGES: dict[str, Any] = {
    "data": "fashion-mnist", "inputs": "1x28x28", "num_classes": 10, "batch_size": 128,
    "epochs": 2, "trainer": _FAST,
}  # fmt: skip
_TEXTS: dict[str, Any] = {
    "data": f"csv:{Path(__file__).with_name('sentences.csv')}",
    "inputs": "ids:int64:32<8000,mask:int64:32<2", "num_classes": 2, "batch_size": 64,
    "trainer": {"amp": "bf16"},
}  # fmt: skip
TASKS: Mapping[str, Task] = {
    "vgg8": Task(model="vgg8", width=32, full_width=128, **_IMAGES),
    "resnet18": Task(model="resnet18", width=16, full_width=64, **_IMAGES),
    "lstm": Task(model="lstm", width=128, full_width=300, epochs=6, **_TEXTS),
    "transformer": Task(model="transformer", width=128, full_width=300, epochs=3, **_TEXTS),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A method with its options. batch_size: where it differs from the task's."""

    method: str
    preset: str = "default"
    options: Mapping[str, Scalar] = field(default_factory=dict)
    batch_size: int | None = None
    augment: str = "none"


METHODS: Mapping[str, Candidate] = {
    "bp": Candidate(method="bp"),
    "scpl": Candidate(method="scpl"),
    "scpl, paper": Candidate(method="scpl", preset="paper"),
    "early_exit": Candidate(method="early_exit"),
    "al": Candidate(method="al"),
    "predsim": Candidate(method="predsim"),
    "deinforeg": Candidate(method="deinforeg"),
}
"""The table's, in its order. Backpropagation does not depend on the cuts and runs with K = 2."""

WITH_EXITS: Mapping[str, Candidate] = {
    "scpl with exits": Candidate(method="dascpl", options={"detach_classifier": False}),
}
"""The default's losses, with an exit in every stage: the model is trained as by the default, to the
last bit (tests/methods/test_dascpl.py), so one run answers for both.
"""

CONFIDENCES = tuple(
    f"confidence:{limit}"
    for limit in (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
)
AGREEMENTS = ("agreement:2", "agreement:3")
"""Rules by which a sample leaves early; one of each kind is chosen by the validation split."""

ANSWERS: Mapping[str, Candidate] = {
    **{
        f"{name}, batch {size}": Candidate(method=name, batch_size=size)
        for size in (32, 1024)
        for name in ("bp", "scpl")
    },
    **{
        f"{name}, {told}": Candidate(method=name, augment=augment)
        for told, augment in (("one augmented view", "basic"), ("two views", "strong"))
        for name in ("bp", "scpl")
    },
}
"""What the paper's reviewers asked: fair batch sizes, and the true cost of two views."""

VARIANTS: Mapping[str, Candidate] = {
    name: Candidate(method="scpl", options=options)
    for name, options in {
        "shrink avg": {"shrink": "avg"},
        "conv_size 14": {"conv_size": 14},
        "conv_size 8, x1.5": {"conv_size": 8, "channel_multiplier": 1.5},
        "contrast 0.3": {"contrast": 0.3},
        "contrast alone": {"cross_entropy": 0.0},
        "temperature 0.3": {"temperature": 0.3},
        "released last stage": {"last": "released"},
        "head mlp": {"head": "mlp", "hidden": 128},
        "deinforeg for contrast": {"objective": "deinforeg"},
    }.items()
}
"""Tried for the default; read by the validation split alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Candidates on some tasks, cut into some numbers of stages. seeds: how many of those asked."""

    candidates: Mapping[str, Candidate]
    tasks: tuple[str, ...]
    num_stages: tuple[int, ...]
    seeds: int = 3


SOONER = "0.9 of equal time"
_IMAGE_TASKS = ("vgg8", "resnet18")
GROUPS: Mapping[str, Group] = {
    "methods": Group(candidates=METHODS, tasks=tuple(TASKS), num_stages=(2, 4)),
    "exits": Group(candidates=WITH_EXITS, tasks=_IMAGE_TASKS, num_stages=(4,)),
    "losses": Group(
        candidates={"scpl": METHODS["scpl"]}, tasks=("resnet18",), num_stages=(8,), seeds=1
    ),
    "answers": Group(candidates=ANSWERS, tasks=("resnet18",), num_stages=(2,), seeds=1),
    "variants": Group(candidates=VARIANTS, tasks=_IMAGE_TASKS, num_stages=(2, 4), seeds=1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One training run. epochs may be broken: the last one is not finished then."""

    task: str
    candidate: str
    num_stages: int
    seed: int
    budget: str = "equal epochs"
    epochs: float = 0.0
    is_full_width: bool = False

    @property
    def name(self) -> str:
        """The column `case` of its rows."""
        width = ", full width" if self.is_full_width else ""
        return f"{self.task}{width}, K={self.num_stages}, {self.budget}, seed {self.seed}"

    @property
    def chosen(self) -> Candidate:
        """What is trained."""
        return {**METHODS, **WITH_EXITS, **ANSWERS, **VARIANTS}[self.candidate]


def cases(group: Group, *, seeds: tuple[int, ...], is_full_width: bool) -> Iterator[Case]:
    """All runs of a group at equal epochs, one seed after another."""
    for seed in seeds[: group.seeds]:
        for task in group.tasks:
            for num_stages in group.num_stages:
                for name in group.candidates:
                    if name == "bp" and num_stages > 2:
                        continue
                    yield Case(
                        task=task, candidate=name, num_stages=num_stages, seed=seed,
                        epochs=TASKS[task].epochs, is_full_width=is_full_width,
                    )  # fmt: skip


def once(wanted: Sequence[Case]) -> list[Case]:
    """Without the default's runs that are also there with exits."""
    return [
        case for case in wanted
        if case.candidate != "scpl" or replace(case, candidate="scpl with exits") not in wanted
    ]  # fmt: skip


def at_equal_time(case: Case, share: float) -> Iterator[Case]:
    """The same with as many epochs as fit; share: its step's time over that of bp. The default on
    images also in less time, in which it is to reach what bp reaches.
    """
    epochs = TASKS[case.task].epochs / share
    yield replace(case, budget="equal time", epochs=epochs)
    if case.candidate == "scpl" and case.task in _IMAGE_TASKS:
        yield replace(case, budget=SOONER, epochs=0.9 * epochs)
