"""Run: the run directory, what is printed, and that a resumed run is the uninterrupted one."""

import importlib
import json
import re
import shutil
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from run_files import QUICK, final, loss_rows, metrics, read_scalars, same_bits
from scpl_compile.errors import DataError, ProgramError, TrainingError
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime.data import Loader
from scpl_compile.runtime.evaluation import Evaluation, accuracy_text, evaluation_facts
from scpl_compile.runtime.launch import launch, versions
from scpl_compile.runtime.learning_rate import learning_rate
from scpl_compile.runtime.open_loader import open_loader
from scpl_compile.runtime.program import load_stages, read_plan
from scpl_compile.runtime.run import Run, _mean
from scpl_compile.runtime.run_lock import RunLock
from scpl_compile.runtime.scalars import tagged

Train = Callable[..., Any]

# ---------------------------------------------------------------------- what a run leaves


def test_a_run_prints_one_object_and_leaves_weights_and_metrics(
    train: Train, program: Path
) -> None:
    ran = train(program, *QUICK, "--epochs", 2, "--json")
    assert ran.code == 0
    assert len(ran.stdout.splitlines()) == 1
    assert ran.json.keys() == {
        "accuracy", "num_samples", "losses", "samples_per_second", "seconds", "steps", "schedule",
        "engine", "replicas", "devices", "threads_per_stage", "versions",
    }  # fmt: skip
    assert ran.json["steps"] == 8
    assert ran.json["schedule"] == "stream" and ran.json["devices"] == ["cpu", "cpu"]
    assert ran.json["versions"] == versions()
    run = program / "run"
    assert sorted(p.name for p in run.iterdir()) == [
        "data_facts.json", "final.safetensors", "metrics.jsonl", "result.json", "run.json",
    ]  # fmt: skip
    assert json.loads((run / "result.json").read_text()) == ran.json
    assert not (program / ".run.lock").exists()
    losses = loss_rows(run)
    assert losses.keys() == {(stage, step) for stage in (0, 1) for step in range(8)}
    for stage, terms in enumerate(ran.json["losses"]):  # the mean over the last 10 steps
        for name, mean in terms.items():
            assert mean == pytest.approx(sum(losses[stage, step][name] for step in range(8)) / 8)
    epochs = [row for row in metrics(run) if "epoch" in row]
    assert [(row["epoch"], row["step"]) for row in epochs] == [(0, 3), (1, 7)]
    assert all(0 <= row["validation_accuracy"] <= 1 for row in epochs)
    assert "% on the test split after 8 steps" in ran.error and str(run) in ran.error


def test_without_json_nothing_goes_to_stdout(train: Train, program: Path) -> None:
    ran = train(program, *QUICK, "--steps", 1)
    assert (ran.code, ran.stdout) == (0, "")
    assert "step 1/1: " in ran.stderr and "loss per stage -" not in ran.stderr


def test_the_weights_have_the_names_of_the_original_model(train: Train, program: Path) -> None:
    train(program, *QUICK, "--steps", 1)
    assert final(program / "run").keys() == load_file(program / "weights.safetensors").keys()


def test_steps_end_within_an_epoch_and_go_on_over_several(train: Train, program: Path) -> None:
    assert train(program, *QUICK, "--steps", 3, "--json").json["steps"] == 3
    assert train(program, *QUICK, "--steps", 9, "--json", "--force").json["steps"] == 9


@pytest.mark.parametrize("schedule", ["sequential", "in_step"])
def test_every_schedule_and_placement_gives_the_same_weights(
    schedule: str, train: Train, program: Path
) -> None:
    options = (*QUICK, "--steps", 5, "--augment", "basic")
    train(program, *options)
    train(program, *options, "--schedule", schedule, "--devices", "cpu,cpu", "--run-dir", "other")
    assert same_bits(program / "run", program / "other")


def test_another_seed_gives_other_weights(train: Train, program: Path) -> None:
    train(program, *QUICK, "--steps", 3)
    train(program, *QUICK, "--steps", 3, "--run-dir", "other", "--seed", 1)
    assert not same_bits(program / "run", program / "other")


def test_the_time_of_a_validation_does_not_count(
    train: Train, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = 0
    evaluate = Loader.evaluation

    def slow(self: Loader, split: str) -> Iterator[Any]:
        nonlocal hours
        hours += 1
        return evaluate(self, split)

    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + 3600 * hours)
    monkeypatch.setattr("scpl_compile.runtime.run.time", clock)
    monkeypatch.setattr(Loader, "evaluation", slow)
    ran = train(program, *QUICK, "--epochs", 3, "--json")
    assert hours == 4 and ran.json["seconds"] < 1800


def test_every_option_reaches_the_loader_and_the_trainer(program: Path) -> None:
    options = Namespace(
        data="random:64", augment="basic", batch_size=16, epochs=3, steps=0, optimizer="sgd",
        optimizer_options="momentum=0.9", weight_decay=0.1, warmup=2, clip_norm=1.0, accumulate=2,
        amp="bf16", channels_last=True, lr=0.5, lr_schedule="constant", schedule="in_step",
        devices="cpu,cpu", seed=7, tensorboard=False, trace=False,
        threads_per_stage=2, run_dir="run", save_every=0, log_every=1, resume=False, force=False,
        engine="threads", replicate="ddp", contrast="local", wire_dtype="",
    )  # fmt: skip
    given: dict[str, Any] = {}

    def build_trainer(**arguments: Any) -> Any:
        given.update(arguments)
        return load_stages(program, read_plan(program)).build_trainer(**arguments)

    with Run(program, options) as run:
        loader = run.open_data()
        run.start(build_trainer, loader)
        assert (loader.augment, loader.batch_size, loader.seed) == ("basic", 16, 7)
        assert next(run.epochs(loader)) == (0, 0)
    assert given == {
        "devices": ("cpu", "cpu"), "optimizer": "sgd", "lr": 0.5, "lr_schedule": "constant",
        "optimizer_options": "momentum=0.9", "weight_decay": 0.1, "warmup": 2, "clip_norm": 1.0,
        "accumulate": 2, "amp": "bf16", "channels_last": True, "wire_dtype": "",
        "total_steps": 12, "schedule": "in_step", "seed": 7, "threads_per_stage": 2,
        "trace_steps": 0,
        "starts": (),
    }  # fmt: skip


# ---------------------------------------------------------------------- metrics


def test_rows_have_the_learning_rate_of_their_step(train: Train, program: Path) -> None:
    schedule = "StepLR:step_size=3,gamma=0.5"
    train(program, *QUICK, "--steps", 8, "--lr", 0.1, "--lr-schedule", schedule, "--warmup", 2)
    rate = learning_rate(0.1, schedule, 8, warmup=2)
    rows = [row for row in metrics(program / "run") if "losses" in row]
    assert len(rows) == 16 and all(row["lr"] == rate(row["step"]) for row in rows)
    assert {row["lr"] for row in rows} == {0.05, 0.1}


def test_every_log_interval_has_a_row_of_the_run(train: Train, program: Path) -> None:
    """And every epoch, since the time of the validation is in no interval."""
    ran = train(program, "--data", "random:96", *QUICK[2:], "--epochs", 2, "--log-every", 4)
    assert ran.code == 0
    rows = [row for row in metrics(program / "run") if "samples_per_second" in row]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and {3, 5, 7, 11} >= set(steps) >= {5, 11}
    for row in rows:
        assert row["samples_per_second"] > 0
        assert all(len(row[name]) == 2 for name in ("waiting", "queue_fill"))
        assert all(0 <= share <= 1 for name in ("waiting", "queue_fill") for share in row[name])


def test_tensorboard_has_what_the_rows_have(train: Train, program: Path) -> None:
    options = (*QUICK, "--steps", 6, "--save-every", 3, "--tensorboard")
    assert train(program, *options).code == 0
    expected: dict[str, list[tuple[int, float]]] = {}
    for row in metrics(program / "run"):
        for tag, value in tagged(row).items():
            expected.setdefault(tag, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    found = read_scalars(program / "run" / "tensorboard")
    assert found == {tag: sorted(points, key=lambda p: p[0]) for tag, points in expected.items()}
    assert {"lr", "accuracy/validation", "waiting/stage 1"} < found.keys()


def test_without_tensorboard_the_earlier_run_stays(
    train: Train, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(program, *QUICK, "--steps", 1)

    def missing(name: str) -> None:
        raise ImportError("TensorBoard logging requires TensorBoard")

    monkeypatch.setattr("scpl_compile.runtime.scalars.import_module", missing)
    ran = train(program, *QUICK, "--steps", 1, "--tensorboard", "--force")
    assert ran.code == 1 and ran.error.endswith("; pip install tensorboard")
    assert (program / "run" / "final.safetensors").is_file()


def test_a_trace_has_the_last_steps_of_every_stage(train: Train, program: Path) -> None:
    assert train(program, *QUICK, "--steps", 5, "--trace").code == 0
    trace = json.loads((program / "run" / "trace.json").read_text())
    slices = {(row["tid"], row["name"]) for row in trace["traceEvents"] if row["ph"] == "X"}
    kinds = {0: ("RECV", "F", "SEND", "B", "U"), 1: ("RECV", "F", "B", "U")}
    every = {(k, f"{kind}{t}") for k in kinds for kind in kinds[k] for t in range(5)}
    assert slices == every
    assert len([row for row in trace["traceEvents"] if row["ph"] == "s"]) == 5


# ---------------------------------------------------------------------- the run directory


def test_an_earlier_run_is_refused_and_replaced_with_force(train: Train, program: Path) -> None:
    train(program, *QUICK, "--steps", 2, "--save-every", 1)
    before = (program / "run" / "metrics.jsonl").read_bytes()
    ran = train(program, *QUICK, "--steps", 3)
    assert ran.code == 1
    assert ran.error.endswith("run exists; add --resume, --force or another --run-dir")
    assert (program / "run" / "metrics.jsonl").read_bytes() == before
    assert train(program, *QUICK, "--steps", 3, "--force").code == 0
    assert loss_rows(program / "run").keys() == {(k, step) for k in (0, 1) for step in range(3)}
    assert checkpoint.latest(program / "run") is None


@pytest.mark.parametrize("run_dir", [".", "..", "mine"])
def test_force_never_removes_what_is_no_run(run_dir: str, train: Train, program: Path) -> None:
    (program / "mine").mkdir()
    (program / "mine" / "thesis.tex").write_text("all of it")
    ran = train(program, *QUICK, "--steps", 1, "--force", "--run-dir", run_dir)
    assert ran.code == 1 and ran.error.endswith("exists and is no run; choose another --run-dir")
    assert (program / "mine" / "thesis.tex").read_text() == "all of it"
    assert read_plan(program)


def test_force_removes_nothing_before_training_can_start(train: Train, program: Path) -> None:
    train(program, *QUICK, "--steps", 1)
    for wrong in (("--data", "nope"), ("--optimizer", "nope"), ("--devices", "cuda:7")):
        assert train(program, *QUICK, "--force", *wrong).code == 1
        assert (program / "run" / "final.safetensors").is_file()


@pytest.mark.parametrize("how", [(), ("--force",), ("--resume",)])
def test_a_run_that_another_process_is_at_is_left_alone(
    how: tuple[str, ...], train: Train, program: Path
) -> None:
    options = (*QUICK, "--steps", 2, "--save-every", 1)
    train(program, *options)
    before = {p: p.read_bytes() for p in program.rglob("*") if p.is_file()}
    lock = RunLock(program / "run")
    ran = train(program, *options, *how)
    assert ran.code == 1 and ran.stderr.count("\n") == 1
    assert ran.error.endswith(
        "run is in use by another process; wait for it, or choose another --run-dir"
    )
    assert train(program, *options, "--run-dir", "other").code == 0
    shutil.rmtree(program / "other")
    lock.release()
    after = {p: p.read_bytes() for p in program.rglob("*") if p.is_file()}
    assert {p for p in after if "__pycache__" not in p.parts} == before.keys()
    assert all(after[path] == content for path, content in before.items())


def test_a_run_holds_its_lock_to_the_end(
    train: Train, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell, found = Run._tell, []

    def telling(run: Run, result: Any) -> None:
        with pytest.raises(ProgramError, match="in use by another process"):
            RunLock(run.directory)
        found.append(result["steps"])
        tell(run, result)

    monkeypatch.setattr(Run, "_tell", telling)
    assert train(program, *QUICK, "--steps", 1).code == 0 and found == [1]
    assert train(program, *QUICK, "--data", "nope", "--force").code == 1
    RunLock(program / "run").release()


def test_an_empty_directory_is_no_obstacle(train: Train, program: Path) -> None:
    (program / "run").mkdir()
    assert train(program, *QUICK, "--steps", 1).code == 0


def test_a_run_directory_may_lie_elsewhere(train: Train, program: Path, tmp_path: Path) -> None:
    assert train(program, *QUICK, "--steps", 1, "--run-dir", tmp_path / "a" / "b").code == 0
    assert (tmp_path / "a" / "b" / "final.safetensors").is_file()


def test_a_full_disk_is_told_and_the_checkpoints_stay(
    train: Train, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *rest: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("scpl_compile.runtime.checkpoint.save_tensors", full)
    ran = train(program, *QUICK, "--steps", 2)
    assert ran.code == 1
    assert re.search(r"run cannot be written \(.*No space left.*\); make room, or", ran.error)
    assert "Traceback" not in ran.stderr
    assert not (program / "run" / "final.safetensors").exists()


def test_a_checkpoint_that_cannot_be_written_ends_the_run(
    train: Train, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*rest: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scpl_compile.runtime.checkpoint.save_stage", full)
    ran = train(program, *QUICK, "--steps", 6, "--save-every", 2)
    assert ran.code == 1
    assert "error: the checkpoint could not be written: " in ran.error
    assert "Traceback" not in ran.stderr
    assert checkpoint.latest(program / "run") is None


# ---------------------------------------------------------------------- data


def test_a_last_batch_of_one_sample_is_left_out_and_said(train: Train, program: Path) -> None:
    ran = train(program, "--data", "random:33", "--batch-size", 16, "--epochs", 2, "--json")
    assert ran.json["steps"] == 4
    assert ran.stderr.count("the last batch of every epoch has one sample and is left out") == 1
    ran = train(program, "--data", "random:34", "--batch-size", 16, "--force", "--json")
    assert ran.json["steps"] == 3 and "left out" not in ran.stderr


def test_the_loader_has_the_plans_inputs_and_says_what_it_does(
    compiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = open_loader(read_plan(compiled), "random:20", batch_size=6, seed=3)
    batch = loader.batch(0, 0)
    assert batch.inputs[0].shape == (6, 1, 8, 8) and batch.labels.max() < 10
    assert capsys.readouterr().err == ""
    with pytest.raises(DataError, match="there is no data set 'nope'"):
        open_loader(read_plan(compiled), "nope", batch_size=6)


# ---------------------------------------------------------------------- launch


def test_launch_turns_our_errors_into_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise ProgramError("plan.json is missing; compile again")

    with pytest.raises(SystemExit) as end:
        launch(fails)
    assert end.value.code == 1
    assert capsys.readouterr() == ("", "error: plan.json is missing; compile again\n")


def test_launch_shows_the_traceback_of_a_worker(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        try:
            raise ZeroDivisionError("in the user's forward")
        except ZeroDivisionError as error:
            raise TrainingError("stage 1 failed") from error

    with pytest.raises(SystemExit):
        launch(fails)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1] == "error: stage 1 failed"
    assert "ZeroDivisionError: in the user's forward" in lines


def test_launch_names_a_module_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        importlib.import_module("no_such_model.nets")

    with pytest.raises(SystemExit) as end:
        launch(fails)
    assert end.value.code == 1
    assert capsys.readouterr().err == (
        "error: there is no module 'no_such_model'; install it, or put its folder on PYTHONPATH, "
        "as when the program was compiled\n"
    )


def test_launch_leaves_other_errors_alone() -> None:
    with pytest.raises(ZeroDivisionError):
        launch(lambda: 1 / 0)  # type: ignore[arg-type,return-value]


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def warns() -> None:
        warnings.simplefilter("always")
        warnings.warn("mind the gap", stacklevel=1)

    shown = warnings.showwarning
    launch(warns)
    assert capsys.readouterr().err == "warning: mind the gap\n"
    assert warnings.showwarning is shown


def test_facts_of_an_evaluation_have_every_exit_where_there_are_several() -> None:
    one = Evaluation(num_samples=4, accuracies=(0.5,), losses=(1.0,))
    assert evaluation_facts(one) == {"accuracy": 0.5, "num_samples": 4}
    two = Evaluation(num_samples=4, accuracies=(0.25, 0.5), losses=(1.0, 2.0))
    assert evaluation_facts(two)["exit_accuracies"] == [0.25, 0.5]


def test_of_several_labels_the_exact_matches_are_told_too() -> None:
    one = Evaluation(num_samples=4, accuracies=(0.9,), losses=(1.0,), exact_matches=(0.25,))
    facts = evaluation_facts(one)
    assert facts == {"accuracy": 0.9, "exact_match": 0.25, "num_samples": 4}
    assert accuracy_text(facts) == "90.00 % of the labels (25.00 % exact matches)"
    assert accuracy_text({"accuracy": 0.5}) == "50.00 %"


def test_versions_name_what_a_result_depends_on() -> None:
    assert versions()["torch"] == str(torch.__version__)


def test_a_mean_is_of_the_losses_that_the_last_row_has() -> None:
    assert _mean([]) == {}
    assert _mean([{"foreign": 9.0}, {"a": 1.0}, {"a": 3.0, "b": 5.0}]) == {"a": 2.0, "b": 5.0}
