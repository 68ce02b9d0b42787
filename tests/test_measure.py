"""The benchmarks' measuring: what they report is what happened."""

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch

from benchmarks.measure import (
    COLUMNS,
    Stats,
    compare,
    environment,
    idle_note,
    peak_memory,
    pinned_threads,
    read_rows,
    run_isolated,
    stats_rows,
    table,
    write_rows,
)

MIB = 2**20


def quietly() -> str:
    return ""


def row(**changes: object) -> dict[str, object]:
    key = {"benchmark": "throughput", "case": "cnn", "candidate": "bp", "metric": "step time"}
    return {**key, "unit": "ms", "value": 2.0, "machine": "a machine"} | changes


# time


def test_stats_are_the_20th_50th_and_80th_percentile() -> None:
    stats = Stats.of([5.0, 1.0, 2.0, 3.0, 4.0, 11.0], (7.0, "resident"), "a note")
    assert (stats.p20_ms, stats.median_ms, stats.p80_ms, stats.n) == (2.0, 3.5, 5.0, 6)
    assert (stats.peak_mib, stats.peak_kind, stats.note) == (7.0, "resident", "a note")


def test_stats_of_one_call_have_no_spread() -> None:
    stats = Stats.of([3.0], (0.0, "resident"))
    assert stats.per_step(2) == Stats.of([1.5], (0.0, "resident"))
    assert stats.p20_ms == stats.median_ms == stats.p80_ms == 3.0
    with pytest.raises(FrozenInstanceError):
        stats.n = 2  # type: ignore[misc]


def test_candidates_run_in_turn_and_each_round_begins_with_the_next() -> None:
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    stats = compare(candidates, repeats=4, warmup=1, check_idle=quietly)
    warmup, rounds, memory = "abc", "abc bca cab abc", "abc"
    assert "".join(calls) == warmup + rounds.replace(" ", "") + memory
    assert list(stats) == ["a", "b", "c"]
    assert all(one.n == 4 for one in stats.values())


def test_the_clock_covers_the_candidate_and_its_synchronisation() -> None:
    pending = [0.0]

    def launch() -> None:  # returns at once, as a CUDA launch does
        pending[0] = 0.02

    def synchronize() -> None:
        time.sleep(pending[0])
        pending[0] = 0.0

    stats = compare(
        {"launches": launch, "nothing": lambda: None, "waits": lambda: time.sleep(0.01)},
        repeats=3,
        warmup=0,
        synchronize=synchronize,
        check_idle=quietly,
    )
    assert stats["launches"].p20_ms >= 20
    assert stats["waits"].p20_ms >= 10
    assert stats["nothing"].median_ms < 10


@pytest.mark.parametrize(("names", "repeats"), [("a", 3), ("", 3), ("ab", 0)])
def test_one_candidate_or_no_repeat_is_refused(names: str, repeats: int) -> None:
    with pytest.raises(ValueError, match=f"not {len(names)} and {repeats}"):
        compare(dict.fromkeys(names, quietly), repeats=repeats, warmup=0, check_idle=quietly)


def test_threads_are_pinned_inside_only() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), pinned_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        _ = 1 / 0
    assert torch.get_num_threads() == before


# memory


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident memory is measured even where another test has used CUDA in this process."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)


def touch(num_bytes: int) -> None:
    torch.ones(num_bytes, dtype=torch.uint8)


@pytest.mark.usefixtures("no_cuda")
def test_peak_memory_sees_50_mb_that_are_gone_at_the_end() -> None:
    touch(MIB)
    mib, kind = peak_memory(lambda: touch(50 * MIB))
    assert kind == "resident"
    assert 49 < mib < 60
    assert peak_memory(lambda: touch(MIB))[0] < 10  # the peak before it is forgotten


@pytest.mark.usefixtures("no_cuda")
def test_peak_memory_sees_memory_that_the_heap_kept_from_an_earlier_call() -> None:
    def run() -> None:  # pieces too small to be mapped one by one, so freeing them keeps the heap
        pieces = [torch.ones(64 * 1024, dtype=torch.uint8) for _ in range(800)]
        pieces.clear()

    run()
    assert [peak_memory(run)[0] > 45 for _ in range(3)] == [True] * 3


@pytest.mark.usefixtures("no_cuda")
def test_each_candidate_is_charged_its_own_memory() -> None:
    stats = compare(
        {"large": lambda: touch(50 * MIB), "small": lambda: touch(MIB)},
        repeats=1,
        warmup=1,
        check_idle=quietly,
    )
    assert stats["large"].peak_mib > 49
    assert stats["small"].peak_mib < 10


def test_with_cuda_the_fullest_device_above_its_start_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, peaks = [900 * MIB, 10 * MIB], [0, 0]
    synchronized: list[int] = []

    def run() -> None:
        peaks[:] = [905 * MIB, 40 * MIB]

    def reset(device: int) -> None:
        peaks[device] = held[device]

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", held.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peaks.__getitem__)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    assert peak_memory(run) == (30.0, "cuda allocated")
    assert synchronized == [0, 1, 0, 1]  # before the start is read, and before the peak is


def test_an_isolated_call_is_measured_apart_from_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_target.py").write_text(
        "import os, time\n"
        "def hold(mib):\n"
        "    len(bytearray(b'x') * (mib << 20))\n"
        "    time.sleep(0.05)\n"
        "    return [mib, os.environ['OMP_NUM_THREADS']]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run_isolated("a_target:hold", {"mib": 50}, threads=3)
    assert done.value == [50, "3"]
    assert 0.05 <= done.seconds < 5
    assert 49 < done.peak_mib - done.base_mib < 60
    assert done.peak_mib < 100  # this process, with torch, holds more


def test_an_isolated_call_that_fails_is_named() -> None:
    with pytest.raises(RuntimeError, match=re.escape("math:no_such exited with 1")):
        run_isolated("math:no_such")


# the machine

STAT = "cpu  {} 0 50 {} {} 0 0 {} 7 0\ncpu0 1 0 25 500 5 0 0 0 0 0\ncpu1 1 0 25 500 5 0 0 0 0 0\n"


@pytest.fixture
def note_of(tmp_path: Path) -> Callable[..., str]:
    """The note after 100 ticks on two cores, some of them used, stolen or spent waiting."""

    def note(*, user: int = 0, stolen: int = 0, waiting: int = 0) -> str:
        def pass_time(seconds: float) -> None:
            assert seconds == 0.5
            idle = 1000 + 100 - user - stolen - waiting
            (tmp_path / "stat").write_text(STAT.format(200 + user, idle, 10 + waiting, stolen))

        (tmp_path / "stat").write_text(STAT.format(200, 1000, 10, 0))
        (tmp_path / "loadavg").write_text("1.25 0.50 0.25 2/345 6789\n")
        return idle_note(tmp_path, sleep=pass_time)

    return note


@pytest.mark.parametrize("ticks", [{}, {"user": 7}, {"waiting": 50}])
def test_up_to_15_percent_of_one_core_is_idle(
    note_of: Callable[..., str], capsys: pytest.CaptureFixture[str], ticks: dict[str, int]
) -> None:
    assert note_of(**ticks) == ""  # 7 of 100 ticks on two cores: 0.14 cores
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ticks", [{"user": 8}, {"stolen": 8}])
def test_more_is_noted_and_warned_of(
    note_of: Callable[..., str], capsys: pytest.CaptureFixture[str], ticks: dict[str, int]
) -> None:
    note = note_of(**ticks)
    assert note == "not idle: 0.16 cores in use before the run, load 1.25"
    assert capsys.readouterr().err == f"warning: {note}\n"


def test_the_real_proc_can_be_read() -> None:
    note = idle_note(interval_s=0.02)
    assert note == "" or re.fullmatch(r"not idle: [\d.]+ cores .*, load [\d.]+", note)


def test_the_environment_names_no_host_user_or_path() -> None:
    here = environment()
    assert list(here) == ["machine", "torch", "python", "commit", "date"]
    assert all(here.values())
    assert re.search(r", \d+ cores", here["machine"])
    assert re.fullmatch(r"unknown|[0-9a-f]{7,}(\+dirty)?", here["commit"])
    assert here["python"] == sys.version.split()[0]
    assert not any(os.sep + "home" in text or os.uname().nodename == text for text in here.values())


# rows


def test_rows_read_back_with_all_columns(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    config = {"batch": 128, "cut": "block2, block3"}
    write_rows(path, [row(value=1234.5678, n=5, config=config, note='said "so"')])
    (back,) = read_rows(path)
    assert tuple(back) == COLUMNS
    assert (back["value"], back["n"], back["p20"]) == ("1234.57", "5", "")
    assert (back["config"], back["note"]) == (
        '{"batch": 128, "cut": "block2, block3"}',
        'said "so"',
    )
    assert (back["machine"], back["torch"]) == ("a machine", environment()["torch"])
    assert [file.name for file in path.parent.iterdir()] == ["results.csv"]


def test_a_row_replaces_the_one_with_its_key_in_place(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    write_rows(path, [row(value=1), row(candidate="scpl", value=2), row(case="vit", value=3)])
    write_rows(path, [row(candidate="scpl", value=4, unit="s", date="later"), row(metric="loss")])
    assert [(r["case"], r["candidate"], r["metric"], r["value"]) for r in read_rows(path)] == [
        ("cnn", "bp", "step time", "1"),
        ("cnn", "scpl", "step time", "4"),
        ("vit", "bp", "step time", "3"),
        ("cnn", "bp", "loss", "2"),
    ]


@pytest.mark.parametrize("column", ["benchmark", "case", "candidate", "metric", "machine"])
def test_each_column_of_the_key_tells_rows_apart(tmp_path: Path, column: str) -> None:
    path = tmp_path / "results.csv"
    write_rows(path, [row()])
    write_rows(path, [row(**{column: "another"}), row(threads=2, device="cuda:0", config={"a": 1})])
    assert [r["threads"] for r in read_rows(path)] == ["2", ""]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 1}, "speed"),
        ({"note": "see /tmp/log.txt"}, "note holds a path"),
        ({"config": {"data": "/data/images"}}, "config holds a path"),
    ],
)
def test_a_foreign_column_or_a_path_leaves_the_file_as_it_was(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = tmp_path / "results.csv"
    write_rows(path, [row(unit="images/s", case="K=2, 1/2 width")])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        write_rows(path, [row(**changes)])
    assert path.read_bytes() == before


def test_stats_become_a_row_of_time_and_one_of_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = {"bp": Stats.of([1.0, 2.0, 3.0], (50.0, "resident"), "not idle")}
    rows = stats_rows(stats, benchmark="throughput", case="cnn", threads=1, device="cpu")
    write_rows(tmp_path / "results.csv", rows)
    shown = ("candidate", "metric", "unit", "value", "p20", "p80", "n", "threads", "note")
    assert [tuple(r[c] for c in shown) for r in read_rows(tmp_path / "results.csv")] == [
        ("bp", "step time", "ms", "2", "1.4", "2.6", "3", "1", "not idle"),
        ("bp", "peak memory", "MiB", "50", "", "", "1", "1", "resident, above the start"),
    ]
    table(rows)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step" in captured.err
    assert "1.4" in captured.err
