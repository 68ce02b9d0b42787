"""A run that goes on: bit for bit the uninterrupted one, without a hole in its metrics."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from run_files import QUICK, loss_rows, metrics, same_bits
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime.data import Loader
from scpl_compile.runtime.run import Run

Train = Callable[..., Any]

LONG = ("--data", "random:90", "--batch-size", 16, "--augment", "basic", "--steps", 15,
        "--save-every", 4)  # fmt: skip
"""6 batches per epoch, the last of 10; checkpoints within and at the end of an epoch."""

FATAL = """
import os, runpy, signal, sys, time
from pathlib import Path
from scpl_compile.runtime import Run

directory = Path(sys.argv[0]).parent
after_step = Run.after_step

def fatal(run, batch):
    after_step(run, batch)
    if run.trainer.num_steps == 10:
        while not (run.directory / "step-00000008" / "manifest.json").is_file():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

Run.after_step = fatal
sys.path.insert(0, str(directory))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_killed_run_that_is_resumed_ends_like_one_that_was_not(
    train: Train, program: Path, environment: dict[str, str]
) -> None:
    train(program, *LONG, "--run-dir", "whole")
    arguments = [str(program / "train.py"), *map(str, LONG), "--run-dir", "killed"]
    command = [sys.executable, "-c", f"import sys; del sys.argv[0]\n{FATAL}", *arguments]
    died = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    run = program / "killed"
    assert not (run / "final.safetensors").exists()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "sta')  # torn by the kill
    ran = train(program, *LONG, "--run-dir", "killed", "--resume")
    assert ran.code == 0
    assert f"resumed after step 8 from {run / 'step-00000008'}" in ran.stderr
    assert same_bits(program / "whole", run)
    whole, resumed = loss_rows(program / "whole"), loss_rows(run)
    assert {key for key in whole if key[1] >= 8} <= resumed.keys()
    assert all(whole[key] == losses for key, losses in resumed.items())


KILLED_AT_A_CHECKPOINT = """
import os, runpy, signal, sys, time
from pathlib import Path
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime.stage_step import StageStep

complete, forward = checkpoint.complete, StageStep.forward

def fatal(directory, facts, num_stages):
    complete(directory, facts, num_stages)
    if facts["step"] == 8:
        os.kill(os.getpid(), signal.SIGKILL)

def slow(stage, step):
    time.sleep(0.05 * stage.index)
    forward(stage, step)

checkpoint.complete, StageStep.forward = fatal, slow
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_killed_just_after_a_checkpoint_lacks_no_row(
    train: Train, program: Path, environment: dict[str, str]
) -> None:
    options = (*LONG, "--log-every", 100)
    arguments = [str(program / "train.py"), *map(str, options)]
    code = f"import sys; del sys.argv[0]\n{KILLED_AT_A_CHECKPOINT}"
    died = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, check=False
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert checkpoint.latest(program / "run") == program / "run" / "step-00000008"
    every = {(stage, step) for stage in (0, 1) for step in range(15)}
    assert {key for key in every if key[1] < 8} <= loss_rows(program / "run").keys()
    assert train(program, *options, "--resume").code == 0
    assert loss_rows(program / "run").keys() == every
    rows = [row for row in metrics(program / "run") if "epoch" in row]
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 5), (1, 11), (2, 14)]


def test_a_validation_that_the_kill_has_prevented_is_made_up_for(
    train: Train, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*QUICK, "--epochs", 2, "--save-every", 4)
    after_epoch = Run.after_epoch

    def dies(run: Run, epoch: int, loader: Loader) -> None:
        assert run.trainer is not None
        run.trainer.wait_saved()
        monkeypatch.undo()
        raise KeyboardInterrupt

    for last in (0, 1):
        monkeypatch.setattr(Run, "after_epoch", dies)
        assert train(program, *options, *(["--resume"] if last else [])).code == 130
    monkeypatch.setattr(Run, "after_epoch", after_epoch)
    assert train(program, *options, "--resume").code == 0
    rows = [row for row in metrics(program / "run") if "epoch" in row]
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 3), (1, 7)]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Presses Ctrl-C after a step, once the checkpoints before it are complete."""

    def at(last: int) -> None:
        after_step = Run.after_step

        def pressing(run: Run, batch: Any) -> None:
            after_step(run, batch)
            if run.trainer is not None and run.trainer.num_steps == last:
                run.trainer.wait_saved()
                monkeypatch.undo()
                raise KeyboardInterrupt

        monkeypatch.setattr(Run, "after_step", pressing)

    return at


@pytest.mark.parametrize(("optimizer", "step"), [("sgd", 4), ("adamw", 8), ("adagrad", 12)])
def test_going_on_from_any_checkpoint_gives_the_same_bits(
    optimizer: str, step: int, train: Train, program: Path, interrupt: Callable[[int], None]
) -> None:
    options = (*LONG, "--optimizer", optimizer, "--augment", "strong")
    train(program, *options, "--run-dir", "whole")
    interrupt(step + 2)
    ran = train(program, *options)
    assert ran.code == 130 and ran.error.startswith("interrupted; --resume goes on")
    assert checkpoint.latest(program / "run") == program / "run" / f"step-{step:08d}"
    ran = train(program, *options, "--resume", "--schedule", "sequential", "--json")
    assert ran.json["steps"] == 15
    assert same_bits(program / "whole", program / "run")


def test_going_on_between_two_updates_gives_the_same_bits(
    train: Train, program: Path, interrupt: Callable[[int], None]
) -> None:
    options = (
        *LONG, "--accumulate", 3, "--amp", "fp16", "--clip-norm", 0.5, "--channels-last",
        "--optimizer", "sgd", "--optimizer-options", "momentum=0.9", "--weight-decay", 0.01,
        "--lr-schedule", "OneCycleLR:max_lr=0.05", "--warmup", 3,
    )  # fmt: skip
    train(program, *options, "--run-dir", "whole")
    interrupt(10)
    assert train(program, *options).code == 130
    ran = train(program, *options, "--resume", "--json")
    assert ran.json["steps"] == 15 and "resumed after step 8" in ran.stderr
    assert same_bits(program / "whole", program / "run")


def test_a_checkpoint_without_manifest_does_not_exist(
    train: Train, program: Path, interrupt: Callable[[int], None]
) -> None:
    train(program, *LONG, "--run-dir", "whole")
    interrupt(14)
    train(program, *LONG)
    (program / "run" / "step-00000012" / "manifest.json").unlink()
    ran = train(program, *LONG, "--resume")
    assert "resumed after step 8 " in ran.stderr
    assert same_bits(program / "whole", program / "run")


def test_a_finished_run_that_is_resumed_ends_as_before(train: Train, program: Path) -> None:
    options = (*QUICK, "--steps", 4, "--save-every", 4)
    train(program, *options)
    shutil.copytree(program / "run", program / "before")
    before = json.loads((program / "run" / "result.json").read_text())
    (program / "run" / "final.safetensors").unlink()
    ran = train(program, *options, "--resume", "--json")
    assert ran.json["steps"] == 4
    assert same_bits(program / "before", program / "run")
    # Nothing was trained this time, so there is no rate; the rest is as it was.
    assert ran.json["samples_per_second"] is None and "samples/s;" not in ran.error
    odd = ("samples_per_second", "seconds")
    assert {**ran.json, **dict.fromkeys(odd)} == {**before, **dict.fromkeys(odd)}


@pytest.mark.parametrize("save_every", [0, 2])
def test_a_finished_run_that_is_resumed_tells_its_result_and_reads_no_data(
    save_every: int, train: Train, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*QUICK, "--steps", 4, "--save-every", save_every, "--json")
    first = train(program, *options)
    before = {path: path.stat().st_mtime_ns for path in (program / "run").iterdir()}
    monkeypatch.setattr(Loader, "evaluation", None)
    ran = train(program, *options, "--resume")
    assert ran.code == 0 and ran.json == first.json
    assert "run is finished; --force starts again" in ran.stderr
    assert ran.error == first.error  # the accuracy, the rate, and where the weights are
    assert train(program, *options[:-1], "--resume").stdout == ""
    assert {path: path.stat().st_mtime_ns for path in (program / "run").iterdir()} == before
    assert train(program, *options, "--resume", "--seed", 3).code == 1
    assert not (program / ".run.lock").exists()


def damage_stage(run: Path) -> None:
    """Flip a bit of one stage's state."""
    path = run / "step-00000004" / "stage-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def rewrite(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """An edit of a JSON file of the run."""

    def edit(run: Path) -> None:
        facts = json.loads((run / name).read_text())
        change(facts)
        (run / name).write_text(json.dumps(facts))

    return edit


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (damage_stage, (), r"stage-1\.safetensors is damaged \(sha256\); remove .*step-00000004"),
        (lambda run: (run / "run.json").write_text("{"), (), r"run\.json is damaged .*--force"),
        (lambda run: (run / "run.json").write_text("[]"), (), r"run\.json is damaged .*--force"),
        (lambda run: (run / "run.json").unlink(), (), r"run\.json is damaged .*--force"),
        (
            rewrite("run.json", lambda facts: facts.update(plan="0" * 64)),
            (),
            r"is a run of another plan \(0{12}, this one is \w{12}\); resume with the program",
        ),
        (
            rewrite("step-00000004/manifest.json", lambda facts: facts.update(plan="0" * 64)),
            (),
            r"step-00000004 belongs to another plan",
        ),
        (lambda run: None, ("--lr", "0.5"), r"was begun with --lr 0\.001, not 0\.5; resume with"),
        (lambda run: None, ("--amp", "bf16"), r"was begun with --amp none, not bf16; resume with"),
        (lambda run: None, ("--accumulate", "2"), r"begun with --accumulate 1, not 2; resume with"),
        (lambda run: None, ("--seed", "2"), r"was begun with --seed 0, not 2; resume with"),
        (lambda run: None, ("--augment", "basic"), r"was begun with --augment none, not basic"),
        (lambda run: None, ("--threads-per-stage", "3"), r"begun with --threads-per-stage \d, not"),
    ],
)
def test_resume_is_refused_where_it_could_not_be_exact(
    damage: Callable[[Path], None],
    options: tuple[str, ...],
    message: str,
    train: Train,
    program: Path,
) -> None:
    assert train(program, *QUICK, "--steps", 4, "--save-every", 4).code == 0
    before = (program / "run" / "final.safetensors").read_bytes()
    (program / "run" / "result.json").unlink()  # killed before its end
    damage(program / "run")
    ran = train(program, *QUICK, "--steps", 4, "--save-every", 4, "--resume", *options)
    assert ran.code == 1
    assert re.search(message, ran.error), ran.error
    assert (program / "run" / "final.safetensors").read_bytes() == before


def test_resume_without_a_checkpoint_says_how_to_get_one(train: Train, program: Path) -> None:
    for _ in range(2):
        ran = train(program, *QUICK, "--resume")
        assert ran.code == 1 and "no complete checkpoint to resume from" in ran.error
        assert "--save-every" in ran.error
        train(program, *QUICK, "--steps", 1)
        (program / "run" / "result.json").unlink(missing_ok=True)  # killed before its end
