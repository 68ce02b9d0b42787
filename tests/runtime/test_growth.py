"""Stages that join later: until then they rest, and nothing else changes."""

import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.exactness.main import differences, run
from own_files import EXITS, layers, own_file
from processes import start, train_ranks, wait_all
from run_files import QUICK, loss_rows, same_bits
from scpl_compile import compile_model
from scpl_compile.errors import MethodError
from scpl_compile.runtime.growth import can_grow, checked_starts, first_steps
from scpl_compile.runtime.program import load_stages, read_plan
from scpl_compile.runtime.ranks import join
from small_nets import compiled
from stage_nets import outcome

pytestmark = pytest.mark.timeout(120)

STARTS = (0, 3, 3, 7)
NUM_STEPS = 12
NETS = ["small_net", "transformer", "unet"]


def batches_of(name: str, num_stages: int) -> list[Any]:
    found = compiled(name, num_stages, method="dascpl").batches
    return (3 * found)[:NUM_STEPS]


# ---------------------------------------------------------------------- what rests, what trains


@pytest.mark.parametrize("name", NETS)
def test_the_schedules_leave_the_same_bits(name: str) -> None:
    program, batches = compiled(name, 4, method="dascpl").program, batches_of(name, 4)
    expected = run(program, batches, "sequential", starts=STARTS)
    for schedule in ("stream", "in_step"):
        found = run(program, batches, schedule, starts=STARTS)
        assert differences(found, expected) == []
    for stage, rows in enumerate(expected.losses):
        assert [step for step, _ in rows] == list(range(STARTS[stage], NUM_STEPS))
    sent = {e.action.step for e in expected.events if str(e.action).startswith("0SEND")}
    assert sent == set(range(STARTS[1], NUM_STEPS))
    assert differences(run(program, batches, "sequential"), expected) != []


def test_a_stage_trains_as_if_nobody_came_behind_it() -> None:
    """The first stage is that of a run in which all take part; the last one has seen no step."""
    program, batches = compiled("small_net", 4, method="dascpl").program, batches_of("small_net", 4)
    grown = run(program, batches[:7], "stream", starts=STARTS)
    whole = run(program, batches[:7], "stream")
    untouched = run(program, [], "stream")
    assert grown.states[0] == whole.states[0]
    assert grown.states[1] != whole.states[1]  # it missed three steps
    assert grown.states[3] == untouched.states[3] != whole.states[3]


def test_a_later_stage_begins_on_what_the_ones_before_have_learned() -> None:
    """From its first step on it is a run of its own over their outputs."""
    found = compiled("unet", 2, method="dascpl")
    batches = batches_of("unet", 2)
    with found.program.trainer(seed=0, starts=(0, 4)) as grown:
        for inputs, labels in batches[:4]:
            grown.step(inputs, labels)
        grown.drain()
        before = {k: v.clone() for k, v in grown._stages[1].state()[0].items()}
        fresh = found.program.trainer(seed=0)
        initial = fresh._stages[1].state()[0]
        fresh.close()
        assert before.keys() == initial.keys()
        assert all(torch.equal(before[name], initial[name]) for name in before)
        grown.step(*batches[4])
        grown.drain()
        after = grown._stages[1].state()[0]
        assert any(not torch.equal(after[n], before[n]) for n in before if "module." in n)


def test_inference_ends_at_the_last_stage_that_takes_part() -> None:
    program, batches = compiled("unet", 4, method="dascpl").program, batches_of("unet", 4)
    inputs, labels = batches[0]
    seen = []
    with program.trainer(seed=0, starts=STARTS) as trainer:
        for batch in batches[:9]:
            trainer.step(*batch)
            logits = trainer.predict(inputs)
            found = trainer.evaluate([(inputs, labels)])
            assert len(found.accuracies) == len(logits) == trainer.num_active
            is_right = logits[-1].argmax(-1) == labels
            assert found.accuracy == pytest.approx(float(is_right.double().mean()))
            seen.append(len(logits))
            if len(logits) < 4:
                with pytest.raises(MethodError, match="when all 4 stages take part; [13] do so"):
                    trainer.predict_early(inputs, "agreement:2")
        trainer.predict_early(inputs, "agreement:2")
    assert seen == [1, 1, 1, 3, 3, 3, 3, 4, 4]


@pytest.mark.parametrize("step", [2, 3, 8])
def test_a_resumed_run_is_the_uninterrupted_one(step: int, tmp_path: Path) -> None:
    program, batches = compiled("small_net", 4, method="dascpl").program, batches_of("small_net", 4)
    expected = run(program, batches, "stream", starts=STARTS)
    with program.trainer(seed=0, starts=STARTS) as trainer:
        for batch in batches[:step]:
            trainer.step(*batch)
        trainer.save(tmp_path)
        trainer.wait_saved()
    (folder,) = tmp_path.iterdir()

    def resumed(**options: Any) -> Any:
        trainer = program.trainer(**options)
        trainer.load(folder)
        return trainer

    found = run(program, batches[step:], "stream", trainer=resumed, starts=STARTS, seed=0)
    assert found.states == expected.states


# ---------------------------------------------------------------------- ranks


def work(directory: Path, results: Path) -> None:
    found: dict[str, Any] = {}
    for schedule in ("stream", "in_step", "sequential"):
        ranks = join((0, 1, 2), ["cpu"], read_plan(directory).digest, {"schedule": schedule})
        found[schedule] = steps(directory, schedule, ranks=ranks)
        ranks.leave()
    (results / str(ranks.rank)).write_bytes(pickle.dumps(found))


def steps(directory: Path, schedule: str, **options: Any) -> Any:
    """All that the stages own, and what inference gave after some of the steps."""
    told = []
    stages = load_stages(directory, read_plan(directory))
    with stages.build_trainer(schedule=schedule, starts=(0, 2, 5), **options) as trainer:
        for step in range(8):
            draws = torch.Generator().manual_seed(step)
            batch = (torch.randn(6, 3, 16, 16, generator=draws), torch.arange(6) % 4)
            trainer.step(*batch)
            if step in (0, 1, 3, 6):
                trainer.drain()
                evaluation = trainer.evaluate([batch])
                told.append(
                    (evaluation.accuracies, [v.tolist() for v in trainer.predict(batch[0])])
                )
        return outcome(trainer), told


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unet") / "program"
    source = Path(__file__).parents[1] / "small_nets.py"
    compile_model(
        f"{source}:UNet", "3x16x16", out=out, num_stages=3, method="dascpl", batch_size=6,
        threads_per_stage=1,
    )  # fmt: skip
    return out


def test_ranks_agree_with_one_process(unet: Path, tmp_path: Path) -> None:
    ended = wait_all(start(work, [(unet, tmp_path)] * 3, tmp_path / "logs"))
    assert [one.code for one in ended] == [0] * 3, ended
    expected, told = steps(unet, "sequential")
    assert [len(accuracies) for accuracies, _ in told] == [1, 1, 2, 3]
    for rank in range(3):
        for found, seen in pickle.loads((tmp_path / str(rank)).read_bytes()).values():
            assert seen == told
            own = {name: value for name, value in found.items() if name.startswith(f"{rank} ")}
            own = {name: value for name, value in own.items() if not name.endswith("losses")}
            assert own
            for name, value in own.items():
                same = torch.equal if isinstance(value, Tensor) else (lambda a, b: a == b)
                assert same(value, expected[name]), name  # type: ignore[arg-type]


def paced(directory: Path, results: Path) -> None:
    """When each of 6 steps began and returned here; the first stage's batches come slowly."""
    ranks = join((0, 1, 2), ["cpu"], read_plan(directory).digest, {})
    times = []
    batch = (torch.randn(6, 3, 16, 16), torch.arange(6) % 4)
    with load_stages(directory, read_plan(directory)).build_trainer(
        starts=(0, 4, 5), ranks=ranks
    ) as trainer:
        for _ in range(6):
            time.sleep(0.15 if ranks.rank == 0 else 0)
            start = time.monotonic()
            trainer.step(*batch)
            times.append((start, time.monotonic()))
        trainer.drain()
    (results / str(ranks.rank)).write_bytes(pickle.dumps(times))
    ranks.leave()


def test_a_rank_that_rests_goes_no_faster_than_the_first(unet: Path, tmp_path: Path) -> None:
    """Else it would wait in a barrier for the length of an epoch, write the checkpoints of all of
    it, and hear of SIGTERM in a step that the others do not reach.
    """
    ended = wait_all(start(paced, [(unet, tmp_path)] * 3, tmp_path / "logs"))
    assert [one.code for one in ended] == [0] * 3, ended
    first, *others = (pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in range(3))
    for times in others:
        for step in range(1, 4):
            assert times[step][1] > first[step - 1][0]


def lost(directory: Path, results: Path) -> None:
    """Steps that nobody drains."""
    ranks = join((0, 1, 2), ["cpu"], read_plan(directory).digest, {})
    batch = (torch.randn(6, 3, 16, 16), torch.arange(6) % 4)
    with load_stages(directory, read_plan(directory)).build_trainer(
        starts=(0, 0, 5), ranks=ranks
    ) as trainer:
        for _ in range(3):
            trainer.step(*batch)
    ranks.leave()
    (results / str(ranks.rank)).touch()


def test_steps_that_are_lost_leave_no_rank_that_waits(unet: Path, tmp_path: Path) -> None:
    """Stage 1 still has the last batch before it, and stage 2 rests behind it."""
    ended = wait_all(start(lost, [(unet, tmp_path)] * 3, tmp_path / "logs"))
    assert [one.code for one in ended] == [0] * 3, ended
    assert all((tmp_path / str(rank)).exists() for rank in range(3))


# ---------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def program(net_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grow") / "net"
    compile_model(f"{net_file}:build_model", "1x8x8", num_stages=2, method="dascpl", out=out)
    return out


def test_the_program_grows_by_epochs(program: Path, train: Callable[..., Any]) -> None:
    assert 'grow = ""  # ' in (program / "train.py").read_text()
    options = (*QUICK, "--epochs", 3, "--grow", "2", "--log-every", 1)
    whole = train(program, *options, "--run-dir", "whole", "--json")
    assert whole.code == 0, whole.stderr
    rows = loss_rows(program / "whole")
    assert set(rows) == {(0, step) for step in range(12)} | {(1, step) for step in range(8, 12)}
    assert len(whole.json["exit_accuracies"]) == 2 and whole.json["samples_per_second"] > 0
    ended = train_ranks(program, *options)
    assert [one.code for one in ended] == [0, 0], ended
    assert same_bits(program / "run", program / "whole")
    assert loss_rows(program / "run") == rows
    ended = train_ranks(program, *options, "--run-dir", "replicas", num_ranks=4)
    assert [one.code for one in ended] == [0] * 4, ended
    assert loss_rows(program / "replicas").keys() == rows.keys()


def test_a_run_that_grows_goes_on_as_it_was_begun(program: Path, train: Callable[..., Any]) -> None:
    options = (*QUICK, "--epochs", 3, "--save-every", 4, "--run-dir", "begun")
    assert train(program, *options, "--grow", "2").code == 0
    (program / "begun" / "result.json").unlink()  # killed before its end
    found = train(program, *options, "--grow", "1", "--resume")
    assert found.code == 1 and "was begun with --grow 2, not 1; resume with" in found.error


@pytest.mark.parametrize(
    ("grow", "message"),
    [
        ("3", "grow '3': the last stage would begin at step 12, and the run has 12; give more"),
        ("1,2", "grow '1,2' must be the epochs from which stages 1 … 1 take part, as in 1"),
        ("x", "grow 'x' must be the epochs"),
    ],
)
def test_epochs_that_are_none_are_refused(
    grow: str, message: str, program: Path, train: Callable[..., Any]
) -> None:
    found = train(program, *QUICK, "--epochs", 3, "--run-dir", "refused", "--grow", grow)
    assert found.code == 1 and message in found.error, found.stderr
    assert not (program / "refused" / "metrics.jsonl").exists()


def test_only_a_method_with_exits_has_stages_that_rest() -> None:
    plan = compiled("unet", 3, method="dascpl").program.plan
    assert checked_starts(plan, ()) == (0, 0, 0)
    assert checked_starts(plan, [0, 2, 2]) == (0, 2, 2)
    assert first_steps(plan, "", 4, 12) == ()
    assert first_steps(plan, "1, 2", 4, 12) == (0, 4, 8)
    for starts in ([1, 2, 3], [0, 3, 2], [0, 0, -1]):
        with pytest.raises(MethodError, match="give 3 that do not fall, the first 0"):
            checked_starts(plan, starts)
    for odd in ([0, 1], [0, 1, 2, 3], [0, 1.5, 2], [0, "1", 2], [0, True, 2], [0, 1, None]):
        with pytest.raises(MethodError, match="give 3 whole numbers, one per stage"):
            checked_starts(plan, odd)  # type: ignore[arg-type]
    alone = replace(plan, method="scpl", inference=("0F", "1F", "2F"))
    assert checked_starts(alone, [0, 0, 0]) == (0, 0, 0)
    with pytest.raises(MethodError, match="method 'scpl' has no exit of stage 0, behind which oth"):
        checked_starts(alone, [0, 1, 2])
    assert can_grow(plan) and not can_grow(alone)


def test_a_stage_behind_which_others_rest_has_an_exit() -> None:
    plan = compiled("unet", 3, method="dascpl").program.plan
    some = replace(plan, inference=("0F", "1F", "1X", "2F"))
    assert checked_starts(some, [0, 0, 4]) == (0, 0, 4)
    for starts in ([0, 4, 4], [0, 4, 8]):
        with pytest.raises(MethodError, match="no exit of stage 0, behind which others rest"):
            checked_starts(some, starts)
    assert not can_grow(some)
    joined = replace(plan, schedule="bp")
    assert checked_starts(joined, [0, 0, 0]) == (0, 0, 0) and not can_grow(joined)
    with pytest.raises(MethodError, match="which would rest; methods dascpl, early_exit and dein"):
        checked_starts(joined, [0, 4, 8])


# ---------------------------------------------------------------------- other methods


@pytest.mark.parametrize("method", ["early_exit", "deinforeg"])
def test_every_method_with_exits_may_grow(method: str) -> None:
    found = compiled("unet", 3, method=method)
    assert can_grow(found.program.plan)
    batches, starts = (2 * found.batches)[:9], (0, 3, 6)
    expected = run(found.program, batches, "sequential", starts=starts)
    for schedule in ("stream", "in_step"):
        assert differences(run(found.program, batches, schedule, starts=starts), expected) == []
    assert 'grow = ""  # ' in (found.program.directory / "train.py").read_text()


def test_a_method_of_ones_own_may_grow(tmp_path: Path) -> None:
    """Where all its stages have exits by epochs; where some have, from those on."""
    for steps, starts, seen in (
        (EXITS, (0, 2, 4), [1, 1, 2, 2, 3]),
        ("('0F', '1F', '1X', '2F')", (0, 0, 3), [1, 1, 1, 2, 2]),
    ):
        program = compile_model(
            layers(), "8", num_stages=3, num_classes=3, method=own_file(tmp_path, steps=steps)
        )
        has_option = "grow =" in (program.directory / "train.py").read_text()
        assert has_option == can_grow(program.plan) == (steps is EXITS)
        x, labels = torch.randn(6, 8), torch.arange(6) % 3
        with program.trainer(seed=0, starts=starts) as trainer:
            found = []
            for _ in seen:
                trainer.step(x, labels)
                found.append(len(trainer.predict(x)))
                assert len(trainer.evaluate([(x, labels)]).accuracies) == found[-1]
        assert found == seen
