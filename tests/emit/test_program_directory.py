"""Writing a program directory: all of it, or nothing; and never over what a user made."""

import ast
import dataclasses
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import scpl_compile.api
import scpl_compile.emit
from golden_models import GOLDEN, Compile
from scpl_compile.emit import GENERATED, check_target, program_directory, train_source
from scpl_compile.errors import EmitError, VerifyError
from scpl_compile.ir import Plan, from_json
from scpl_compile.runtime.program import read_plan
from scpl_compile.verify import verify

NAME = "late_input"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program; not to be written to."""
    out = tmp_path_factory.mktemp("made") / "late_input_program"
    GOLDEN[NAME].compile(out)
    return out


@pytest.fixture
def target(made: Path, tmp_path: Path) -> Path:
    """A copy of it, in a folder of its own."""
    return Path(shutil.copytree(made, tmp_path / "folder" / "late_input_program"))


def contents(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def replace(target: Path, *, force: bool = True, fill: str = "new") -> list[str]:
    """Replace the program by a directory with one file; gives the notices."""
    notices: list[str] = []
    with program_directory(target, force=force, notice=notices.append) as part:
        (part / "plan.json").write_text(fill)
    return notices


# ---------------------------------------------------------------------- what is written


def test_a_program_has_its_files_and_nothing_else(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == sorted(GENERATED)
    assert made.stat().st_mode & 0o777 == 0o755
    assert list(made.parent.iterdir()) == [made]


def test_all_python_files_have_the_stamp_and_belong_to_the_plan(made: Path) -> None:
    plan = read_plan(made)
    stamps = {(made / name).read_text().splitlines()[0] for name in GENERATED if name[-3:] == ".py"}
    assert len(stamps) == 1 and plan.digest[:32] in stamps.pop()
    assert json.loads((made / "verification.json").read_text())["plan"] == plan.digest


def test_the_directory_is_a_package(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(made.parent)
    try:
        package = importlib.import_module(made.name)
        assert package.__all__ == ["build_trainer"]
        with package.build_trainer() as trainer:
            assert trainer.plan == read_plan(made)
    finally:
        for name in (made.name, f"{made.name}.stages"):
            sys.modules.pop(name, None)


def test_train_py_shows_the_schedule_of_its_plan(golden: Compile) -> None:
    scpl, bp = train_source(golden("unet").plan), train_source(golden(NAME).plan)
    assert "    stage 2   .  .  F0 B0 F1 B1 F2 B2" in scpl
    assert 'schedule = "stream"  # or in_step, sequential\n' in scpl
    assert "    stage 1   .  F0 B0 .  .  F1 B1" in bp
    assert 'schedule = "bp"  # or gpipe, 1f1b, zb, ddp\nmicrobatches = 8' in bp
    gpipe = train_source(dataclasses.replace(golden(NAME).plan, schedule="gpipe"))
    assert "    stage 1   .  F0 F1 F2 F3 B0 B0 B1 B1 B2 B2 B3 B3" in gpipe


@pytest.mark.parametrize("num_stages", [1, 2, 4, 6, 9, 30])
@pytest.mark.parametrize("method", ["scpl", "bp"])
def test_the_picture_fits_however_many_stages_there_are(
    num_stages: int, method: str, golden: Compile
) -> None:
    plan = golden("unet" if method == "scpl" else NAME).plan
    data = json.loads((golden("unet" if method == "scpl" else NAME).directory / "plan.json")
                      .read_text())  # fmt: skip
    stage, cut = data["stages"][0], data["cuts"][0]
    data["stages"] = [{**stage, "index": k} for k in range(num_stages)]
    data["cuts"] = [{**cut, "index": k} for k in range(num_stages - 1)]
    data["placement"] = ["cpu"] * num_stages
    text = train_source(from_json(Plan, data))
    assert plan.schedule in text
    assert max(map(len, text.splitlines())) <= 100
    assert ("stage 0" in text) == (num_stages < 30)
    ast.parse(text)


@pytest.mark.parametrize("model", ['x"""\nimport os\n"""', "C:\\new\\net.py:Net", "n" * 300])
def test_no_name_of_a_model_leaves_the_docstrings(model: str, golden: Compile) -> None:
    data = json.loads((golden(NAME).directory / "plan.json").read_text())
    text = train_source(from_json(Plan, {**data, "model": model}))
    tree = ast.parse(text)
    assert ast.get_docstring(tree) is not None
    assert "import os" not in text.splitlines()
    assert max(map(len, text.splitlines())) <= 100


# ---------------------------------------------------------------------- what is refused


def test_an_existing_program_is_refused_and_stays(target: Path) -> None:
    before = contents(target)
    with pytest.raises(EmitError, match=r"program exists; choose another -o.*--force"):
        GOLDEN[NAME].compile(target)
    assert contents(target) == before


def test_a_train_py_that_was_changed_is_named(target: Path) -> None:
    train = target / "train.py"
    train.write_text(train.read_text().replace("epochs = 1", "epochs = 9"))
    with pytest.raises(EmitError, match=r"program exists \(its train\.py was changed by hand\)"):
        check_target(target, force=False)


def test_a_plan_that_cannot_be_read_counts_as_changed(target: Path) -> None:
    (target / "plan.json").write_text("[" * 10**5)
    with pytest.raises(EmitError, match=r"program exists \(its train\.py was changed by hand\)"):
        check_target(target, force=False)


def test_a_file_is_refused_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for force in (False, True):
        with pytest.raises(EmitError, match="is a file; give -o a directory"):
            check_target(tmp_path / "file", force=force)


def test_a_directory_that_is_no_program_is_refused_even_with_force(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "train.py").write_text("mine")
    with pytest.raises(EmitError, match="exists"):
        check_target(project, force=False)
    with pytest.raises(EmitError, match="is no program, which --force could replace"):
        GOLDEN[NAME].compile(project, force=True)
    assert contents(project) == {"train.py": b"mine"}


def test_an_empty_or_missing_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert replace(target, force=False) == []
        assert contents(target) == {"plan.json": b"new"}
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))


def test_what_appears_in_the_meantime_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "program"
    with pytest.raises(EmitError, match="exists"):
        with program_directory(target, force=False, notice=print):
            target.mkdir()
            (target / "other").write_text("of another process")
    assert contents(tmp_path) == {"program/other": b"of another process"}


# ---------------------------------------------------------------------- --force


def test_force_replaces_the_program_and_keeps_what_the_user_made(target: Path) -> None:
    (target / "run").mkdir()
    (target / "run" / "final.safetensors").write_bytes(b"trained")
    (target / "notes.txt").write_text("mine")
    (target / "__pycache__").mkdir()
    (target / "stages.py").write_text("# broken")
    GOLDEN[NAME].compile(target, force=True)
    found = contents(target)
    assert found.keys() == {*GENERATED, "run/final.safetensors", "notes.txt"}
    assert found["run/final.safetensors"] == b"trained"
    assert read_plan(target).method == "bp"
    assert list(target.parent.iterdir()) == [target]


def test_force_keeps_a_changed_train_py_beside_the_new_one(target: Path) -> None:
    mine = (target / "train.py").read_text() + "\n# mine\n"
    (target / "train.py").write_text(mine)
    assert replace(target) == [f"{target / 'train.py'} was changed by hand; it is kept as "
                               "train.py.old"]  # fmt: skip
    assert (target / "train.py.old").read_text() == mine
    assert not (target / "train.py").exists()


def test_an_older_train_py_old_is_not_lost(target: Path) -> None:
    for name in ("train.py.old", "train.py.old2"):
        (target / name).write_text(name)
    (target / "train.py").write_text("third")
    assert "train.py.old3" in replace(target)[0]
    found = contents(target)
    assert found["train.py.old"] == b"train.py.old"
    assert found["train.py.old3"] == b"third"


def test_force_takes_an_unchanged_train_py_away_without_a_word(target: Path) -> None:
    assert replace(target) == []
    assert contents(target) == {"plan.json": b"new"}


def test_a_train_py_beside_a_damaged_plan_counts_as_changed(target: Path) -> None:
    (target / "plan.json").write_text("{")
    assert len(replace(target)) == 1
    assert (target / "train.py.old").exists()


def test_force_follows_a_link_to_the_program(target: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(target)
    replace(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert contents(target) == {"plan.json": b"new"}


# ---------------------------------------------------------------------- when it fails


@pytest.mark.parametrize("error", [VerifyError("differs"), KeyboardInterrupt(), OSError("full")])
def test_nothing_is_left_when_the_compilation_fails(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(scpl_compile.api, "verify_stages", fails)
    expected = EmitError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        GOLDEN[NAME].compile(tmp_path / "out" / "program")
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "out"])


@pytest.mark.parametrize("error", [VerifyError("differs"), KeyboardInterrupt()])
def test_the_old_program_stays_when_the_new_one_fails(
    error: BaseException, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (target / "run").mkdir()
    (target / "run" / "metrics").write_text("mine")
    before = contents(target)

    def fails(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(scpl_compile.api, "verify_stages", fails)
    with pytest.raises(type(error)):
        GOLDEN[NAME].compile(target, force=True)
    assert contents(target) == before
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_nothing_of_the_user_is_lost_when_a_move_fails(
    failing: int, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first move takes the old program away, the second puts the new one there."""
    (target / "run").mkdir()
    (target / "run" / "metrics").write_text("mine")
    before = contents(target)
    moves = []
    original = os.replace

    def move(*paths: Path) -> None:
        moves.append(paths)
        if len(moves) == failing:
            raise KeyboardInterrupt
        original(*paths)

    monkeypatch.setattr(scpl_compile.emit.os, "replace", move)
    with pytest.raises(KeyboardInterrupt):
        replace(target)
    if failing < 3:
        assert contents(target) == before
        assert list(target.parent.iterdir()) == [target]
    else:
        assert b"mine" in contents(target.parent).values()


def test_a_temporary_program_goes_with_its_object_and_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = GOLDEN[NAME].compile()
    assert program.directory.parent == tmp_path and program.directory.is_dir()
    del program
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(scpl_compile.api, "verify_stages", lambda *a, **o: verify(*a))
    with pytest.raises(TypeError):
        GOLDEN[NAME].compile()
    assert list(tmp_path.iterdir()) == []
