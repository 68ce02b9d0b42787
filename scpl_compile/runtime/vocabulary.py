"""The words and labels of text data, by which a model was trained: a run keeps them.

::

    RUN/vocabulary.json   {"words": ["film", "good", …], "labels": ["neg", "pos"]}
                                      2       3                      0      1

A model knows words and labels by their numbers alone. Numbered by another file, the same text is
another one to it, so whatever is done with trained weights goes by the vocabulary of their run.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from scpl_compile.errors import ProgramError
from scpl_compile.json_form import from_json

__all__ = ["FIRST_WORD", "OTHER_WORD", "VOCABULARY", "Vocabulary", "read_vocabulary"]

VOCABULARY = "vocabulary.json"
"""Its file in a run directory, beside the weights."""

OTHER_WORD = 1
"""The number of every word that is not in it; 0 is padding."""

FIRST_WORD = 2
"""The number of its first word."""

_MOST_BYTES = 2**28


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """words: the number of words[i] is i + FIRST_WORD. labels: labels[i] is class i, or of task
    multi-label column i.

    Raises:
        ProgramError: a word or label stands there twice; there is no label.
    """

    words: tuple[str, ...]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        for what, names in (("word", self.words), ("label", self.labels)):
            if len(set(names)) < len(names):
                raise ProgramError(f"a {what} stands there twice")
        if not self.labels:
            raise ProgramError("there is no label")


def read_vocabulary(path: Path) -> Vocabulary:
    """What a run has kept.

    Raises:
        ProgramError: the file is missing or damaged.
    """
    if not path.is_file():  # a pipe would be waited for
        raise ProgramError(
            f"{path} is missing, which says by what numbers the model knows words and labels: a "
            "run on csv: data keeps it (older ones did not) beside its weights; copy it there, or "
            "train again"
        )
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        return from_json(Vocabulary, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, ProgramError) as error:
        raise ProgramError(f"{path} is damaged ({error}); train again") from error
