"""The files of a run: what is kept, what is refused, what says that a run is finished."""

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from scpl_compile.errors import ProgramError
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime.data_facts import DataFacts, read_facts
from scpl_compile.runtime.run_directory import (
    _COMPARED,
    Follower,
    RunDirectory,
    _rows_before,
    trained_by_another,
    trained_steps,
)

RESULT = {"accuracy": 0.5, "samples_per_second": None, "steps": 7}


def options(**changes: Any) -> Namespace:
    """Those of a run, the compared ones equal."""
    return Namespace(**{**dict.fromkeys(_COMPARED, 1), "resume": False, "force": False, **changes})


def finished(path: Path) -> RunDirectory:
    """A run that is over, without checkpoints."""
    run = RunDirectory(path, "digest", options())
    assert run.begin(0, {}) == []
    run.append([{"step": 0, "stage": 0, "losses": {"a": 1.0}}])
    run.save_final({"w": torch.ones(2)}, 7)
    run.save_result(RESULT)
    return run


def test_rows_of_steps_that_will_be_done_again_are_dropped() -> None:
    rows = [{"step": step, "stage": 0} for step in (0, 1, 2, 3, 1)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    assert _rows_before(2, text + '{"step": 1, "st') == [rows[0], rows[1], rows[4]]
    assert _rows_before(2, "[]\n{}\n3\n" + text) == [rows[0], rows[1], rows[4]]
    assert _rows_before(9, "") == []


def test_nothing_is_written_before_the_run_begins(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", "digest", options())
    assert list(tmp_path.iterdir()) == []
    run.begin(0, {"torch": "2"})
    assert json.loads((tmp_path / "run" / "run.json").read_text())["versions"] == {"torch": "2"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_what_was_learned_of_the_data_is_kept_with_the_run(tmp_path: Path) -> None:
    facts = DataFacts(words=("film", "né", '"'), labels=("neg", "pos"))
    RunDirectory(tmp_path / "run", "digest", options()).begin(0, {}, facts)
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert files == ["data_facts.json", "run.json"]
    assert read_facts(tmp_path / "run" / "data_facts.json") == facts
    Follower(None, None).begin(0, {}, facts)
    RunDirectory(tmp_path / "run", "digest", options(force=True)).begin(0, {})
    assert not (tmp_path / "run" / "data_facts.json").exists()


def test_a_finished_run_gives_its_result_to_the_one_that_resumes(tmp_path: Path) -> None:
    finished(tmp_path / "run")
    assert RunDirectory(tmp_path / "run", "digest", options(resume=True)).result == RESULT
    assert RunDirectory(tmp_path / "run", "digest", options(force=True)).result is None
    with pytest.raises(ProgramError, match="is a run of another plan"):
        RunDirectory(tmp_path / "run", "other", options(resume=True))
    whole = '{"accuracy": 0.5, "steps": 7, "samples_per_second": '
    for text in (
        "{", "{}", '{"accuracy": "0.5", "steps": 7}', f'{{"accuracy": {"9" * 400}, "steps": 7}}',
        whole + '""}', whole + "[]}", whole + "true}", "[" * 10**5,
    ):  # fmt: skip
        (tmp_path / "run" / "result.json").write_text(text)
        with pytest.raises(ProgramError, match=r"result\.json is damaged.*--force"):
            RunDirectory(tmp_path / "run", "digest", options(resume=True))


def test_without_its_weights_a_run_is_not_finished(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    run.final.unlink()
    with pytest.raises(ProgramError, match="no complete checkpoint to resume from"):
        RunDirectory(run.path, "digest", options(resume=True))
    checkpoint.save_stage(run.path / "step-00000003", 0, {}, {})
    checkpoint.complete(run.path / "step-00000003", {"step": 3}, 1)
    again = RunDirectory(run.path, "digest", options(resume=True))
    assert (again.result, again.resume_from) == (None, run.path / "step-00000003")
    again.begin(3, {})
    assert not (run.path / "result.json").exists()  # it would be that of another end


def test_weights_know_the_steps_of_their_own_plans_run(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    assert trained_steps(run.final, "digest") == 7
    assert trained_steps(run.final, "another") is None
    first = run.final.read_bytes()
    run.save_final({"w": torch.ones(2)}, 7)
    assert run.final.read_bytes() == first
    of_steps = [{"run": f'{{"plan": "digest", "steps": {n}}}'} for n in ("1e999", "-1", '"7"')]
    for metadata in (
        {}, {"plan": "digest"}, {"run": "3"}, {"run": "{}"}, {"run": "{"}, {"run": "[" * 10**5},
        *of_steps,
    ):  # fmt: skip
        checkpoint.save_tensors(tmp_path / "x", {"w": torch.ones(1)}, metadata)
        assert trained_steps(tmp_path / "x", "digest") is None
        assert trained_by_another(tmp_path / "x", "digest") == ""
    with pytest.raises(ProgramError, match="none is damaged"):
        trained_steps(tmp_path / "none", "digest")


def test_weights_of_another_plans_run_are_told(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    assert trained_by_another(run.final, "digest") == ""
    told = f"{run.final} is of a run of another plan (digest)"
    assert trained_by_another(run.final, "another") == told
    run.save_final({"w": torch.ones(2)}, 7, ("fc.weight", "fc.bias"))
    assert trained_by_another(run.final, "another") == (
        f"{told}, which left the model's own classifier untrained (fc.weight, fc.bias)"
    )


def test_rows_that_a_run_cannot_have_written_are_dropped(tmp_path: Path) -> None:
    good = {"step": 0, "stage": 0, "losses": {"a": 1.0}}
    bad: list[Any] = [
        {**good, **change}
        for change in (
            {"step": "0"}, {"step": -1}, {"step": True}, {"step": None}, {"stage": -1},
            {"stage": "0"}, {"losses": 3}, {"losses": {"a": "1"}}, {"losses": {"a": 10**400}},
        )
    ]  # fmt: skip
    lines = [*map(json.dumps, [*bad, good]), "[" * 10**5, '{"step": 0, "losses": {"a": 1.0}}']
    run = finished(tmp_path / "run")
    run.resume_from = tmp_path
    (run.path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    assert run.begin(9, {}) == [good]
    assert (run.path / "metrics.jsonl").read_text() == json.dumps(good) + "\n"


@pytest.mark.parametrize("name", ["run.json", ".run.json.part", "metrics.jsonl", "step-00000009"])
def test_a_run_with_links_or_pipes_is_not_gone_on_with(tmp_path: Path, name: str) -> None:
    """Going on would write through the link, or wait for the pipe."""
    run = finished(tmp_path / "run")
    (tmp_path / "outside").mkdir()
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ProgramError, match=f"{name} is no file of a run"):
        RunDirectory(run.path, "digest", options(resume=True))
    (run.path / name).unlink()
    os.mkfifo(run.path / name)
    with pytest.raises(ProgramError, match=f"{name} is no file of a run"):
        RunDirectory(run.path, "digest", options(resume=True))
    assert list((tmp_path / "outside").iterdir()) == []
