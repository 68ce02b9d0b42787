"""Facts, agreement and the first failure, between threads that stand for ranks."""

import io
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NoReturn

import pytest
from torch.distributed import DistNetworkError, HashStore, Store

from scpl_compile.errors import MethodError, TrainingError
from scpl_compile.runtime import meeting as meeting_module
from scpl_compile.runtime import rank_watch as watch_module
from scpl_compile.runtime.meeting import Meeting, as_posted, reason
from scpl_compile.runtime.rank_watch import Watch


class Exited(Exception):
    """In place of the end of this process."""


class NoWatch(Watch):
    """Without the threads that would end this process."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._voice = threading.Lock()

    def stop(self) -> None:
        """Nothing."""

    def exit(self, line: str = "") -> NoReturn:
        """As Watch's, but for the process."""
        self.tell(line)
        raise Exited


def meetings(count: int, timeout_s: float = 60.0) -> list[Meeting]:
    store = HashStore()
    return [
        Meeting(
            rank=rank,
            world_size=count,
            store=store,
            watch=NoWatch(store, rank, count),
            owns_group=False,
            timeout_s=timeout_s,
        )
        for rank in range(count)
    ]


def together(count: int, work: Callable[[Meeting], Any]) -> list[Any]:
    """What `work` gives or raises on every rank."""

    def attempt(meeting: Meeting) -> Any:
        try:
            return work(meeting)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as ranks:
        return list(ranks.map(attempt, meetings(count)))


@pytest.mark.parametrize("text", ["{", b"\xff", "[" * 10**5, "null", "[1]", "true"])
def test_what_is_no_fact_is_told(text: str | bytes) -> None:
    one, _ = meetings(2)
    one.store.set("fact/a", text)
    with pytest.raises(TrainingError, match="what is posted as 'a' is none of this program's"):
        one.find("a", dict)
    with pytest.raises(TrainingError, match="none of this program's"):
        one.wait_for("a", dict)


def test_facts_that_are_no_object_are_told() -> None:
    one, other = meetings(2)
    other.post("start alike/1", ["--lr"])
    with pytest.raises(TrainingError, match="posted as 'start alike/1' is none of this program's"):
        one.agree({"--lr": 1}, "start alike")


def test_a_fact_is_found_by_every_rank_until_it_is_forgotten() -> None:
    one, other = meetings(2)
    assert other.find("a", dict) is None
    one.post("a", {"b": [1, None]})
    assert other.find("a", dict) == other.wait_for("a", dict) == {"b": [1, None]}
    other.forget("a")
    assert one.find("a", dict) is None


def test_a_rank_waits_for_a_fact() -> None:
    one, other = meetings(2)
    threading.Timer(0.1, one.post, ("late", 3)).start()
    assert other.wait_for("late", int) == 3


def test_it_does_not_wait_for_ever() -> None:
    with pytest.raises(
        TrainingError, match=r"rank 1 has waited 0.1 s .*\('never'\); see that every"
    ):
        meetings(2, timeout_s=0.1)[1].wait_for("never", int)


def test_a_fact_is_read_as_it_was_posted_or_refused() -> None:
    with as_posted("mail/1/0"):
        assert {"a": 1}["a"] == 1
    number: Any = 3
    slips: list[Callable[[], object]] = [
        lambda: number["losses"], lambda: number.losses, lambda: dict[str, int]()["losses"],
        lambda: int("x"), lambda: int(float("inf")),
    ]  # fmt: skip
    for slip in slips:
        with (
            pytest.raises(TrainingError, match="posted as 'mail/1/0' is none"),
            as_posted("mail/1/0"),
        ):
            slip()


def test_rank_0_tells_the_others() -> None:
    assert together(3, lambda m: m.from_leader("x", [m.rank])) == [[0], [0], [0]]


def test_ranks_that_are_alike_agree() -> None:
    assert (
        together(3, lambda m: m.agree({"program": "abc", "--lr": 0.1}, "start again")) == [None] * 3
    )


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (lambda rank: {"--lr": 0.1 * rank}, "rank 1 has --lr 0.1, rank 0 has 0.0; do so"),
        (
            lambda rank: {"--b": 1} | ({"--a": 2} if rank == 2 else {}),
            "rank 2 has --a 2, rank 0 has None",
        ),
        (lambda rank: {"--a": 1} if rank == 0 else {}, "rank 1 has --a None, rank 0 has 1"),
    ],
)
def test_all_of_them_hear_where_they_differ(facts: Callable[[int], Any], message: str) -> None:
    for error in together(3, lambda m: m.agree(facts(m.rank), "do so")):
        assert isinstance(error, MethodError) and str(error).startswith(message)


def test_rank_0_tells_the_first_failure_and_the_others_that_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    together(3, lambda m: m.fail(TrainingError("too hot")))
    first, *others = said.getvalue().splitlines()
    assert first == "error: too hot"
    assert sorted(others) == [f"rank {k} ends: rank 0 has told the error" for k in (1, 2)]


def test_where_rank_0_says_nothing_the_others_tell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(watch_module, "_PATIENCE_S", 0.1)
    meetings(2)[1].fail(TrainingError("too hot"))
    assert said.getvalue() == "error: too hot\n"


class NoStore:
    """The store of a process that has ended, or behind a link that is cut."""

    def __init__(self, is_gone: bool) -> None:
        self._is_gone = is_gone

    def add(self, key: str, amount: int) -> int:
        """Fails, or waits for longer than any test."""
        if self._is_gone:
            raise DistNetworkError("connection reset")
        threading.Event().wait()
        return 0

    def set(self, *arguments: Any) -> None:
        """As add."""
        self.add("", 0)

    check = delete_key = set


def test_a_fact_of_a_store_that_is_gone_is_told() -> None:
    store: Any = NoStore(True)
    alone = replace(meetings(2)[1], store=store)
    for call in (
        lambda: alone.post("a", 1),
        lambda: alone.find("a", int),
        lambda: alone.forget("a"),
    ):
        with pytest.raises(
            TrainingError, match="rank 1 has lost the store of the ranks: rank 0 has"
        ):
            call()


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_rank_that_does_not_reach_the_store_tells_its_own(
    is_gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(meeting_module, "_PATIENCE_S", 0.1)
    store: Any = NoStore(is_gone)
    alone = replace(meetings(2)[1], store=store, watch=NoWatch(store, 1, 2))
    with nullcontext() if is_gone else pytest.raises(Exited):
        alone.fail(TrainingError("too hot"))
    assert said.getvalue() == "error: too hot\n"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("no such"), "error: ValueError: no such\n"),
        (
            MemoryError("full"),
            "error: MemoryError: full; there is not enough memory: give a smaller --batch-size",
        ),
    ],
)
def test_other_errors_are_told_with_their_kind_and_memory_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(watch_module, "_GOODBYE_S", 0.1)
    meetings(2)[0].fail(error)
    assert said.getvalue().startswith(told)


def test_all_leave_when_all_are_there_and_rank_0_last() -> None:
    left: list[int] = []

    def leave(meeting: Meeting) -> None:
        meeting.leave()
        left.append(meeting.rank)

    together(3, leave)
    assert sorted(left) == [0, 1, 2]
    assert together(1, lambda m: m.leave()) == [None]


def test_what_torch_says_is_told_without_its_advice() -> None:
    told = "[/pytorch/gloo/tcp/pair.cc:545] Read error [127.0.0.1]:18: Connection reset by peer. "
    assert reason(RuntimeError(f"{told}This is typically caused by a worker\nmore")) == (
        "Read error [127.0.0.1]:18: Connection reset by peer"
    )
    assert reason(ValueError("no such host")) == "no such host"
