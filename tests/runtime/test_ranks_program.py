"""The emitted program on ranks leaves what `python train.py` leaves."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from processes import Ended, train_ranks
from run_files import QUICK, final, loss_rows, metrics, same_bits
from scpl_compile import compile_model

pytestmark = pytest.mark.timeout(120)

Train = Callable[..., Any]
LONG = (*QUICK, "--epochs", 3)  # 12 steps


def done(ended: list[Ended]) -> list[Ended]:
    """All ranks have ended well, and only rank 0 has spoken."""
    assert [one.code for one in ended] == [0] * len(ended), ended
    assert all(not one.stdout and not one.stderr for one in ended[1:]), ended
    return ended


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def check_same_run(run: Path, other: Path) -> None:
    """Weights, every step's losses, validation and result; not the times."""
    assert same_bits(run, other)
    assert loss_rows(run) == loss_rows(other)
    epochs = [[row for row in metrics(one) if "epoch" in row] for one in (run, other)]
    assert epochs[0] == epochs[1]
    one, expected = result(run), result(other)
    assert one.keys() == expected.keys()
    own = {"engine", "seconds", "samples_per_second"}
    assert {k: v for k, v in one.items() if k not in own} == {
        k: v for k, v in expected.items() if k not in own
    }
    assert (one["engine"], expected["engine"]) == ("ranks", "threads")


def test_under_torchrun_it_is_the_run_of_one_process(
    program: Path, train: Train, environment: dict[str, str]
) -> None:
    """The launcher itself, with a checkpoint after every second step and losses at every one."""
    options = [*map(str, LONG), "--augment", "strong", "--save-every", "2", "--log-every", "1"]
    assert train(program, *options, "--run-dir", "threads").code == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ran = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(program / "train.py"), *options, "--json"],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert [json.loads(line) for line in ran.stdout.splitlines()] == [result(program / "run")]
    assert ran.stderr.count("on the test split after 12 steps") == 1
    check_same_run(program / "run", program / "threads")
    names = [sorted(p.name for p in (program / run).iterdir()) for run in ("run", "threads")]
    assert names[0] == names[1] and "step-00000012" in names[0]
    for path in (program / "threads" / "step-00000012").glob("*.safetensors"):
        assert path.read_bytes() == (program / "run" / "step-00000012" / path.name).read_bytes()


@pytest.mark.parametrize("begun_by", ["threads", "ranks"])
def test_either_engine_resumes_what_the_other_began(
    begun_by: str, program: Path, train: Train
) -> None:
    """Bit for bit, without a step lost or doubled in metrics.jsonl."""
    whole = (*LONG, "--save-every", 3, "--lr-schedule", "constant")
    assert train(program, *whole, "--run-dir", "whole").code == 0
    run = program / "run"
    if begun_by == "threads":
        assert train(program, *whole).code == 0
    else:
        done(train_ranks(program, *whole))
    for name in ("result.json", "final.safetensors"):  # as if killed in the last epoch
        (run / name).unlink()
    for path in (run / "step-00000012").iterdir():
        path.unlink()
    (run / "step-00000012").rmdir()
    if begun_by == "threads":
        ended = done(train_ranks(program, *whole, "--resume"))
        assert "resumed after step 9 from" in ended[0].stderr
        check_same_run(run, program / "whole")
    else:
        assert train(program, *whole, "--resume").code == 0
    assert same_bits(run, program / "whole")
    assert loss_rows(run) == loss_rows(program / "whole")
    assert result(run)["steps"] == 12


@pytest.mark.parametrize(("begun_by", "resumed_by"), [(1, 4), (2, 4), (4, 1), (4, 2)])
@pytest.mark.parametrize("last", [9, 12])
def test_a_run_goes_on_on_another_number_of_replicas(
    last: int, begun_by: int, resumed_by: int, program: Path, train: Train
) -> None:
    """From the same state: where nothing is left to do, that of the run which began."""

    def go(count: int, *options: object) -> None:
        given = (*LONG, "--save-every", 3, *options)
        if count == 1:
            assert train(program, *given).code == 0
        else:
            done(train_ranks(program, *given, num_ranks=count))

    go(begun_by)
    run = program / "run"
    ended_with = final(run)
    (run / "result.json").unlink()
    (run / "final.safetensors").unlink()
    for step in range(last + 3, 13, 3):
        shutil.rmtree(run / f"step-{step:08}")
    go(resumed_by, "--resume")
    assert result(run)["steps"] == 12
    assert loss_rows(run).keys() == {(stage, step) for stage in (0, 1) for step in range(12)}
    is_same = all(torch.equal(final(run)[name], value) for name, value in ended_with.items())
    assert is_same == (last == 12)


def test_a_finished_run_has_nothing_to_resume(program: Path) -> None:
    done(train_ranks(program, *QUICK))
    before = (program / "run" / "result.json").read_bytes()
    first = done(train_ranks(program, *QUICK, "--resume", "--json"))[0]
    assert "is finished; --force starts again" in first.stderr
    assert [json.loads(line) for line in first.stdout.splitlines()] == [result(program / "run")]
    assert (program / "run" / "result.json").read_bytes() == before
    assert not (program / ".run.lock").exists()


def test_replicas_take_their_shares(program: Path) -> None:
    """2 replicas of 2 stages; what a last batch has beyond equal shares is left out."""
    options = ("--data", "random:64", "--batch-size", 20, "--epochs", 2, "--contrast", "global")
    ended = done(train_ranks(program, *options, "--save-every", 2, num_ranks=4))
    assert "weights in" in ended[0].stderr
    found = result(program / "run")
    assert found["replicas"] == 2 and found["engine"] == "ranks"
    assert loss_rows(program / "run").keys() == {
        (stage, step) for stage in range(2) for step in range(found["steps"])
    }
    assert final(program / "run").keys() == load_file(program / "weights.safetensors").keys()
    done(train_ranks(program, *options, "--save-every", 2, "--resume", num_ranks=4))


SKIPPING = """
import torch
from torch import nn


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        if self.training and torch.rand(()) < 0.5:
            return x
        return x + self.linear(x)


def build_model():
    layers = [nn.Flatten(), nn.Linear(64, 32), Skipping(), nn.ReLU(), Skipping(), nn.Linear(32, 5)]
    model = nn.Sequential(*layers)
    model[2].unused = nn.Linear(32, 32)
    return model
"""


@pytest.mark.parametrize(
    ("method", "schedule"), [("scpl", "stream"), ("bp", "gpipe"), ("bp", "ddp")]
)
def test_replicas_may_leave_parameters_without_a_gradient(
    method: str, schedule: str, tmp_path: Path
) -> None:
    """One that nobody uses, and those of a module that each replica skips in steps of its own."""
    (tmp_path / "net.py").write_text(SKIPPING)
    compile_model(
        f"{tmp_path}/net.py:build_model", "1x8x8", num_stages=2, method=method, out=tmp_path / "out"
    )
    more = ("--microbatches", 2) if schedule == "gpipe" else ()
    ended = train_ranks(
        tmp_path / "out", *LONG, "--schedule", schedule, "--batch-size", 8, *more, num_ranks=4
    )
    assert [one.code for one in ended] == [0] * 4, ended
    state, first = final(tmp_path / "out" / "run"), load_file(tmp_path / "out/weights.safetensors")
    still = {name for name in first if state[name].equal(first[name])}
    assert still == {"2.unused.weight", "2.unused.bias"}


@pytest.mark.parametrize("schedule", ["bp", "gpipe", "1f1b", "ddp"])
def test_the_baselines_train(schedule: str, backpropagation: Path) -> None:
    options = [*LONG, "--schedule", schedule, "--run-dir", schedule, "--save-every", 5]
    options += ["--microbatches", 2] if schedule in ("gpipe", "1f1b") else []
    ended = train_ranks(backpropagation, *options)
    assert [one.code for one in ended] == [0, 0], ended
    told = ended[0].stderr + ended[1].stderr
    assert ("micro-batches of 8 samples change BatchNorm's statistics" in told) == (
        schedule in ("gpipe", "1f1b")
    )
    run = backpropagation / schedule
    found, first = result(run), load_file(backpropagation / "weights.safetensors")
    assert found["schedule"] == schedule and found["steps"] == 12
    assert found["replicas"] == (2 if schedule == "ddp" else 1)
    state = final(run)
    assert state.keys() == first.keys()
    assert all(not state[name].equal(first[name]) for name in first)
    rows = loss_rows(run)
    assert {step for stage, step in rows if stage == 1} == set(range(12))
    assert all(rows[1, step]["classifier"] > 0 for step in range(12))


def test_naive_backpropagation_is_that_of_one_process(backpropagation: Path, train: Train) -> None:
    assert train(backpropagation, *LONG, "--run-dir", "one").code == 0
    done(train_ranks(backpropagation, *LONG, "--run-dir", "two"))
    check_same_run(backpropagation / "two", backpropagation / "one")


@pytest.fixture(scope="module")
def several(net_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Programs of task multi-label in two stages, by their method."""
    home = tmp_path_factory.mktemp("several")
    for method in ("early_exit", "bp"):
        compile_model(
            f"{net_file}:build_model", "1x8x8", num_stages=2, method=method, task="multi-label",
            out=home / method,
        )  # fmt: skip
    return {method: home / method for method in ("early_exit", "bp")}


def test_with_several_labels_per_sample_it_is_the_run_of_one_process(
    several: dict[str, Path], train: Train
) -> None:
    program = several["early_exit"]
    options = (*LONG, "--augment", "strong")
    assert train(program, *options, "--run-dir", "threads").code == 0
    done(train_ranks(program, *options))
    check_same_run(program / "run", program / "threads")
    assert 0 <= result(program / "run")["exact_match"] < result(program / "run")["accuracy"]


def test_several_labels_go_in_micro_batches(several: dict[str, Path]) -> None:
    options = (*QUICK, "--schedule", "gpipe", "--microbatches", 2)
    ended = train_ranks(several["bp"], *options)
    assert [one.code for one in ended] == [0, 0], ended
    assert 0 < result(several["bp"] / "run")["losses"][1]["classifier"] < 1
