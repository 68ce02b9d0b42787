"""What is trained: models with their data, methods, and how long."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from scpl_compile.ir import Scalar

__all__ = ["BUDGETS", "METHODS", "TASKS", "VARIANTS", "Case", "Candidate", "Task", "cases"]


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
    "epochs": 4, "trainer": _FAST,
}  # fmt: skip
_TEXTS: dict[str, Any] = {
    "data": "csv:sentences.csv", "inputs": "ids:int64:32<8000,mask:int64:32<2", "num_classes": 2,
    "batch_size": 64, "epochs": 6,
}  # fmt: skip
TASKS: Mapping[str, Task] = {
    "vgg8": Task(model="vgg8", width=32, full_width=128, **_IMAGES),
    "resnet18": Task(model="resnet18", width=16, full_width=64, **_IMAGES),
    "lstm": Task(model="lstm", width=128, full_width=300, **_TEXTS),
    "transformer": Task(model="transformer", width=128, full_width=300, **_TEXTS),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A method with its options. trainer, batch_size, augment: where they differ from the task's."""

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

VARIANTS: Mapping[str, Candidate] = {}
"""Tried for the default; read by the validation split alone."""

BUDGETS = ("equal epochs", "equal time")


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
        return (METHODS | VARIANTS)[self.candidate]


def cases(
    candidates: Mapping[str, Candidate], *, seeds: tuple[int, ...], is_full_width: bool
) -> Iterator[Case]:
    """All runs at equal epochs; what is told first comes first."""
    for seed in seeds:
        for task in TASKS:
            for num_stages in (2, 4):
                for name in candidates:
                    if name == "bp" and num_stages > 2:
                        continue
                    yield Case(
                        task=task, candidate=name, num_stages=num_stages, seed=seed,
                        epochs=TASKS[task].epochs, is_full_width=is_full_width,
                    )  # fmt: skip


def at_equal_time(case: Case, share: float) -> Case:
    """The same with two stages and as many epochs as fit; share: its step time over bp's."""
    return replace(case, budget="equal time", epochs=TASKS[case.task].epochs / share)
