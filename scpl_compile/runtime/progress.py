"""What a person sees on stderr while a program trains: a bar, each stage's loss, the rate."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Self

__all__ = ["Progress", "leads", "say"]


def leads() -> bool:
    """Whether this process is the one that speaks and writes: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """One line on stderr; of several ranks, which all would say it, the first one does."""
    if leads():
        print(text, file=sys.stderr, flush=True)


class Progress:
    """A bar over the steps; without a terminal, a line now and then."""

    def __init__(self, total_steps: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        self._total = total_steps
        self._shown = done
        self._console = Console(stderr=True)
        self._bar: Any = Bar(
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            # What does not fit is cut off at its end, the losses of the last stages.
            TextColumn("{task.fields[text]}", table_column=Column(ratio=1, no_wrap=True)),
            console=self._console,
            expand=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("steps", total=total_steps, completed=done, text="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(
        self,
        step: int,
        losses: Sequence[Mapping[str, float]],
        samples_per_second: float,
        validation: float | None = None,
    ) -> None:
        """losses: per stage, by name; the bar shows the sum of each stage.

        validation: the accuracy after the last epoch, where there was one.
        """
        sums = " ".join(f"{sum(terms.values()):.3f}" if terms else "-" for terms in losses)
        known = "" if validation is None else f"validation {100 * validation:.1f} %, "
        text = f"{samples_per_second:.0f} samples/s, {known}loss per stage {sums}"
        self._bar.update(self._task, completed=step, text=text)
        if not self._console.is_terminal and (step - self._shown) * 10 >= self._total:
            self._shown = step
            say(f"step {step}/{self._total}: {text}")
