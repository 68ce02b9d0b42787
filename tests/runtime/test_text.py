"""Texts with labels from a CSV file become token numbers; the test texts teach nothing."""

import tracemalloc
from pathlib import Path

import pytest
import torch

from scpl_compile.errors import DataError
from scpl_compile.inputs import parse_inputs
from scpl_compile.runtime.datasets import open_splits
from scpl_compile.runtime.splits import Splits
from scpl_compile.runtime.text import words_of

WITH_MASK = "ids:int64:5<6,mask:int64:5<2"
TEXTS = """text,label,split
"Good, good film!",pos,train
bad film,neg,train
"a good ""film"" with a very long tail",pos,train
unseen words,neg,test
good,pos,validation
"""


def opened(folder: Path, text: str, inputs: str = WITH_MASK, name: str = "data.csv") -> Splits:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    names = [part.split(":")[0] for part in inputs.split(",")]
    return open_splits(f"csv:{path}", inputs=parse_inputs(inputs, names))


def test_words_are_lower_case_and_signs_stand_alone() -> None:
    assert words_of("It's GOOD, né?") == ["it", "'", "s", "good", ",", "né", "?"]


def test_the_most_frequent_words_of_the_training_texts_have_numbers(tmp_path: Path) -> None:
    found = opened(tmp_path, TEXTS)
    # film 3, good 3, '"' 2, a 2 fill the vocabulary of 6; 0 and 1 are padding and all others
    film, good, quote, a = 2, 3, 4, 5
    ids, mask = found.train.inputs
    assert ids.tolist() == [
        [good, 1, good, film, 1],
        [1, film, 0, 0, 0],
        [a, good, quote, film, quote],
    ]
    assert mask.tolist() == [[1] * 5, [1, 1, 0, 0, 0], [1] * 5]
    assert found.train.labels.tolist() == [1, 0, 1]  # neg, pos
    assert found.test.inputs[0].tolist() == [[1, 1, 0, 0, 0]]
    assert found.validation.inputs[0].tolist() == [[good, 0, 0, 0, 0]]
    assert (found.num_classes, found.kind) == (2, "tensor")


def test_without_a_mask_only_the_numbers_are_given(tmp_path: Path) -> None:
    (ids,) = opened(tmp_path, TEXTS, "ids:int64:3<6").train.inputs
    assert ids.shape == (3, 3) and ids.dtype == torch.int64


def test_without_splits_a_fixed_share_of_every_label_is_taken(tmp_path: Path) -> None:
    rows = "".join(f"word{i} thing{i % 7},{i % 2}\n" for i in range(200))
    found = opened(tmp_path, f"text,label\n{rows}", "ids:int64:4<500,mask:int64:4<2")
    again = opened(tmp_path, f"text,label\n{rows}", "ids:int64:4<500,mask:int64:4<2")
    sizes = [len(part) for part in (found.train, found.validation, found.test)]
    assert sizes == [140, 20, 40]
    assert found.test.labels.bincount().tolist() == [20, 20]
    assert torch.equal(found.test.inputs[0], again.test.inputs[0])
    known = set(found.train.inputs[0].unique().tolist())
    assert set(found.test.inputs[0].unique().tolist()) <= known | {1}


@pytest.mark.parametrize("split", ["", ",train"])
def test_rows_taken_out_of_train_give_the_vocabulary_no_word(tmp_path: Path, split: str) -> None:
    """Every text is a word of its own."""
    rows = "".join(f"word{i},{i % 2}{split}\n" for i in range(100))
    columns = "text,label,split" if split else "text,label"
    found = opened(tmp_path, f"{columns}\n{rows}", "ids:int64:4<500")
    assert (len(found.test), len(found.validation)) == (20, 10)
    assert found.facts is not None and len(found.facts.words) == 70
    assert found.train.inputs[0][:, 0].min() == 2
    for part in (found.test, found.validation):
        assert part.inputs[0].unique().tolist() == [0, 1]
    assert found.note == "10 % for validation and 20 % for test taken out of its training samples"


def test_only_the_part_that_is_missing_is_taken_out(tmp_path: Path) -> None:
    rows = "".join(f"word{i},{i % 2},train\n" for i in range(20)) + "seen,0,test\n"
    found = opened(tmp_path, f"text,label,split\n{rows}", "ids:int64:4<500")
    assert [len(part) for part in (found.train, found.validation, found.test)] == [18, 2, 1]
    with pytest.raises(DataError, match="has 2 training samples, too few to take a validation"):
        opened(tmp_path, "text,label,split\na,b,train\nc,d,train\na,b,test\n")


@pytest.mark.parametrize("split", ["", ",train"])
def test_a_row_that_alone_has_a_label_is_trained_on(tmp_path: Path, split: str) -> None:
    inputs = parse_inputs("ids:int64:5<9", ["ids"])
    columns = "text,label,split" if split else "text,label"
    sizes = set()
    for place in range(30):
        labels = [f"{'a;b' if i % 2 else 'a'}{';rare' * (i == place)}{split}" for i in range(30)]
        rows = "".join(f"w,{label}\n" for label in labels)
        (tmp_path / "data.csv").write_text(f"{columns}\n{rows}")
        found = open_splits(f"csv:{tmp_path}/data.csv", inputs=inputs, task="multi-label")
        assert found.train.labels[:, 2].sum() == 1
        sizes.add(len(found.train))
    assert sizes == {21, 22}  # of 30, some were for validation and test


def test_labels_that_are_numbers_keep_their_order(tmp_path: Path) -> None:
    rows = "".join(f"w,{label},train\n" for label in (10, 9, -1, "x"))
    found = opened(tmp_path, f"text,label,split\n{rows}w,9,test\nw,9,validation\n")
    assert found.train.labels.tolist() == [2, 1, 0, 3]


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_class_that_no_training_text_has_is_told(tmp_path: Path, part: str) -> None:
    rows = f"text,label,split\na,x,train\nb,y,train\nc,z,{part}\n"
    message = f"line 4: the split {part} has the label 'z', and no row of train has it; give train"
    with pytest.raises(DataError, match=message):
        opened(tmp_path, rows)
    more = "d,z,train\ne,x,test\nf,y,validation\n"
    assert opened(tmp_path, rows + more, "ids:int64:5<9").num_classes == 3


def test_a_tsv_file_has_tabs(tmp_path: Path) -> None:
    rows = "a\tone, two\nb\tthree\n" * 20
    found = opened(tmp_path, f"label\ttext\n{rows}", "ids:int64:5<9", name="data.tsv")
    assert found.num_classes == 2
    assert (found.train.inputs[0] > 0).sum(1).unique().tolist() == [1, 3]


def test_a_text_without_a_word_is_one_unknown_word(tmp_path: Path) -> None:
    found = opened(tmp_path, TEXTS.replace("bad film", '"  "'))
    assert found.train.inputs[1][1].tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,kind\na,b\n", r"has no column 'label'; its columns: text, kind"),
        ("", "has no column 'label'; its columns: none"),
        ("text,label\n", "has no rows"),
        ("text,label\na,\n", "line 2: a text and a label are needed"),
        ("text,label,split\na,b,train\nc,d,dev\n", r"line 3: split 'dev' is not train, validation"),
        ("text,label,split\na,b,test\nc,d,test\n", "has no row whose split is train"),
        ("text,label\na,b\nc,b\n", "has one label, 'b'; a classifier needs two"),
        ("text,label\nNice, well made,good\na,b\n", "line 2 has more columns than the first line"),
        ("text,label\n\n\na,b\n\nc,\n", "line 6: a text and a label are needed"),
        ('text,label\n"a\n\nb",c\nd,\n', "line 5: a text and a label are needed"),
        ('text,label\nd,e\n"a\nb",\n', "line 4: a text and a label are needed"),
        ('text,label,split\n"a\nb",c,train\n\nd,e,train\nf,g,test\n', "line 6: the split test"),
        ("text,label,text\na,b,c\n", "has two columns of one name"),
        ("text,label\n" + 200_000 * "x" + ",a\n", "cannot be read: line 2: field larger"),
    ],
)
def test_a_file_that_cannot_be_used_is_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(tmp_path, text)


@pytest.mark.parametrize(
    "inputs",
    [
        "x:float32:3x8x8",
        "ids:int64:5<9,kind:int64:5<2",
        "ids:int64:5<9,padding_mask:int64:5<2",
        "n:int64:3x2<9",
    ],
)
def test_a_model_that_takes_something_else_is_told(tmp_path: Path, inputs: str) -> None:
    with pytest.raises(DataError, match="gives token numbers and a mask, and the model takes"):
        opened(tmp_path, TEXTS, inputs)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.csv is missing"):
        open_splits(f"csv:{tmp_path}/gone.csv", inputs=parse_inputs(WITH_MASK, ["ids", "mask"]))


def test_blanks_around_a_label_and_a_mark_at_the_beginning_do_not_count(tmp_path: Path) -> None:
    rows = "\ufefftext,label\n" + "one, good\ntwo,good \nthree,bad\n" * 10
    assert opened(tmp_path, rows, "ids:int64:5<9").num_classes == 2


SEVERAL = """text,label,split
one,comedy; drama,train
two,drama,train
three,,train
four,war;comedy;,test
five,drama;drama,validation
six,war,train
"""


def test_several_labels_stand_with_semicolons_between_them(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text(SEVERAL)
    inputs = parse_inputs("ids:int64:5<9", ["ids"])
    found = open_splits(f"csv:{tmp_path}/data.csv", inputs=inputs, task="multi-label")
    assert found.num_classes == 3  # comedy, drama, war
    assert found.train.labels.dtype == torch.bool
    assert found.train.labels.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert found.test.labels.tolist() == [[1, 0, 1]]
    assert found.validation.labels.tolist() == [[0, 1, 0]]
    with pytest.raises(DataError, match="line 4: a text and a label are needed"):
        open_splits(f"csv:{tmp_path}/data.csv", inputs=inputs)  # of which one must be there
    (tmp_path / "data.csv").write_text("text,label\na,\nb,;\n")
    with pytest.raises(DataError, match="has no label; a classifier needs two"):
        open_splits(f"csv:{tmp_path}/data.csv", inputs=inputs, task="multi-label")


def test_rows_shorter_than_a_wide_first_one_take_no_more_memory(tmp_path: Path) -> None:
    """A small file, but 25 million cells."""
    columns = "".join(f",c{i}" for i in range(5000))
    text = f"text,label{columns}\n" + "word,a\nother,b\n" * 2500
    tracemalloc.start()
    found = opened(tmp_path, text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.train) == 3500 and peak < 30e6
