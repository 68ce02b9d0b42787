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
from pathlib import Path

import torch
from torch import Tensor

from scpl_compile.errors import DataError
from scpl_compile.ir import InputSpec
from scpl_compile.runtime.arrays import Inputs, reading
from scpl_compile.runtime.splits import Split, Splits, make_splits, stratified

__all__ = ["csv_splits", "words_of"]

_WORD = re.compile(r"\w+|[^\w\s]")
_COLUMNS = ("text", "label", "split")
_PARTS = ("train", "validation", "test")
_SHARES = (0.1, 0.2)  # of validation and test, where the file names no splits
_OTHER, _FIRST_WORD = 1, 2


def words_of(text: str) -> list[str]:
    """The tokens of a text."""
    return _WORD.findall(text.lower())


def csv_splits(spec: str, path: Path, inputs: Inputs) -> Splits:
    """Columns `text` and `label` (any strings, numbered in their order), and `split` (train,
    validation, test) or none: then 10 and 20 % of the rows are validation and test. A .tsv file has
    tabs between its columns.

    Raises:
        DataError: the file is missing, damaged, or has other columns; the model takes something
            else than token numbers and a mask.
    """
    length, size, has_mask = _wanted(spec, inputs)
    texts, names, parts = _read(path)
    classes = {name: i for i, name in enumerate(sorted(set(names), key=_order))}
    if len(classes) < 2:
        raise DataError(f"{path} has one label, {names[0]!r}; a classifier needs two")
    labels = torch.tensor([classes[name] for name in names])
    tokens = [words_of(text) for text in texts]
    rows = _rows(parts, labels)
    if not len(rows["train"]):
        raise DataError(f"{path} has no row whose split is train")
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


def _read(path: Path) -> tuple[list[str], list[str], list[str]]:
    """Texts, labels and parts of the rows; a part is "" where there is no such column."""
    with reading(path), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        columns, *rows = [row for row in reader if row] or [[]]
    if missing := {"text", "label"} - set(columns):
        raise DataError(
            f"{path} has no column {min(missing)!r}; its columns: {', '.join(columns) or 'none'}"
        )
    if len(set(columns)) < len(columns):
        raise DataError(f"{path} has two columns of one name; its columns: {', '.join(columns)}")
    places = [columns.index(name) if name in columns else None for name in _COLUMNS]
    # A row that is shorter than the first one stays so in memory: it has "" there.
    cells = [[row[i] if i is not None and i < len(row) else "" for i in places] for row in rows]
    for number, (row, (text, label, part)) in enumerate(zip(rows, cells, strict=True), 2):
        if len(row) > len(columns):
            raise DataError(
                f"{path}, row {number} has more columns than the first row; quote a text that has "
                "commas"
            )
        if not text or not label.strip():
            raise DataError(f"{path}, row {number}: a text and a label are needed")
        if "split" in columns and part not in _PARTS:
            raise DataError(f"{path}, row {number}: split {part!r} is not {', '.join(_PARTS)}")
    if not rows:
        raise DataError(f"{path} has no rows")
    texts, labels, parts = (list(column) for column in zip(*cells, strict=True))
    return texts, [label.strip() for label in labels], parts


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
