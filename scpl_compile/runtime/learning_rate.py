"""The learning rate as a pure function of the step, so that a resumed run needs the step alone."""

import math
import threading
from collections.abc import Callable

import torch
from torch.optim import lr_scheduler

from scpl_compile.errors import MethodError
from scpl_compile.runtime.settings import Setting, parse_settings

__all__ = ["learning_rate", "parse_lr_schedule"]

LR_FLOOR = 0.01
"""The cosine ends at this fraction of the first learning rate (released: 1e-3 falls to 1e-5)."""

_NOT_OF_THE_STEP = {
    "ReduceLROnPlateau": "needs a metric; the rate here is a function of the step alone",
    "LambdaLR": "needs a function",
    "MultiplicativeLR": "needs a function",
    "SequentialLR": "needs other schedulers",
    "ChainedScheduler": "needs other schedulers",
}
_LENGTH = {
    "OneCycleLR": "total_steps",
    "CosineAnnealingLR": "T_max",
    "PolynomialLR": "total_iters",
}
"""Which argument is the number of steps; it is that of the run where nobody gives it."""

_TEXTS = ("anneal_strategy", "mode", "scale_mode")
"""Settings that are words; the others are numbers."""


def _schedulers() -> dict[str, Callable[..., lr_scheduler.LRScheduler]]:
    """torch's schedulers by name that need nothing but numbers."""
    return {
        name: value
        for name, value in vars(lr_scheduler).items()
        if isinstance(value, type)
        and issubclass(value, lr_scheduler.LRScheduler)
        and name not in ("LRScheduler", "_LRScheduler", *_NOT_OF_THE_STEP)
    }


def parse_lr_schedule(text: str) -> tuple[str, dict[str, Setting]]:
    """`StepLR:step_size=30,gamma=0.1` as a name and the arguments; constant and cosine have none.

    Raises:
        MethodError: an unknown name, one that needs more than the step, a piece that is wrong.
    """
    name, colon, settings = text.partition(":")
    if name in _NOT_OF_THE_STEP:
        raise MethodError(f"lr_schedule {name!r} {_NOT_OF_THE_STEP[name]}; take another one")
    if name in ("constant", "cosine") and colon:
        raise MethodError(f"lr_schedule {text!r}: {name} has no settings; write {name}")
    if name not in ("constant", "cosine", *_schedulers()):
        known = ", ".join(sorted(_schedulers()))
        raise MethodError(
            f"lr_schedule {name!r} is not one of constant, cosine, {known}; settings follow, as in "
            "StepLR:step_size=30,gamma=0.1"
        )
    try:
        found = parse_settings(settings)
    except ValueError as error:
        raise MethodError(
            f"lr_schedule {text!r}: {error}, as in StepLR:step_size=30,gamma=0.1"
        ) from error
    for setting, value in found.items():
        if isinstance(value, str) and setting not in _TEXTS:
            raise MethodError(f"lr_schedule {text!r}: {setting} is {value!r}; give a number")
    return name, found


def learning_rate(
    lr: float, schedule: str, total_steps: int | None, *, warmup: int = 0
) -> Callable[[int], float]:
    """The learning rate of step t.

    schedule: "constant"; "cosine", which falls from `lr` to lr/100 over `total_steps`; or one of
    torch.optim.lr_scheduler with its settings, in steps (`StepLR:step_size=30,gamma=0.1`). Of
    OneCycleLR, CosineAnnealingLR and PolynomialLR the length is `total_steps`, and the peak of
    OneCycleLR is `lr`, where the settings say nothing else. Only the learning rate follows it, no
    momentum. warmup: so many steps rise linearly to the schedule's first rate, with which it then
    begins. After the end of the cosine and of OneCycleLR their last rate stays.

    The cosine is as released, q = (1 + cos(pi t / T)) / 2, here per step instead of per epoch
    (paper.md 1.4).

    Raises:
        MethodError: another schedule, settings that torch refuses, or fewer than 1 step.
    """
    name, settings = parse_lr_schedule(schedule)
    if warmup < 0:
        raise MethodError(f"warmup is {warmup}; give at least 0 steps")
    if total_steps is not None:
        if total_steps < 1:
            raise MethodError(f"total_steps is {total_steps}; a schedule needs at least 1")
        if warmup >= total_steps:
            raise MethodError(f"warmup is {warmup} of {total_steps} steps; give fewer than those")
        total_steps -= warmup
    rate = _rate(lr, name, settings, total_steps)
    if warmup == 0:
        return rate
    return lambda step: rate(step - warmup) if step >= warmup else rate(0) * ((step + 1) / warmup)


def _rate(
    lr: float, name: str, settings: dict[str, Setting], total_steps: int | None
) -> Callable[[int], float]:
    if name == "constant" or (name == "cosine" and total_steps is None):
        return lambda step: lr
    if name != "cosine":
        return _Driven(lr, name, settings, total_steps).rate
    length = total_steps or 1

    def cosine(step: int) -> float:
        q = 0.5 * (1 + math.cos(math.pi * min(step, length) / length))
        return lr * (LR_FLOOR + (1 - LR_FLOOR) * q)

    return cosine


class _Driven:
    """The rates of one of torch's schedulers, driven forward as far as somebody has asked."""

    def __init__(
        self, lr: float, name: str, settings: dict[str, Setting], total_steps: int | None
    ) -> None:
        arguments = dict(settings)
        if name in _LENGTH and total_steps is not None:
            arguments.setdefault(_LENGTH[name], total_steps)
        if name == "OneCycleLR":
            arguments.setdefault("max_lr", lr)
        if name in ("OneCycleLR", "CyclicLR"):
            if arguments.setdefault("cycle_momentum", False):
                raise MethodError(f"lr_schedule {name}: only the rate follows; no cycle_momentum")
        if isinstance(milestones := arguments.get("milestones"), int):
            arguments["milestones"] = (milestones,)
        self._lock = threading.Lock()  # the stages' threads ask
        # Nobody trains it: the scheduler writes its rates there.
        self._optimizer = torch.optim.SGD([torch.zeros(())], lr)
        self._rates: list[float] = []
        try:
            self._scheduler = _schedulers()[name](self._optimizer, **arguments)
            self._optimizer.step()  # a scheduler warns where none came before its own step
            self._note()
            self._drive()  # some settings are refused by the first step only
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise MethodError(f"lr_schedule {name} refuses {arguments}: {error}") from error

    def rate(self, step: int) -> float:
        """The rate of `step`; after the end of OneCycleLR its last one."""
        if isinstance(self._scheduler, lr_scheduler.OneCycleLR):
            step = min(step, self._scheduler.total_steps - 1)
        with self._lock:
            while len(self._rates) <= step:
                self._drive()
            return self._rates[step]

    def _drive(self) -> None:
        self._scheduler.step()
        self._note()

    def _note(self) -> None:
        self._rates.append(float(self._optimizer.param_groups[0]["lr"]))
