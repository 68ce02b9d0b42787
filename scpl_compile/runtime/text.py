"""Text with labels from a CSV file, as token numbers for the model's inputs.

::

    text,label,split                   ids   7 2 31 0 0     0: padding, 1: any other word,
    "What a film!",good,train   ──▶    mask  1 1  1 0 0     2 …: by how often in the training texts

Words are runs of letters and digits, lower case, and single other signs. The vocabulary is that of
the training texts, as large as the model's first input allows; longer texts are cut off. A run
keeps it (data_facts.py), and what is done with the trained weights goes by it.
"""

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scpl_compile.errors import DataError
from scpl_compile.ir import MULTI_LABEL, SINGLE_LABEL, InputSpec
from scpl_compile.runtime.arrays import Inputs, reading
from scpl_compile.runtime.data_facts import DATA_FACTS, FIRST_WORD, OTHER_WORD, DataFacts
from scpl_compile.runtime.splits import Split, Splits, check_parts, take_out

__all__ = ["csv_splits", "words_of"]

_WORD = re.compile(r"\w+|[^\w\s]")
_COLUMNS = ("text", "label", "split")
_PARTS = ("train", "validation", "test")
_SHOWN_LABELS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A text of the file; line: the last one that it stands on. part: "" where none is named."""

    line: int
    text: str
    labels: tuple[str, ...]
    part: str


def words_of(text: str) -> list[str]:
    """The tokens of a text."""
    return _WORD.findall(text.lower())


def csv_splits(
    spec: str,
    path: Path,
    inputs: Inputs,
    task: str = SINGLE_LABEL,
    facts: DataFacts | None = None,
) -> Splits:
    """Columns `text` and `label` (any strings, numbered in their order), and `split` (train,
    validation, test) or none. Where no row is of validation or test, 10 and 20 % of the training
    rows are; a row that alone has one of its labels stays in train. A .tsv file has tabs between
    its columns. Of task multi-label a label is several with a ; between them, or none.

    facts: of the run whose model reads the texts, by which words and labels are numbered; then
    there need be no training rows. None: that of the training rows.

    Raises:
        DataError: the file is missing, damaged, or has other columns; a label is in no training
            row, or not among the facts; the model takes something else than token numbers and a
            mask, or fewer numbers than they have.
    """
    length, size, has_mask = _wanted(spec, inputs)
    is_multi = task == MULTI_LABEL
    given = _read(path, is_multi=is_multi)
    known = _label_names(path, given) if facts is None else facts.labels
    labels = _labels(path, given, known, is_multi=is_multi)
    rows, note = _rows(given, labels)
    tokens = [words_of(row.text) for row in given]
    if facts is None:
        _check_trained(path, given, rows["train"])
        check_parts(spec, sum(row.part in ("", "train") for row in given), rows)
        texts = [tokens[row] for row in rows["train"].tolist()]
        facts = DataFacts(words=_frequent(texts, size), labels=known)
    if size is not None and len(facts.words) > max(0, size - FIRST_WORD):
        raise DataError(
            f"{DATA_FACTS} has {len(facts.words)} words, and the model takes token numbers "
            f"below {size}; put the one that was kept with the weights beside them"
        )
    numbers = {word: i for i, word in enumerate(facts.words, FIRST_WORD)}

    def split(part: str) -> Split:
        chosen = [tokens[row] for row in rows[part].tolist()]
        ids, mask = _numbered(chosen, numbers, length)
        return Split(inputs=(ids, mask) if has_mask else (ids,), labels=labels[rows[part]])

    train, validation, test = map(split, _PARTS)
    return Splits(
        name=spec, kind="tensor", num_classes=len(known), train=train, validation=validation,
        read_test=lambda: test, flip_safe=True, note=note, facts=facts,
    )  # fmt: skip


def _several(label: str) -> tuple[str, ...]:
    return tuple(name for name in map(str.strip, label.split(";")) if name)


def _label_names(path: Path, given: Sequence[_Row]) -> tuple[str, ...]:
    """All labels of the file, in their order."""
    known = sorted({label for row in given for label in row.labels}, key=_order)
    if len(known) < 2:
        what = f"one label, {known[0]!r}" if known else "no label"
        raise DataError(f"{path} has {what}; a classifier needs two")
    return tuple(known)


def _labels(path: Path, given: Sequence[_Row], known: Sequence[str], *, is_multi: bool) -> Tensor:
    """The number of each row's label, or bool (N, classes): which of the known ones it has."""
    classes = {label: i for i, label in enumerate(known)}
    for row in given:
        for label in row.labels:
            if label not in classes:
                shown = ", ".join(map(repr, known[:_SHOWN_LABELS]))
                more = ", …" if len(known) > _SHOWN_LABELS else ""
                raise DataError(
                    f"{path}, line {row.line}: the model was trained without the label {label!r}; "
                    f"it knows {shown}{more}; mend the label, or leave the row out"
                )
    if not is_multi:
        return torch.tensor([classes[row.labels[0]] for row in given])
    labels = torch.zeros(len(given), len(known), dtype=torch.bool)
    for i, row in enumerate(given):
        labels[i, [classes[label] for label in row.labels]] = True
    return labels


def _wanted(spec: str, inputs: Inputs) -> tuple[int, int | None, bool]:
    """Length of a text, size of the vocabulary, and whether a mask is wanted."""
    ids, *others = inputs or [InputSpec(name="nothing", dtype="bool", shape=())]
    is_mask = [
        _is_tokens(item) and "mask" in item.name and "padding" not in item.name for item in others
    ]
    if not _is_tokens(ids) or not all(is_mask) or len(others) > 1 or ids.last is not None:
        takes = ", ".join(map(str, inputs)) or "nothing that is known"
        raise DataError(
            f"{spec} gives token numbers and a mask, and the model takes {takes}; it reads texts "
            "where its inputs are like ids:int64:64<20000,mask:int64:64<2"
        )
    return ids.shape[0], ids.high, bool(others)


def _is_tokens(item: InputSpec) -> bool:
    return len(item.shape) == 1 and item.dtype in ("int64", "int32")


def _read(path: Path, *, is_multi: bool) -> list[_Row]:
    """The rows, at least one; is_multi: a row has several labels, or none.

    Lines are counted by the reader: blank ones are no rows, and a quoted text may have several.
    """
    with reading(path), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        try:
            lines = [(reader.line_num, row) for row in reader if row]
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error
    (_, columns), *rows = lines or [(0, [])]
    if missing := {"text", "label"} - set(columns):
        raise DataError(
            f"{path} has no column {min(missing)!r}; its columns: {', '.join(columns) or 'none'}"
        )
    if len(set(columns)) < len(columns):
        raise DataError(f"{path} has two columns of one name; its columns: {', '.join(columns)}")
    if not rows:
        raise DataError(f"{path} has no rows")
    places = [columns.index(name) if name in columns else None for name in _COLUMNS]
    found = []
    for line, row in rows:
        if len(row) > len(columns):
            raise DataError(
                f"{path}, line {line} has more columns than the first line; quote a text that has "
                "commas"
            )
        # A row that is shorter than the first one stays so in memory: it has nothing there.
        cells = [row[i] if i is not None and i < len(row) else None for i in places]
        found.append(_row(path, line, cells, "split" in columns, is_multi))
    return found


def _row(
    path: Path, line: int, cells: Sequence[str | None], has_parts: bool, is_multi: bool
) -> _Row:
    text, label, part = cells
    if not text or label is None or not (is_multi or label.strip()):
        raise DataError(f"{path}, line {line}: a text and a label are needed")
    if has_parts and part not in _PARTS:
        raise DataError(f"{path}, line {line}: split {part!r} is not {', '.join(_PARTS)}")
    labels = _several(label) if is_multi else (label.strip(),)
    return _Row(line=line, text=text, labels=labels, part=part or "")


def _check_trained(path: Path, given: Sequence[_Row], train: Tensor) -> None:
    """A class that is only evaluated would count as wrong, and its place in the logits stay."""
    if not len(train):
        raise DataError(f"{path} has no row whose split is train")
    trained = {label for i in train.tolist() for label in given[i].labels}
    for row in given:
        for label in sorted(set(row.labels) - trained):
            raise DataError(
                f"{path}, line {row.line}: the split {row.part} has the label {label!r}, and "
                "no row of train has it; give train rows of it, or leave these out"
            )


def _order(label: str) -> tuple[float, str]:
    """Whole numbers by their value, before all others."""
    is_number = re.fullmatch(r"-?\d{1,15}", label) is not None
    return (float(label) if is_number else float("inf"), label)


def _rows(given: Sequence[_Row], labels: Tensor) -> tuple[dict[str, Tensor], str]:
    """The rows of every part, and what was done to have them all."""
    named = [row.part or "train" for row in given]
    rows = {
        part: torch.tensor([i for i, own in enumerate(named) if own == part], dtype=torch.int64)
        for part in _PARTS
    }
    train = rows["train"]
    if not len(train):
        return rows, ""
    taken, note = take_out(labels[train], [part for part in _PARTS[1:] if not len(rows[part])])
    return rows | {part: train[chosen] for part, chosen in taken.items()}, note


def _frequent(texts: Sequence[Sequence[str]], size: int | None) -> tuple[str, ...]:
    """As many words as have a number; the most frequent first, equal ones in alphabetical order."""
    counts = Counter(word for text in texts for word in text)
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    return tuple(ordered if size is None else ordered[: max(0, size - FIRST_WORD)])


def _numbered(
    texts: Sequence[Sequence[str]], known: Mapping[str, int], length: int
) -> tuple[Tensor, Tensor]:
    """ids and mask, each int64 (N, length); a text without a word is one unknown word."""
    ids = torch.zeros(len(texts), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        numbers = [known.get(word, OTHER_WORD) for word in text[:length]] or [OTHER_WORD]
        ids[row, : len(numbers)] = torch.tensor(numbers)
        mask[row, : len(numbers)] = 1
    return ids, mask
