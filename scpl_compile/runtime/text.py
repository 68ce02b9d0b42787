"""Text with labels from a CSV file, as token numbers for the model's inputs.

::

    text,label,split                   ids   7 2 31 0 0     0: padding, 1: any other word,
    "What a film!",good,train   ──▶    mask  1 1  1 0 0     2 …: by how often in the training texts

Words are runs of letters and digits, lower case, and single other signs. The vocabulary is that of
the training texts, as large as the model's first input allows; longer texts are cut off.
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
from scpl_compile.runtime.splits import Split, Splits, make_splits, stratified

__all__ = ["csv_splits", "words_of"]

_WORD = re.compile(r"\w+|[^\w\s]")
_COLUMNS = ("text", "label", "split")
_PARTS = ("train", "validation", "test")
_SHARES = (0.1, 0.2)  # of validation and test, where the file names no splits
_OTHER, _FIRST_WORD = 1, 2


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


def csv_splits(spec: str, path: Path, inputs: Inputs, task: str = SINGLE_LABEL) -> Splits:
    """Columns `text` and `label` (any strings, numbered in their order), and `split` (train,
    validation, test) or none: then 10 and 20 % of the rows are validation and test. A .tsv file has
    tabs between its columns. Of task multi-label a label is several with a ; between them, or none.

    Raises:
        DataError: the file is missing, damaged, or has other columns; a label is in no training
            row; the model takes something else than token numbers and a mask.
    """
    length, size, has_mask = _wanted(spec, inputs)
    is_multi = task == MULTI_LABEL
    given = _read(path, is_multi=is_multi)
    labels = _labels(path, [row.labels for row in given], is_multi=is_multi)
    tokens = [words_of(row.text) for row in given]
    rows = _rows([row.part for row in given], labels)
    if not len(rows["train"]):
        raise DataError(f"{path} has no row whose split is train")
    _check_trained(path, given)
    known = _vocabulary([tokens[row] for row in rows["train"].tolist()], size)

    def split(part: str) -> Split | None:
        if part not in rows:
            return None
        chosen = [tokens[row] for row in rows[part].tolist()]
        ids, mask = _numbered(chosen, known, length)
        return Split(inputs=(ids, mask) if has_mask else (ids,), labels=labels[rows[part]])

    found = {part: split(part) for part in _PARTS}
    train, test = found["train"], found["test"]
    assert train is not None, "there are training rows"
    read_test = None if test is None else (lambda: test)
    return make_splits(spec, "tensor", train, found["validation"], read_test)


def _several(label: str) -> tuple[str, ...]:
    return tuple(name for name in map(str.strip, label.split(";")) if name)


def _labels(path: Path, names: Sequence[Sequence[str]], *, is_multi: bool) -> Tensor:
    """The number of each row's name, or bool (N, classes): which of all names it has."""
    known = sorted({name for row in names for name in row}, key=_order)
    if len(known) < 2:
        what = f"one label, {known[0]!r}" if known else "no label"
        raise DataError(f"{path} has {what}; a classifier needs two")
    classes = {name: i for i, name in enumerate(known)}
    if not is_multi:
        return torch.tensor([classes[name] for (name,) in names])
    labels = torch.zeros(len(names), len(known), dtype=torch.bool)
    for row, own in enumerate(names):
        labels[row, [classes[name] for name in own]] = True
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


def _check_trained(path: Path, given: Sequence[_Row]) -> None:
    """A class that is only evaluated would count as wrong, and its place in the logits stay."""
    trained = {label for row in given if row.part in ("", "train") for label in row.labels}
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


def _rows(parts: Sequence[str], labels: Tensor) -> Mapping[str, Tensor]:
    if not any(parts):
        return dict(zip(_PARTS, stratified(labels, _SHARES), strict=True))
    found = {
        part: torch.tensor([row for row, own in enumerate(parts) if own == part], dtype=torch.int64)
        for part in _PARTS
    }
    return {part: rows for part, rows in found.items() if part == "train" or len(rows)}


def _vocabulary(texts: Sequence[Sequence[str]], size: int | None) -> dict[str, int]:
    """The number of each known word; the most frequent first, equal ones in alphabetical order."""
    counts = Counter(word for text in texts for word in text)
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    limit = len(ordered) if size is None else max(0, size - _FIRST_WORD)
    return {word: i for i, word in enumerate(ordered[:limit], _FIRST_WORD)}


def _numbered(
    texts: Sequence[Sequence[str]], known: Mapping[str, int], length: int
) -> tuple[Tensor, Tensor]:
    """ids and mask, each int64 (N, length); a text without a word is one unknown word."""
    ids = torch.zeros(len(texts), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        numbers = [known.get(word, _OTHER) for word in text[:length]] or [_OTHER]
        ids[row, : len(numbers)] = torch.tensor(numbers)
        mask[row, : len(numbers)] = 1
    return ids, mask
