"""The calls of a trainer on two ranks, beside the same calls in one process.

One pair of processes makes all of them, one trainer after another among the same ranks.
"""

import pickle
import re
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from processes import start, wait_all
from scpl_compile import compile_model
from scpl_compile.errors import DataError, MethodError, ProgramError, ScplError
from scpl_compile.inputs import example_inputs
from scpl_compile.runtime import checkpoint, saver
from scpl_compile.runtime.program import load_stages, read_plan
from scpl_compile.runtime.ranks import Ranks, join
from scpl_compile.runtime.trainer import Trainer
from stage_nets import differences, outcome

pytestmark = pytest.mark.timeout(120)

NET = '''
from torch import nn


def build_model():
    """(B, 12) to (B, 4): batch norm, dropout, a weight under two names."""
    net = nn.Sequential(
        nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 12),
        nn.ReLU(), nn.Linear(12, 12), nn.Linear(12, 4),
    )
    net[6].weight = net[4].weight
    return net
'''
SPLITS = {"tied": ["3"], "early_exit": ["3"]}
SIZES = (6, 6, 4, 6, 6, 6, 4, 6, 6, 6, 6, 6)
MIDDLE = 6

# ---------------------------------------------------------------------- what is done in all of them


def make(home: Path, name: str, **options: Any) -> Trainer:
    directory = home / name
    stages = load_stages(directory, read_plan(directory))
    trainer: Trainer = stages.build_trainer(**{"lr": 0.01, **options})
    return trainer


def batch(home: Path, step: int, size: int = 6) -> tuple[tuple[Tensor, ...], Tensor]:
    inputs = example_inputs(read_plan(home / "tied").inputs, size, seed=step)
    return tuple(inputs), torch.arange(size) % 4


def train(trainer: Trainer, home: Path, first: int = 0, end: int = len(SIZES)) -> None:
    for step in range(first, end):
        trainer.step(*batch(home, step, SIZES[step]))


def inference(home: Path, name: str, **where: Any) -> dict[str, object]:
    """predict, evaluate and state_dict in the middle of the training, and what comes after."""
    with make(home, name, **where) as trainer:
        train(trainer, home, end=MIDDLE)
        logits = trainer.predict(batch(home, 50)[0])
        kept = [value.clone() for value in logits]
        evaluation = trainer.evaluate([batch(home, 60, 5), batch(home, 61, 6), batch(home, 62, 1)])
        other = trainer.predict(batch(home, 51, 9)[0])
        is_kept = all(torch.equal(a, b) for a, b in zip(logits, kept, strict=True))
        state = trainer.state_dict()
        train(trainer, home, first=MIDDLE)
        return {
            "logits": [*logits, *other], "evaluation": evaluation, "state": state,
            "is_kept": is_kept, "after": outcome(trainer),
        }  # fmt: skip


def untouched_losses(home: Path, **where: Any) -> None:
    """A trainer of whose losses, or end, nobody asks."""
    with make(home, "tied", schedule="in_step", **where) as trainer:
        train(trainer, home, end=3)


def save_often(home: Path, run: Path, **where: Any) -> dict[str, object]:
    """A checkpoint after every step."""
    with make(home, "tied", **where) as trainer:
        for step in range(MIDDLE):
            train(trainer, home, step, step + 1)
            trainer.save(run)
        trainer.wait_saved()
        return outcome(trainer)


def resume(home: Path, directory: Path, schedule: str = "stream", **where: Any) -> Any:
    with make(home, "tied", schedule=schedule, **where) as trainer:
        train(trainer, home, end=4)  # of another past
        trainer.load(directory)
        train(trainer, home, first=MIDDLE)
        return outcome(trainer)


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except ScplError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


# ---------------------------------------------------------------------- on the ranks


def slow_writer(rank: int) -> None:
    """Rank 1 writes so slowly that the next checkpoint is asked for meanwhile."""
    save_stage = checkpoint.save_stage

    def slow(*arguments: Any) -> None:
        time.sleep(0.15 * rank)
        save_stage(*arguments)

    saver.checkpoint.save_stage = slow


def work(home: Path) -> None:
    warnings.simplefilter("error")
    ranks = join((0, 1), ["cpu"], read_plan(home / "tied").digest)
    found: dict[str, Any] = {}
    found |= {name: inference(home, name, ranks=ranks) for name in SPLITS}
    untouched_losses(home, ranks=ranks)
    slow_writer(ranks.rank)
    found["saved"] = save_often(home, home / "by_ranks", ranks=ranks)
    found["saved again"] = save_often(home, home / "again", ranks=ranks)
    for schedule in ("stream", "in_step", "sequential"):
        found[f"resumed {schedule}"] = resume(home, home / "by_threads", schedule, ranks=ranks)
    found["moved"] = inference(home, "tied", ranks=ranks, weights=home / "moved.safetensors")
    found["refused"] = refusals(home, ranks)
    ranks.leave()
    (home / f"found{ranks.rank}").write_bytes(pickle.dumps(found))


def refusals(home: Path, ranks: Ranks) -> list[str]:
    made = partial(make, home, "tied", ranks=ranks)
    told = [
        refused(partial(made, schedule="gpipe")),
        refused(partial(made, contrast="far")),
        refused(partial(made, weights=home / "foreign.safetensors")),
        refused(partial(made, weights=home / "absent.safetensors")),
    ]
    with made() as trainer:
        told.append(refused(lambda: trainer.evaluate([])))
        told.append(refused(lambda: trainer.step(torch.zeros(4, 12), torch.zeros(3).long())))
        told.append(refused(lambda: trainer.load(home / "nowhere")))
    return told


# ---------------------------------------------------------------------- beside one process


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs, a checkpoint of one process, and what two ranks have found."""
    home = tmp_path_factory.mktemp("rank_trainer")
    (home / "net.py").write_text(NET)
    for name, split in SPLITS.items():
        method = "early_exit" if name == "early_exit" else "scpl"
        compile_model(
            f"{home}/net.py:build_model", "12", out=home / name, split_at=split, method=method,
            num_classes=4, batch_size=6, threads_per_stage=1,
        )  # fmt: skip
    with make(home, "tied") as trainer:
        train(trainer, home, end=MIDDLE)
        trainer.save(home / "by_threads_run")
        trainer.wait_saved()
        checkpoint.save_tensors(home / "moved.safetensors", trainer.state_dict(), {})
    latest = checkpoint.latest(home / "by_threads_run")
    assert latest is not None
    latest.rename(home / "by_threads")
    checkpoint.save_tensors(home / "foreign.safetensors", {"other": torch.zeros(1)}, {})
    ended = wait_all(start(work, [(home,)] * 2, home / "logs"))
    assert [one.code for one in ended] == [0, 0], ended
    return home


@pytest.fixture(scope="module")
def found(home: Path) -> list[dict[str, Any]]:
    return [pickle.loads((home / f"found{rank}").read_bytes()) for rank in range(2)]


def together(outcomes: list[dict[str, object]]) -> dict[str, object]:
    """Of all ranks; losses are rank 0's."""
    merged: dict[str, object] = {}
    for one in reversed(outcomes):
        merged |= one
    return merged


def check_inference(found: list[dict[str, Any]], name: str, expected: dict[str, Any]) -> None:
    for rank, one in enumerate(found):
        assert one[name]["evaluation"] == expected["evaluation"]
        assert one[name]["is_kept"]
        pairs = zip(one[name]["logits"], expected["logits"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        state, whole = one[name]["state"], expected["state"]
        assert state.keys() == whole.keys() if rank == 0 else state.keys() < whole.keys()
        assert all(torch.equal(value, whole[key]) for key, value in state.items())
    after = together([one[name]["after"] for one in found])
    assert differences(after, expected["after"]) == []


@pytest.mark.parametrize("name", SPLITS)
def test_inference_between_steps_is_that_of_one_process(
    name: str, home: Path, found: list[dict[str, Any]]
) -> None:
    """With a tied weight; with two exits."""
    check_inference(found, name, inference(home, name))


def test_every_stage_names_its_own_tensors(home: Path, found: list[dict[str, Any]]) -> None:
    plan = read_plan(home / "tied")
    own = found[1]["tied"]["state"].keys()
    assert own == {*plan.stages[1].parameters, *plan.stages[1].buffers}
    assert {"4.weight", "6.weight"} <= found[0]["tied"]["state"].keys()


def test_training_goes_on_from_given_weights(home: Path, found: list[dict[str, Any]]) -> None:
    expected = inference(home, "tied", weights=home / "moved.safetensors")
    check_inference(found, "moved", expected)


def test_checkpoints_are_whole_however_slowly_a_rank_writes(
    home: Path, found: list[dict[str, Any]]
) -> None:
    """One after every step, which is asked for while the one before is being written."""
    for run, name in (("by_ranks", "saved"), ("again", "saved again")):
        steps = sorted(path.name for path in (home / run).iterdir())
        assert steps == ["step-00000005", "step-00000006"]
        for step in steps:
            assert checkpoint.read_manifest(home / run / step, 2)["step"] == int(step[-1])
        expected = save_often(home, home / f"{run}_by_threads")
        assert differences(together([one[name] for one in found]), expected) == []
        for stage in range(2):
            file = f"{steps[-1]}/stage-{stage}.safetensors"
            expected_file = home / f"{run}_by_threads" / file
            assert (home / run / file).read_bytes() == expected_file.read_bytes()


@pytest.mark.parametrize("schedule", ["stream", "in_step", "sequential"])
def test_ranks_go_on_from_a_checkpoint_of_one_process(
    schedule: str, home: Path, found: list[dict[str, Any]]
) -> None:
    expected = resume(home, home / "by_threads")
    after = together([one[f"resumed {schedule}"] for one in found])
    assert differences(after, expected) == []


def test_one_process_goes_on_from_a_checkpoint_of_ranks(home: Path, found: object) -> None:
    found = resume(home, home / "by_ranks" / "step-00000006")
    assert differences(found, resume(home, home / "by_threads")) == []


def test_what_cannot_be_is_refused_on_every_rank(found: list[dict[str, Any]]) -> None:
    expected = [
        f"{MethodError.__name__}: schedule 'gpipe' does not go with method 'scpl'",
        f"{MethodError.__name__}: contrast 'far' is not one of local, global",
        f"{ProgramError.__name__}: .*foreign.safetensors does not fit the model: only",
        f"{ProgramError.__name__}: .*absent.safetensors is missing",
        f"{DataError.__name__}: there is no sample to evaluate on",
        f"{DataError.__name__}: 4 samples have 3 labels",
        f"{ProgramError.__name__}: .*manifest.json is damaged",
    ]
    for one in found:
        for told, message in zip(one["refused"], expected, strict=True):
            assert re.match(message, told), told
