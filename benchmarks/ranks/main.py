"""Two ranks, one core each, beside what one would use instead: `python benchmarks/ranks/main.py`.

Throughput: four models, every schedule on the same two ranks. Step sizes: a small transformer whose
steps take 3 to 200 ms, on ranks, on threads, and one stage after another in one process.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import Stats, stats_rows, table, write_rows  # noqa: E402
from benchmarks.ranks.launch import Case, compile_case, run_case  # noqa: E402

ON_RANKS = ("stream", "bp", "gpipe", "1f1b", "ddp")
BESIDE = ("one process: bp, 2 threads", "stage 0 alone", "stage 1 alone",
          "both stages, nothing sent")  # fmt: skip
ENGINES = ("stream", "threads: stream", "one process: sequential", "stage 0 alone",
           "stage 1 alone")  # fmt: skip

_TEXT = "ids:int64:64<1000,mask:int64:64<2"

CASES: dict[str, Case] = {
    "balanced_cnn": Case(
        model="benchmarks.models:balanced_cnn", inputs="3x32x32", num_classes=10, batch_size=32,
        steps=100, split_at=("block2",), options={"head": "mlp"},
    ),
    "resnet18": Case(
        model="torchvision:resnet18", inputs="3x64x64", num_classes=10, batch_size=32, steps=30,
    ),
    "small_vit": Case(
        model="benchmarks.models:small_vit", inputs="3x32x32", num_classes=10, batch_size=32,
        steps=30,
    ),
    "text_lstm": Case(
        model="benchmarks.models:text_lstm", inputs=_TEXT, num_classes=4, batch_size=64,
        steps=50, config={"width": 128},
    ),
}  # fmt: skip


def _transformer(width: int, batch_size: int, steps: int) -> Case:
    return Case(
        model="benchmarks.models:text_transformer", inputs="ids:int64:32<1000,mask:int64:32<2",
        num_classes=4, batch_size=batch_size, steps=steps, config={"width": width},
    )  # fmt: skip


STEP_SIZES: dict[str, Case] = {
    "transformer, width 32, batch 4": _transformer(32, 4, 200),
    "transformer, width 64, batch 8": _transformer(64, 8, 150),
    "transformer, width 64, batch 16": _transformer(64, 16, 100),
    "transformer, width 128, batch 32": _transformer(128, 32, 30),
    "transformer, width 256, batch 64": _transformer(256, 64, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few repeats, nothing written")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each candidate")
    parser.add_argument("--case", choices=[*CASES, *STEP_SIZES], action="append")
    options = parser.parse_args()
    repeats = 2 if options.quick else options.repeats
    for name, case in (CASES | STEP_SIZES).items():
        if options.case and name not in options.case:
            continue
        rows = measure(name, case, repeats)
        table(rows)
        if not options.quick:
            write_rows(Path(__file__).with_name("results.csv"), rows)


def measure(name: str, case: Case, repeats: int) -> list[dict[str, object]]:
    """The rows of one case: milliseconds per step, and the ratios that are claimed."""
    is_throughput = name in CASES
    with tempfile.TemporaryDirectory() as folder:
        programs = compile_case(case, Path(folder))
        candidates = (*ON_RANKS, *BESIDE) if is_throughput else ENGINES
        stats = run_case(case, programs, candidates, repeats=repeats)
    config = {"batch": case.batch_size, "input": case.inputs, "steps_per_call": case.steps,
              **case.config}  # fmt: skip
    common: dict[str, Any] = {
        "benchmark": "ranks", "case": name, "threads": 1, "device": "cpu", "config": config,
    }  # fmt: skip
    rows = [r for r in stats_rows(stats, **common) if r["metric"] != "peak memory"]
    return [*rows, *ratio_rows(stats, common, is_throughput)]


def ratio_rows(
    stats: dict[str, Stats], common: dict[str, Any], is_throughput: bool
) -> list[dict[str, object]]:
    """How much faster stream on ranks is than the others, and its share of what is possible."""
    ms = {name: one.median_ms for name, one in stats.items()}
    slower = max(ms["stage 0 alone"], ms["stage 1 alone"])
    ratios = {"stream's share of the slower stage's rate": slower / ms["stream"]}
    if is_throughput:
        together = ms["both stages, nothing sent"]
        ratios["stream's share of the rate of both stages at once"] = together / ms["stream"]
        ratios["stream over naive bp"] = ms["bp"] / ms["stream"]
        ratios["stream over the better of gpipe and 1f1b"] = (
            min(ms["gpipe"], ms["1f1b"]) / ms["stream"]
        )
        ratios["stream over ddp"] = ms["ddp"] / ms["stream"]
    else:
        ratios["stream over sequential"] = ms["one process: sequential"] / ms["stream"]
        ratios["threads' stream over sequential"] = (
            ms["one process: sequential"] / ms["threads: stream"]
        )
    shared = common | {"metric": "ratio of medians", "unit": "x", "n": stats["stream"].n}
    return [shared | {"candidate": key, "value": value} for key, value in ratios.items()]


if __name__ == "__main__":
    main()
