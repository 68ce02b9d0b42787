"""A run keeps what it learned of its data; what is done with its weights goes by that."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from processes import train_ranks
from run_files import final
from scpl_compile import compile_model
from scpl_compile.errors import DataError, ProgramError
from scpl_compile.inputs import parse_inputs
from scpl_compile.runtime import data_facts as facts_module
from scpl_compile.runtime import open_loader as open_loader_module
from scpl_compile.runtime import run as run_module
from scpl_compile.runtime.data import Loader
from scpl_compile.runtime.data_facts import DataFacts, read_facts
from scpl_compile.runtime.datasets import open_splits
from scpl_compile.runtime.splits import Splits

Train = Callable[..., Any]
Scpl = Callable[..., Any]

NET = '''
from torch import nn


def build_model():
    """Token numbers (B, 4) to logits of 2 classes."""
    return nn.Sequential(
        nn.Embedding(40, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 2),
    )
'''
GOOD, BAD = ("good", "great", "fine", "nice"), ("bad", "poor", "awful", "dull")
INPUTS = parse_inputs("ids:int64:3<9", ["ids"])


def rows(part: str, counts: tuple[int, ...]) -> str:
    """Texts of two classes; words occur by `counts`, so that by these they are numbered."""
    found = []
    for label, words in (("pos", GOOD), ("neg", BAD)):
        for word, count in zip(words, counts, strict=True):
            found += [f"{word} {word} film,{label},{part}\n"] * count
    return "".join(found)


TEST_ROWS = rows("test", (3, 2, 2, 1)) + rows("validation", (1, 1, 1, 1))
OPTIONS = ("--batch-size", 10, "--epochs", 10, "--lr", 0.02)  # 40 samples, 4 batches


@pytest.fixture(scope="module")
def compiled_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "net.py").write_text(NET)
    out = folder / "program"
    source = f"{folder / 'net.py'}:build_model"
    compile_model(source, "int64:4<40", num_stages=2, out=out, verify=False)
    return out


@pytest.fixture
def text_program(compiled_text: Path, tmp_path: Path) -> Iterator[Path]:
    """The program, with a run directory of this test alone; beside it the texts."""
    (tmp_path / "texts.csv").write_text(
        "text,label,split\n" + rows("train", (8, 6, 4, 2)) + TEST_ROWS
    )
    yield compiled_text


def write_otherwise(tmp_path: Path) -> Path:
    """The same test texts beside training texts by which the words would be numbered otherwise."""
    path = tmp_path / "otherwise.csv"
    path.write_text("text,label,split\n" + rows("train", (2, 4, 6, 8)) + TEST_ROWS)
    return path


def told(result: Any) -> dict[str, Any]:
    """What `scpl evaluate --json` printed; accuracy and losses."""
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    return {name: facts[name] for name in ("accuracy", "num_samples", "losses")}


def open_texts(path: Path, text: str, facts: Path, task: str = "single-label") -> Splits:
    path.write_text(text)
    return open_splits(f"csv:{path}", inputs=INPUTS, task=task, facts=facts)


def kept(folder: Path, **changes: Any) -> Path:
    path = folder / "data_facts.json"
    facts = {"words": ["film", "good"], "labels": ["b", "a"], "mean": [], "std": [], **changes}
    path.write_text(json.dumps(facts))
    return path


# ---------------------------------------------------------------------- a run


def test_trained_weights_are_evaluated_by_the_numbers_of_their_run(
    text_program: Path, tmp_path: Path, train: Train, scpl: Scpl
) -> None:
    run, data = tmp_path / "run", tmp_path / "texts.csv"
    assert train(text_program, "--data", f"csv:{data}", "--run-dir", run, *OPTIONS).code == 0
    words = json.loads((run / "data_facts.json").read_text())
    assert words["labels"] == ["neg", "pos"]
    assert words["words"][:3] == ["film", "bad", "good"]

    def evaluate(path: Path, *options: object) -> Any:
        of_run = ("--run-dir", run, "--json")
        return scpl("evaluate", text_program, "--data", f"csv:{path}", *of_run, *options)

    expected = told(evaluate(data))
    assert expected["accuracy"] == 1.0 and expected["num_samples"] == 16
    assert told(evaluate(write_otherwise(tmp_path))) == expected
    only = tmp_path / "only.csv"  # no training rows, one class
    only.write_text("text,label,split\n" + "good nice film,pos,test\n" * 3)
    assert told(evaluate(only))["num_samples"] == 3
    assert "only.csv: train has no sample" in evaluate(only, "--split", "train").stderr
    only.write_text("text,label,split\ngood,pos,test\n\nbad film,odd,test\n")
    assert evaluate(only).stderr == (
        f"error: {only}, line 4: the model was trained without the label 'odd'; it knows 'neg', "
        "'pos'; mend the label, or leave the row out\n"
    )
    (run / "data_facts.json").unlink()  # as of an older run
    refused = evaluate(data)
    assert refused.exit_code == 1 and "run/data_facts.json is missing" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize("engine", ["threads", "ranks"])
def test_a_resumed_run_goes_by_the_numbers_it_began_with(
    engine: str, text_program: Path, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has changed meanwhile, but not its name."""
    run, data = tmp_path / "run", tmp_path / "texts.csv"
    given = ("--data", f"csv:{data}", "--run-dir", run, *OPTIONS, "--save-every", 4)
    if engine == "threads":
        assert train(text_program, *given).code == 0
    else:
        assert [one.code for one in train_ranks(text_program, *given)] == [0, 0]
    words = (run / "data_facts.json").read_bytes()
    weights = final(run)
    for name in ("result.json", "final.safetensors"):  # as if killed at the end
        (run / name).unlink()
    data.write_text(write_otherwise(tmp_path).read_text())
    opened = []

    def remember(*arguments: Any, **options: Any) -> Loader:
        opened.append(open_loader_module.open_loader(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(run_module, "open_loader", remember)
    if engine == "threads":
        ran = train(text_program, *given, "--resume")
        assert ran.code == 0
        assert [str(loader.splits.facts.words[1]) for loader in opened] == ["bad"]
    else:
        ran = train_ranks(text_program, *given, "--resume")[0]
    assert "100.00 % on the test split after 40 steps" in ran.stderr
    assert (run / "data_facts.json").read_bytes() == words
    assert all(torch.equal(weights[name], value) for name, value in final(run).items())


def test_an_older_run_is_not_gone_on_with(text_program: Path, tmp_path: Path, train: Train) -> None:
    run = tmp_path / "run"
    given = ("--data", f"csv:{tmp_path / 'texts.csv'}", "--run-dir", run, *OPTIONS)
    assert train(text_program, *given, "--save-every", 20).code == 0
    for name in ("result.json", "data_facts.json"):
        (run / name).unlink()
    ran = train(text_program, *given, "--resume")
    assert ran.code == 1
    assert ran.stderr.startswith(f"error: {run / 'data_facts.json'} is missing")


def test_tensors_leave_nothing_to_be_kept(text_program: Path, tmp_path: Path, train: Train) -> None:
    given = ("--data", "random:40", "--steps", 1, "--batch-size", 16, "--run-dir", tmp_path / "run")
    assert train(text_program, *given).code == 0
    assert not (tmp_path / "run" / "data_facts.json").exists()


# ---------------------------------------------------------------------- images


def write_images(folder: Path, shades: dict[str, int]) -> Path:
    """Plain images of 8x8, the same for train, validation and test; by class their shade."""
    for part in ("train", "validation", "test"):
        for name, shade in shades.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(8):
                image = Image.fromarray(np.full((8, 8), shade + i, dtype=np.uint8))
                image.save(folder / part / name / f"{i}.png")
    return folder


def test_images_are_normalised_and_numbered_as_they_were_trained(
    program: Path, tmp_path: Path, train: Train, scpl: Scpl
) -> None:
    """Of the second folder's own, the mean is another one and class 0 is that of the white ones."""
    given = ("--run-dir", tmp_path / "run", "--batch-size", 8, "--epochs", 12, "--lr", 0.02)
    trained = write_images(tmp_path / "trained", {"black": 0, "grey": 120, "white": 240})
    assert train(program, "--data", f"imagefolder:{trained}", *given).code == 0
    facts = json.loads((tmp_path / "run" / "data_facts.json").read_text())
    assert facts["labels"] == ["black", "grey", "white"] and facts["words"] == []
    assert facts["mean"] == pytest.approx([(120 + 3.5) / 255])
    others = write_images(tmp_path / "others", {"white": 240, "grey": 120})

    def evaluate(folder: Path) -> Any:
        where = ("--data", f"imagefolder:{folder}", "--run-dir", tmp_path / "run", "--json")
        return scpl("evaluate", program, *where)

    assert told(evaluate(trained))["accuracy"] == told(evaluate(others))["accuracy"] == 1.0
    (tmp_path / "others" / "test" / "pink").mkdir()
    assert evaluate(tmp_path / "others").stderr.endswith(
        "pink is no class that is trained (black, grey, white)\n"
    )
    (tmp_path / "others" / "test" / "pink").rmdir()
    (tmp_path / "run" / "data_facts.json").unlink()  # as of weights from elsewhere
    assert told(evaluate(others))["accuracy"] < 1.0


# ---------------------------------------------------------------------- the numbers


def test_words_and_labels_have_the_numbers_of_the_vocabulary(tmp_path: Path) -> None:
    text = (
        "text,label,split\ngood old film,a,train\nold,b,train\nold film,a,test\ngood,b,validation\n"
    )
    found = open_texts(tmp_path / "a.csv", text, kept(tmp_path))
    assert found.train.inputs[0].tolist() == [[3, 1, 2], [1, 0, 0]]
    assert found.train.labels.tolist() == [1, 0]
    assert (found.test.inputs[0].tolist(), found.test.labels.tolist()) == ([[1, 2, 0]], [1])
    assert found.facts == DataFacts(words=("film", "good"), labels=("b", "a"))
    assert (
        open_texts(tmp_path / "a.csv", text, kept(tmp_path, labels=["c", "b", "a"])).num_classes
        == 3
    )


def test_several_labels_have_the_columns_of_the_vocabulary(tmp_path: Path) -> None:
    text = "text,label,split\nfilm,a,test\nfilm,,test\nfilm,a;b,test\n"
    found = open_texts(tmp_path / "a.csv", text, kept(tmp_path), "multi-label")
    assert found.test.labels.tolist() == [[0, 1], [0, 0], [1, 1]]
    assert found.num_classes == 2 and len(found.train) == len(found.validation) == 0
    with pytest.raises(DataError, match=r"a\.csv, line 2: the model was trained without .* 'c'"):
        open_texts(tmp_path / "a.csv", "text,label\nfilm,a; c\n", kept(tmp_path), "multi-label")


def test_a_vocabulary_that_is_too_large_for_the_model_is_told(tmp_path: Path) -> None:
    words = kept(tmp_path, words=list("abcdefg"))
    assert len(open_texts(tmp_path / "a.csv", "text,label\na,a\n", words).train) == 1
    with pytest.raises(DataError, match=r"data_facts\.json has 8 words, and the model .* below 9"):
        open_texts(tmp_path / "a.csv", "text,label\na,a\n", kept(tmp_path, words=list("abcdefgh")))


# ---------------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "Expecting"),
        (b"\xff", "can't decode"),
        (b"[" * 10**5, "recursion"),
        (b"[]", "must be an object"),
        (b'{"words": ["a"]}', "lacks the field 'labels'"),
        ({"x": 1}, "unknown field 'x'"),
        ({"words": "a"}, "words must be an array, not 'a'"),
        ({"words": ["a", 1]}, r"words\[1\] must be str, not 1"),
        ({"words": ["a", "b", "a"]}, "a word stands there twice"),
        ({"labels": ["a", "a"]}, "a label stands there twice"),
        ({"mean": [0.5]}, "mean and std are not as many finite numbers"),
        ({"mean": [float("nan")], "std": [1.0]}, "mean and std are not as many finite numbers"),
        ({"mean": [0.5], "std": [0.0]}, r"a std is 0\.0"),
    ],
)
def test_a_damaged_file_is_told(
    tmp_path: Path, content: bytes | dict[str, Any], message: str
) -> None:
    path = tmp_path / "data_facts.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        kept(tmp_path, **content)
    with pytest.raises(ProgramError, match=rf"data_facts\.json is damaged \(.*{message}"):
        read_facts(path)


def test_neither_a_pipe_nor_a_huge_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ProgramError, match="pipe is missing"):
        read_facts(tmp_path / "pipe")
    monkeypatch.setattr(facts_module, "_MOST_BYTES", 20)
    with pytest.raises(ProgramError, match="is damaged .it has more than 20 bytes"):
        read_facts(kept(tmp_path))
