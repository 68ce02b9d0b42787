"""The methods on real data: `python benchmarks/accuracy/main.py [--workers 2] [--only TEXT ...]`.

Four models, seven methods, two and four stages, three seeds; every run is some rows of results.csv,
and one whose rows are there is not repeated: stop it and start it as you like.

    main.py --costs     parameters, FLOPs and memory of every method     (minutes)
    main.py --times     a training step on two ranks, machine idle       (minutes)
    main.py             all runs at equal epochs, then at equal time     (hours)
    main.py --report    tables and pictures, from results.csv

--group, --only: some of the runs. --full-width: the released widths, one run at a time, for a
machine with GPUs. The sentences come from sentences.py.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.accuracy import report  # noqa: E402
from benchmarks.accuracy.cases import GROUPS, Case, at_equal_time, cases, once  # noqa: E402
from benchmarks.accuracy.step_times import step_time_rows, time_share  # noqa: E402
from benchmarks.accuracy.training import cost_rows, train_rows  # noqa: E402
from benchmarks.measure import read_rows, table, write_rows  # noqa: E402

USUAL = tuple(name for name in GROUPS if name != "variants")
RESULTS = Path(__file__).with_name("results.csv")
Work = Callable[[Case], list[dict[str, object]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for stage in ("costs", "times", "report"):
        parser.add_argument(f"--{stage}", action="store_true")
    parser.add_argument("--full-width", action="store_true")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument(
        "--group", choices=GROUPS, action="append", help="default: all but variants"
    )
    parser.add_argument("--seed", type=int, action="append", help="default: 0, 1, 2")
    parser.add_argument("--only", action="append", default=[], help="TEXT in the run's name")
    options = parser.parse_args()
    if options.report:
        report.write(RESULTS)
        return
    seeds = tuple(options.seed or (0, 1, 2))
    wanted = [
        case
        for group in options.group or USUAL
        for case in cases(GROUPS[group], seeds=seeds, is_full_width=options.full_width)
        if all(text in f"{case.name}, {case.candidate}" for text in options.only)
    ]
    first = [case for case in wanted if case.seed == seeds[0]]
    if options.costs:
        run_all(cost_rows, first, "peak memory", 1)
    elif options.times:
        run_all(step_time_rows, [case for case in first if is_timed(case)], "step time", 1)
    else:
        run_all(train_rows, once(wanted), "test accuracy", options.workers)
        run_all(train_rows, list(equal_time(wanted)), "test accuracy", options.workers)


def is_timed(case: Case) -> bool:
    """Whether its steps are measured on two ranks; those of bp are, beside the default's."""
    is_method = case.candidate in GROUPS["methods"].candidates and case.candidate != "bp"
    return is_method and case.num_stages == 2


def equal_time(wanted: Iterable[Case]) -> Iterator[Case]:
    """The runs of two stages again, each with the time that bp takes; where times were taken."""
    rows = read_rows(RESULTS)
    for case in wanted:
        share = time_share(rows, case)
        if share is not None and is_timed(case):
            yield from at_equal_time(case, share)


def run_all(work: Work, wanted: Iterable[Case], metric: str, workers: int) -> None:
    """Every case that has no row of this metric yet; each one's rows are written when it ends."""
    done = {
        (row["case"], row["candidate"]) for row in read_rows(RESULTS) if row["metric"] == metric
    }
    left = [case for case in wanted if (case.name, case.candidate) not in done]
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch in the workers
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(work, case): case for case in left}
        for number, future in enumerate(as_completed(futures), 1):
            rows = future.result()
            write_rows(RESULTS, rows)
            table([row for row in rows if "," not in str(row["metric"])])
            print(f"{number} of {len(left)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
