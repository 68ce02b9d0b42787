"""What a model learned of its data beside its weights: a run keeps it.

::

    RUN/data_facts.json   words    ["film", "good", …]   of texts: their numbers are 2, 3, …
                          labels   ["neg", "pos"]        of texts and folders: classes 0, 1, …
                          mean     [0.286]               of images, per channel in 0 … 1
                          std      [0.353]

A model knows words and classes by their numbers alone. Numbered by another file, the same text is
another one to it, as an image is that is shifted by another mean. So whatever is done with trained
weights goes by the facts of their run.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from scpl_compile.errors import ProgramError
from scpl_compile.json_form import from_json

__all__ = ["DATA_FACTS", "FIRST_WORD", "OTHER_WORD", "DataFacts", "read_facts"]

DATA_FACTS = "data_facts.json"
"""Its file in a run directory, beside the weights."""

OTHER_WORD = 1
"""The number of every word that is not known; 0 is padding."""

FIRST_WORD = 2
"""The number of the first word."""

_MOST_BYTES = 2**28


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """words: the number of words[i] is i + FIRST_WORD. labels: labels[i] is class i, or of task
    multi-label column i. mean, std: per channel of images. Empty is what the data have not.

    Raises:
        ProgramError: a word or label stands there twice; mean and std do not make sense.
    """

    words: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for what, names in (("word", self.words), ("label", self.labels)):
            if len(set(names)) < len(names):
                raise ProgramError(f"a {what} stands there twice")
        numbers = (*self.mean, *self.std)
        if len(self.mean) != len(self.std) or not all(map(math.isfinite, numbers)):
            raise ProgramError("mean and std are not as many finite numbers")
        if min(self.std, default=1.0) <= 0:
            raise ProgramError(f"a std is {min(self.std)}")


def read_facts(path: Path) -> DataFacts:
    """What a run has kept.

    Raises:
        ProgramError: the file is missing or damaged.
    """
    if not path.is_file():  # a pipe would be waited for
        raise ProgramError(
            f"{path} is missing, which says by what numbers the model knows words and labels: a "
            "run on csv: data keeps it beside its weights; copy it there, or train again"
        )
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        return from_json(DataFacts, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, ProgramError) as error:
        raise ProgramError(
            f"{path} is damaged ({error}); put the one of the run there, or train again"
        ) from error
