"""What every benchmark measures with: time, memory, whether the machine was idle, rows.

::

    candidates ─ compare ─▶ {name: Stats} ─ stats_rows ─┐
    a measured figure ──────────────────────── {…} row ─┴─ write_rows ─▶ results.csv
                                                           table ─▶ stderr

Linux only: memory, the load and the processor's name are read from /proc. Memory is in MiB and
time in milliseconds unless a name says otherwise.
"""

import csv
import ctypes
import gc
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

__all__ = [
    "COLUMNS",
    "Isolated",
    "Stats",
    "compare",
    "environment",
    "idle_note",
    "peak_memory",
    "pinned_threads",
    "read_rows",
    "run_isolated",
    "stats_rows",
    "synchronize_cuda",
    "table",
    "write_rows",
]

COLUMNS = (
    *("benchmark", "case", "candidate", "metric", "unit", "value", "p20", "p80", "n"),
    *("threads", "device", "machine", "torch", "python", "commit", "date", "note", "config"),
)
_key = itemgetter("benchmark", "case", "candidate", "metric", "machine")

_ROOT = Path(__file__).resolve().parent.parent
_BUSY_CORES = 0.15
_ABSOLUTE_PATH = re.compile(r"(^|[\s\"'=:])(/|[A-Za-z]:\\)\w")

Run = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """One candidate of `compare`: median, 20th and 80th percentile of n timed calls, its memory.

    peak_mib, peak_kind: what `peak_memory` gives. note: what `idle_note` said before the run.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    n: int
    peak_mib: float
    peak_kind: str
    note: str = ""

    @classmethod
    def of(cls, times_ms: Sequence[float], peak: tuple[float, str], note: str = "") -> Self:
        """Percentiles of `times_ms`, linear between neighbours; peak as `peak_memory` gives it."""
        p20, median, p80 = np.percentile(times_ms, (20, 50, 80)).tolist()
        return cls(
            median_ms=median,
            p20_ms=p20,
            p80_ms=p80,
            n=len(times_ms),
            peak_mib=peak[0],
            peak_kind=peak[1],
            note=note,
        )

    def per_step(self, num_steps: int) -> Self:
        """The times of one of the `num_steps` steps that a call makes."""
        return replace(
            self,
            median_ms=self.median_ms / num_steps,
            p20_ms=self.p20_ms / num_steps,
            p80_ms=self.p80_ms / num_steps,
        )


def synchronize_cuda() -> None:
    """Wait for all work on every CUDA device; nothing where this process has not used CUDA."""
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)


@contextmanager
def pinned_threads(num_threads: int) -> Iterator[None]:
    """Let torch's operators on the CPU use exactly `num_threads` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(
    candidates: Mapping[str, Run],
    *,
    repeats: int,
    warmup: int,
    synchronize: Callable[[], None] = synchronize_cuda,
    check_idle: Callable[[], str] | None = None,
) -> dict[str, Stats]:
    """Time two or more candidates in turn, then measure the memory of one more call of each.

    In turn, so that a change of the machine's speed meets all of them; each round begins with the
    next candidate, so that none always runs after the same one. Memory has a call of its own
    because measuring it disturbs the time. The caller pins threads (`pinned_threads`).

    repeats: timed calls of each candidate. warmup: calls of each before those. synchronize: waits
    for the device before the clock is read. check_idle: gives the note, default `idle_note`.

    Raises:
        ValueError: fewer than two candidates, or no timed call.
    """
    if len(candidates) < 2 or repeats < 1:
        given = f"{len(candidates)} and {repeats}"
        raise ValueError(f"compare needs 2 or more candidates and 1 or more repeats, not {given}")
    note = (check_idle or idle_note)()
    names = tuple(candidates)
    for _ in range(warmup):
        for name in names:
            candidates[name]()
    times_ms: dict[str, list[float]] = {name: [] for name in names}
    for index in range(repeats):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            times_ms[name].append(_time_ms(candidates[name], synchronize))
    return {
        name: Stats.of(times_ms[name], peak_memory(candidates[name], synchronize), note)
        for name in names
    }


def _time_ms(run: Run, synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter_ns()
    run()
    synchronize()
    return (time.perf_counter_ns() - start) / 1e6


def peak_memory(run: Run, synchronize: Callable[[], None] = synchronize_cuda) -> tuple[float, str]:
    """MiB that one call of `run` needs on top of what is held before it, and what was measured.

    "cuda allocated": torch's allocator on the fullest device, where this process uses CUDA.
    "resident": else, the kernel's high-water mark of the process, reset before the call (proc(5),
    clear_refs): exact to pages, without a thread that samples and disturbs.
    "not measured" (nan): where that mark cannot be reset.
    Call `run` once before: a first call also builds caches.
    """
    synchronize()
    gc.collect()
    if torch.cuda.is_initialized():
        return _cuda_peak_mib(run, synchronize), "cuda allocated"
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc
        trim(0)  # a call that reuses freed heap would seem to need nothing
    start_mib = _status_mib("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return math.nan, "not measured"
    run()
    return max(0.0, _status_mib("VmHWM") - start_mib), "resident"


def _cuda_peak_mib(run: Run, synchronize: Callable[[], None]) -> float:
    starts = []
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
        starts.append(torch.cuda.memory_allocated(device))
    run()
    synchronize()
    return max(torch.cuda.max_memory_allocated(d) - start for d, start in enumerate(starts)) / 2**20


def _status_mib(field: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Isolated:
    """A call in a fresh process: its result, its seconds, and resident memory.

    base_mib: after the import of the function's module. peak_mib: the most of the whole process.
    """

    value: Any
    seconds: float
    base_mib: float
    peak_mib: float


# VmHWM, read by the process itself: getrusage's figure for a child is never below its parent's
# peak, because exec keeps the mark of the image that was forked. It imports only what it needs.
_ISOLATED_PROGRAM = """
import importlib, json, sys, time
def status_mib(field):
    return int(open("/proc/self/status").read().split(field)[1].split()[0]) / 1024
target, arguments, answer = sys.argv[1:]
module, _, name = target.partition(":")
function = getattr(importlib.import_module(module), name)
measured = {"base_mib": status_mib("VmRSS:")}
start = time.perf_counter()
measured["value"] = function(**json.loads(arguments))
measured["seconds"] = time.perf_counter() - start
measured["peak_mib"] = status_mib("VmHWM:")
json.dump(measured, open(answer, "w"))
"""


def run_isolated(
    target: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    threads: int = 1,
    timeout_s: float = 600,
) -> Isolated:
    """Call `target` in a fresh Python process and measure that process.

    target: "module:function"; modules of this repository are found from any directory.
    arguments: its keyword arguments; they and the result travel as JSON.
    threads: of OpenMP, and so of torch.

    Raises:
        RuntimeError: the process failed; its traceback is on stderr.
        subprocess.TimeoutExpired: it took longer than `timeout_s`.
    """
    search = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    variables = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        texts = (target, json.dumps(dict(arguments or {})), str(answer))
        command = [sys.executable, "-c", _ISOLATED_PROGRAM, *texts]
        done = subprocess.run(command, env=variables, timeout=timeout_s, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{target} exited with {done.returncode}; see its traceback above")
        return Isolated(**json.loads(answer.read_text()))


def idle_note(
    proc: Path = Path("/proc"),
    interval_s: float = 0.5,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Empty on an idle machine; else what keeps it busy, for a row's note, also sent to stderr.

    Busy means that in `interval_s`, while this process sleeps, more than 15 % of one core was in
    use. The load average is told but decides nothing: it remembers the run before this one.
    """
    before = (proc / "stat").read_text()
    sleep(interval_s)
    cores = _cores_in_use(before, (proc / "stat").read_text())
    if cores <= _BUSY_CORES:
        return ""
    load = (proc / "loadavg").read_text().split()[0]
    note = f"not idle: {cores:.2f} cores in use before the run, load {load}"
    print(f"warning: {note}", file=sys.stderr)
    return note


def _cores_in_use(before: str, after: str) -> float:
    """Between two readings of /proc/stat; what waits for a disk is idle, a stolen core in use."""
    first, last = (map(int, text.split("\n")[0].split()[1:9]) for text in (before, after))
    spent = [end - start for start, end in zip(first, last, strict=True)]
    idle = spent[3] + spent[4]  # user nice system idle iowait irq softirq steal: proc(5)
    num_cores = len(re.findall(r"^cpu\d", after, re.MULTILINE))
    return num_cores * (sum(spent) - idle) / max(1, sum(spent))


def environment() -> dict[str, str]:
    """The columns of a row that tell where it was measured: no host, no user, no path.

    machine: processor, cores this process may use, CUDA devices. commit: "+dirty" where anything
    but results.csv and Markdown files differs from it; "unknown" outside a checkout. date: UTC.
    """
    return {
        "machine": _machine(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _machine() -> str:
    cpu = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    parts = [cpu[0] if cpu else platform.machine(), f"{len(os.sched_getaffinity(0))} cores"]
    if torch.cuda.is_available():
        parts += [torch.cuda.get_device_name(d) for d in range(torch.cuda.device_count())]
    return ", ".join(parts)


def _commit() -> str:
    unlike = ("status", "--porcelain", "--", ":/", ":(exclude)*results.csv", ":(exclude)*.md")
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return f"{commit}+dirty" if _git(*unlike) else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def stats_rows(
    stats: Mapping[str, Stats], *, metric: str = "step time", **common: object
) -> list[dict[str, object]]:
    """Two rows per candidate of `compare`: its time (`metric`, ms) and "peak memory" (MiB).

    common: the other columns: benchmark, case, threads, device, config.
    """
    rows: list[dict[str, object]] = []
    for name, one in stats.items():
        timed = {"value": one.median_ms, "p20": one.p20_ms, "p80": one.p80_ms, "n": one.n}
        shared = common | {"candidate": name}
        rows.append(shared | {"metric": metric, "unit": "ms"} | timed | {"note": one.note})
        note = f"{one.peak_kind}, above the start"
        held = {"unit": "MiB", "value": one.peak_mib, "n": 1, "note": note}
        rows.append(shared | {"metric": "peak memory"} | held)
    return rows


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a results.csv, in its order; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Put `rows` into the results.csv at `path`, each in the place of the row with its key, if any.

    The key is (benchmark, case, candidate, metric, machine): what else tells two rows apart
    (threads, batch, device) belongs in `case`. `environment` is filled in, other columns that a
    row lacks stay empty, figures keep six digits, `config` becomes JSON.

    Raises:
        KeyError: a column of the key is missing.
        ValueError: a column that is not in COLUMNS, or an absolute path in a cell.
    """
    here = environment()
    new = [_cells({**here, **row}) for row in rows]
    merged = {_key(row): row for row in [*read_rows(path), *new]}
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(merged.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".partial").write_text(text.getvalue())
    path.with_suffix(".partial").replace(path)


def _cells(row: Mapping[str, object]) -> dict[str, str]:
    cells = {column: _cell(value) for column, value in row.items()}
    for column, cell in cells.items():
        if _ABSOLUTE_PATH.search(cell):
            raise ValueError(f"column {column} holds a path of this machine, {cell!r}; name it")
    return cells


def _cell(value: object) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value, sort_keys=True)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows to stderr for a person; what a note warns of stands there already."""
    columns = ("case", "candidate", "metric", "value", "unit", "p20", "p80", "n")
    shown = Table(*columns)
    for row in rows:
        shown.add_row(*(_cell(row.get(column, "")) for column in columns))
    Console(stderr=True, markup=False).print(shown)
