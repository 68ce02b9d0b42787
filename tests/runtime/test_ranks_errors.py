"""What goes wrong on ranks: rank 0 says it once, with its remedy; every rank ends."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from processes import SECONDS, Ended, start_programs, train_ranks, wait_all
from run_files import QUICK
from scpl_compile import compile_model
from scpl_compile.runtime import rank_trainer, ranks, stage_step

pytestmark = pytest.mark.timeout(120)


def check_told(ended: Sequence[Ended], *parts: str) -> str:
    """One error on rank 0 alone, which has these parts; no rank hangs or ends well."""
    assert all(one.code not in (0, None) for one in ended), ended
    (told,) = ended[0].errors
    for part in parts:
        assert part in told
    assert [one.errors for one in ended[1:]] == [[]] * (len(ended) - 1)
    return told


def is_loss(told: str) -> bool:
    """Whether a rank was missed: by who waited for it, or by who watched it."""
    return "rank 1 has ended without a word: " in told or " has lost its neighbour: " in told


def quiet(ended: Sequence[Ended]) -> bool:
    """Whether no rank has shown a traceback."""
    return not any("Traceback" in one.stderr for one in ended)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_another_number_of_ranks(program: Path, num_ranks: int) -> None:
    ended = train_ranks(program, *QUICK, num_ranks=num_ranks)
    check_told(
        ended, f"error: {num_ranks} ranks for 2 stages on 2 ranks; start 2", "--nproc-per-node 2"
    )
    assert quiet(ended) and not (program / "run").exists()


def test_ranks_with_different_programs(program: Path, net_file: Path, tmp_path: Path) -> None:
    """Of other numbers of stages even, which would place the ranks in another way."""
    other = tmp_path / "other"
    compile_model(f"{net_file}:build_model", "1x8x8", num_stages=3, out=other)
    for homes in ([program, other], [other, program]):
        ended = train_ranks(homes, *QUICK)
        check_told(ended, "rank 1 has program ", ", rank 0 has ", "copy the same directory")
        assert quiet(ended)
    assert not (program / "run").exists() and not (other / "run").exists()


def test_a_program_that_is_damaged_on_one_host(program: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(program, tmp_path / "other"))
    (other / "plan.json").write_text("{}")
    ended = train_ranks([program, other], *QUICK)
    check_told(ended, "other/plan.json is damaged", "compile again with --force")
    assert quiet(ended) and not (program / "run").exists()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (("--lr", "0.5"), "rank 1 has --lr 0.5, rank 0 has 0.001; start every rank with the same"),
        (("--schedule", "gpipe"), "rank 1 has --schedule gpipe, rank 0 has stream; start every"),
        (("--engine", "ranks"), "rank 1 has --engine ranks, rank 0 has auto; start every rank"),
    ],
)
def test_ranks_with_other_options(program: Path, others: tuple[str, ...], message: str) -> None:
    """Also those that would be refused on rank 1 alone."""
    ended = train_ranks(program, *QUICK, others=others)
    check_told(ended, message)
    assert quiet(ended) and not (program / "run").exists()


def test_a_schedule_that_does_not_go_with_the_method(program: Path) -> None:
    ended = train_ranks(program, *QUICK, "--schedule", "gpipe")
    check_told(ended, "schedule 'gpipe' does not go with method 'scpl'", "--method bp")
    assert quiet(ended)


def take_port() -> None:
    """Somebody listens where the ranks would meet."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
    listener.listen()
    globals()["_listener"] = listener


def test_a_port_in_use(program: Path) -> None:
    """Rank 0 alone: whoever has the port decides how long the others wait for an answer."""
    ended = train_ranks(program, *QUICK, num_ranks=1, before=take_port)
    check_told(ended, "the ranks do not meet at 127.0.0.1:", "the port is in use", "--master-port")
    assert quiet(ended) and not (program / "run").exists()


def without_gloo() -> None:
    dist.is_backend_available = lambda name: name != "gloo"


def test_a_missing_backend(program: Path) -> None:
    ended = train_ranks(program, *QUICK, before=without_gloo)
    check_told(ended, "need torch's gloo backend", "install a torch", "--engine threads")
    assert quiet(ended) and not (program / "run").exists()


def with_a_gpu_for_rank_0() -> None:
    kind = "cuda" if os.environ["RANK"] == "0" else "cpu"
    ranks._device_of = lambda *place: torch.device(kind)  # type: ignore[assignment]


def test_more_ranks_than_gpus(program: Path) -> None:
    ended = train_ranks(program, *QUICK, before=with_a_gpu_for_rank_0)
    told = check_told(ended, "rank 1 has devices of kind cpu, rank 0 has cuda")
    assert "no more ranks on a host than it has GPUs, or give --devices cpu" in told
    assert quiet(ended) and not (program / "run").exists()


def test_a_run_directory_that_exists(program: Path) -> None:
    run = program / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    ended = train_ranks(program, *QUICK)
    check_told(ended, f"{run} exists; add --resume, --force or another --run-dir")
    assert quiet(ended)
    assert [path.name for path in run.iterdir()] == ["run.json"]


def test_data_that_does_not_fit(program: Path) -> None:
    """Every rank sees it, and one of them says it."""
    ended = train_ranks(program, "--data", "random:64", "--batch-size", "2", num_ranks=4)
    check_told(ended, "a batch of 2 for 2 replicas", "give --batch-size 4 or more")
    assert quiet(ended) and not (program / "run").exists()


# ---------------------------------------------------------------------- in the middle of training

FAILS_AT = 5


def failing(error: Callable[[], Any], stage: str) -> None:
    """The stage of this name fails in its batch FAILS_AT."""
    forward = stage_step.StageStep.forward

    def fail(self: Any, step: int) -> None:
        if step == FAILS_AT and str(self.index) == stage:
            error()
        forward(self, step)

    stage_step.StageStep.forward = fail  # type: ignore[method-assign]


def no_memory_on_rank_1() -> None:
    failing(lambda: torch.empty(2**60), "1")


def a_bug_on_rank_0() -> None:
    def bug() -> None:
        raise ValueError("no such number")

    failing(bug, "0")


def a_bug_in_the_middle() -> None:
    def bug() -> None:
        raise ValueError("no such number")

    failing(bug, "1")


def check_unfinished(program: Path) -> None:
    names = {path.name for path in (program / "run").iterdir()}
    assert not names & {"result.json", "final.safetensors"}
    assert not any(name.endswith(".part") for name in names)


def test_a_stage_that_does_not_fit_into_memory(program: Path) -> None:
    start = time.monotonic()
    ended = train_ranks(program, *QUICK, "--epochs", 3, before=no_memory_on_rank_1)
    told = check_told(ended, "rank 1 (stage 1): RuntimeError", "can't allocate memory")
    assert "smaller --batch-size, other --devices, or compile into more --stages" in told
    assert "Traceback" in ended[1].stderr and "Traceback" not in ended[0].stderr
    assert time.monotonic() - start < SECONDS / 2
    check_unfinished(program)


def test_a_bug_on_rank_0(program: Path) -> None:
    ended = train_ranks(program, *QUICK, "--epochs", 3, before=a_bug_on_rank_0)
    check_told(ended, "error: ValueError: no such number")
    assert "in bug" in ended[0].stderr  # its traceback
    check_unfinished(program)


def test_a_loss_that_is_not_finite(program: Path) -> None:
    ended = train_ranks(
        program, *QUICK, "--epochs", 3, "--lr", "1e30", "--optimizer", "sgd", "--log-every", 1
    )
    check_told(ended, "the loss is not finite since step ", "lower --lr")
    check_unfinished(program)


def kill_at_5() -> None:
    failing(lambda: os.kill(os.getpid(), signal.SIGKILL), "1")


def test_a_rank_that_is_killed(program: Path) -> None:
    """The kernel does that when memory is short; who notices it first says so."""
    ended = train_ranks(program, *QUICK, "--epochs", 3, before=kill_at_5)
    assert ended[1].code == -signal.SIGKILL
    assert is_loss(check_told(ended))
    check_unfinished(program)


def kill_in_evaluation() -> None:
    evaluate = rank_trainer.RankTrainer._evaluate

    def die(self: Any, batches: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(self, batches)

    rank_trainer.RankTrainer._evaluate = die  # type: ignore[method-assign]


def test_a_rank_that_is_killed_in_evaluation(program: Path) -> None:
    ended = train_ranks(program, *QUICK, "--epochs", 3, before=kill_in_evaluation)
    assert ended[1].code == -signal.SIGKILL
    assert is_loss(check_told(ended))
    assert quiet(ended)
    check_unfinished(program)


def test_rank_0_that_is_killed(program: Path, tmp_path: Path) -> None:
    """The store ends with it; nobody waits."""
    both = start_programs(program, tmp_path / "logs", *QUICK, "--epochs", 2000)
    end = time.monotonic() + SECONDS
    while not (program / "run" / "metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.05)
    both[0].process.kill()
    killed, other = wait_all(both)
    assert killed.code == -signal.SIGKILL and other.code not in (0, None)
    check_unfinished(program)
