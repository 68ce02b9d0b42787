"""How many models of three libraries compile: `python benchmarks/coverage/main.py [--family F]`.

Every model of zoo.py is compiled into 2 and into 4 stages and verified, in a process of its own
with a time limit. A model that has a row of this commit in results.csv is skipped, so a run that
was stopped goes on where it was; each row is written when it is known.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from multiprocessing import get_context, set_forkserver_preload
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.coverage.one import NUM_STAGES, answer  # noqa: E402
from benchmarks.coverage.results import (  # noqa: E402
    Row,
    as_row,
    plot,
    print_summary,
    read,
    write,
    write_report,
)
from benchmarks.coverage.zoo import FAMILIES, ZOO, Entry  # noqa: E402
from benchmarks.measure import environment  # noqa: E402

__all__ = ["run_entry"]

FOLDER = Path(__file__).resolve().parent
_PRELOAD = ["benchmarks.coverage.one", "torchvision.models", "timm", "transformers.modeling_utils",
            "torch._dynamo"]  # fmt: skip
_LIBRARIES = ("torchvision", "timm", "transformers")


def run_entry(entry: Entry, options: argparse.Namespace, common: dict[str, str]) -> Row:
    """The row of one model, compiled in a process of its own."""
    limit_s = options.patience * entry.time_limit_s
    context = get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    work = (entry.name, (4,) if options.quick else NUM_STAGES, options.threads, sender)
    process = context.Process(target=answer, args=work, daemon=True)
    process.start()
    sender.close()  # so that the end of the process ends the wait
    found = {"family": entry.family, "model": entry.name, "outcomes": {}}
    try:
        if receiver.poll(limit_s):
            found = json.loads(receiver.recv())
        else:
            found |= {"error": f"no answer within {limit_s:.0f} s", "error_type": "timeout"}
    except EOFError:
        process.join()
        found |= {"error": f"the process died ({process.exitcode})", "error_type": "crash"}
    process.kill()
    process.join()
    return as_row(found, common)


def run_entries(
    entries: list[Entry], options: argparse.Namespace, common: dict[str, str]
) -> Iterator[Row]:
    """Rows as they become known. The imports, which do not count, are done once, in a process that
    does nothing else and is copied for every model.
    """
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.threads)}
    os.environ["HF_HUB_OFFLINE"] = "1"
    set_forkserver_preload(_PRELOAD)
    with ThreadPoolExecutor(options.workers) as pool:
        jobs = [pool.submit(run_entry, entry, options, common) for entry in entries]
        try:
            for job in as_completed(jobs):
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)


def main() -> None:
    options = _options()
    path: Path = options.results
    common = _common(options.threads)
    known = read(path)
    if not options.report:
        entries = [e for e in _chosen(options) if options.again or not _is_done(e, known, common)]
        for count, row in enumerate(run_entries(entries, options, common)):
            known = read(path) | {(row["model"], row["machine"]): row}
            write(path, known.values())
            _say(f"{count + 1}/{len(entries)}", row)
    rows = [row for row in known.values() if row["machine"] == common["machine"]]
    rows = [row for row in rows if row["model"] in {entry.name for entry in _chosen(options)}]
    print_summary(rows)
    if options.report:
        plot(rows, FOLDER / "time.png")
        write_report(FOLDER / "README.md", rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the names in zoo.py")
    parser.add_argument("--again", action="store_true", help="also what has a row of this commit")
    parser.add_argument("--workers", type=int, default=1, help="models at the same time")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--patience", type=float, default=1, help="factor of the time limits")
    parser.add_argument("--quick", action="store_true", help="K = 4 only, written to --results")
    parser.add_argument("--results", type=Path, default=FOLDER / "results.csv")
    parser.add_argument("--report", action="store_true", help="run nothing: plot, README")
    options = parser.parse_args()
    if options.quick and options.results.parent == FOLDER:
        parser.error("--quick needs --results elsewhere")
    return options


def _chosen(options: argparse.Namespace) -> list[Entry]:
    families = options.family or FAMILIES
    return [e for e in ZOO.values() if e.family in families and re.search(options.only, e.name)]


def _is_done(entry: Entry, known: dict[tuple[str, str], Row], common: dict[str, str]) -> bool:
    row = known.get((entry.name, common["machine"]))
    return row is not None and row["commit"] == common["commit"]


def _common(threads: int) -> dict[str, str]:
    here = environment()
    versions = [f"torch {here['torch']}", *(f"{name} {version(name)}" for name in _LIBRARIES)]
    return {
        "machine": here["machine"],
        "versions": ", ".join([*versions, f"python {here['python']}"]),
        "commit": here["commit"],
        "date": here["date"],
        "threads": str(threads),
    }


def _say(place: str, row: Row) -> None:
    facts = f"{row['ratio_2']:>6} {row['ratio_4']:>6} {row['seconds']:>6} s"
    mark = "ok" if row["counts"] == "yes" else "NO"
    print(f"{place:>8} {mark} {facts} {row['model']:40} {row['error'][:150]}", file=sys.stderr)


if __name__ == "__main__":
    main()
