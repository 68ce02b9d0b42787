"""The methods on real data: `python benchmarks/accuracy/main.py [--workers 2] [--only TEXT ...]`.

Four models, seven methods, two and four stages, three seeds; every run is some rows of results.csv,
and one whose rows are there is not repeated: stop it and start it as you like. In this order:

    main.py --costs     parameters, FLOPs and memory of every method     (minutes)
    main.py --times     a training step on two ranks, machine idle       (minutes)
    main.py             all runs at equal epochs, then at equal time     (hours)
    main.py --variants  what was tried for the default, by the validation split
    main.py --report    tables and pictures, from results.csv

--only keeps the runs whose name or candidate has TEXT. --full-width: the released widths, one run
at a time, for a machine with GPUs. The sentences come from sentences.py.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.accuracy import report  # noqa: E402
from benchmarks.accuracy.cases import METHODS, VARIANTS, Case, at_equal_time, cases  # noqa: E402
from benchmarks.accuracy.step_times import step_time_rows, time_share  # noqa: E402
from benchmarks.accuracy.training import cost_rows, train_rows  # noqa: E402
from benchmarks.measure import read_rows, table, write_rows  # noqa: E402

RESULTS = Path(__file__).with_name("results.csv")
Work = Callable[[Case], list[dict[str, object]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--full-width", action="store_true")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--seed", type=int, action="append", help="default: 0, 1, 2")
    parser.add_argument("--only", action="append", default=[], help="in the run's name")
    options = parser.parse_args()
    if options.report:
        report.write(RESULTS)
        return
    seeds = tuple(options.seed or (0, 1, 2))
    chosen = VARIANTS if options.variants else METHODS
    all_cases = cases(chosen, seeds=seeds, is_full_width=options.full_width)
    wanted = [
        case for case in all_cases
        if all(text in f"{case.name}, {case.candidate}" for text in options.only)
    ]  # fmt: skip
    if options.costs or options.times:
        firsts = [case for case in wanted if case.seed == seeds[0]]
        pairs = [case for case in firsts if case.num_stages == 2] if options.times else firsts
        work, metric = (
            (step_time_rows, "step time") if options.times else (cost_rows, "peak memory")
        )
        run_all(work, pairs, metric, 1)
        return
    run_all(train_rows, wanted, "test accuracy", options.workers)
    if not options.variants:
        run_all(train_rows, list(equal_time(wanted)), "test accuracy", options.workers)


def equal_time(wanted: Iterable[Case]) -> Iterable[Case]:
    """The runs of two stages again, each with the time that bp takes; where times were taken."""
    rows = read_rows(RESULTS)
    for case in wanted:
        share = time_share(rows, case)
        if share is not None and case.num_stages == 2 and case.candidate != "bp":
            yield at_equal_time(case, share)


def run_all(work: Work, wanted: Iterable[Case], metric: str, workers: int) -> None:
    """Every case that has no row of this metric yet; each one's rows are written when it ends."""
    done = {(row["case"], row["candidate"]) for row in read_rows(RESULTS) if row["metric"] == metric}
    left = [case for case in wanted if (case.name, case.candidate) not in done]
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=8) as pool:
        futures = {pool.submit(work, case): case for case in left}
        for number, future in enumerate(as_completed(futures), 1):
            rows = future.result()
            write_rows(RESULTS, rows)
            table([row for row in rows if "epoch" not in str(row["metric"])])
            print(json.dumps({"done": number, "of": len(left)}), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
