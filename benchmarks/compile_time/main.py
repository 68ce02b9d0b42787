"""Time and memory of a compilation: `python benchmarks/compile_time/main.py [--quick]`.

`scpl compile torchvision:resnet50 --stages 4`, with and without verification, each in a process of
its own. Memory is the peak above what the imports hold, in units of the model's parameters; beside
it stands eager's own forward and backward at the batch size of verification, measured alike.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torchvision  # noqa: E402

import scpl_compile.api  # noqa: E402
import scpl_compile.cli  # noqa: E402, F401
from benchmarks.measure import Isolated, run_isolated, table, write_rows  # noqa: E402

SHAPE = (3, 224, 224)
VERIFY_BATCH = 3


def compile_model(model: str, verify: bool) -> int:
    """Bytes of the parameters of what was compiled."""
    with tempfile.TemporaryDirectory() as directory:
        program = scpl_compile.api.compile_model(
            f"torchvision:{model}", "x".join(map(str, SHAPE)), num_classes=1000, num_stages=4,
            out=Path(directory) / "out", verify=verify,
        )  # fmt: skip
        return sum(p.nbytes for p in program.model.parameters())


def eager(model: str) -> int:
    """One forward and backward of the model, as verification runs them."""
    module = getattr(torchvision.models, model)(weights=None)
    module(torch.randn(VERIFY_BATCH, *SHAPE)).sum().backward()
    return sum(p.nbytes for p in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run each, nothing written")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for model in ("resnet18",) if options.quick else ("resnet18", "resnet50"):
        rows += run_case(model, 1 if options.quick else 3)
    table(rows)
    if not options.quick:
        write_rows(Path(__file__).with_name("results.csv"), rows)


def run_case(model: str, repeats: int) -> list[dict[str, object]]:
    """The rows of one model: the median run of each candidate."""
    name = "benchmarks.compile_time.main"
    jobs = {
        "with verification": (f"{name}:compile_model", {"model": model, "verify": True}),
        "--no-verify": (f"{name}:compile_model", {"model": model, "verify": False}),
        "eager forward and backward": (f"{name}:eager", {"model": model}),
    }
    common = {
        "benchmark": "compile_time",
        "case": model,
        "threads": 2,
        "device": "cpu",
        "config": {"stages": 4, "input": list(SHAPE), "verify_batch": VERIFY_BATCH},
    }
    rows: list[dict[str, object]] = []
    for candidate, (target, arguments) in jobs.items():
        runs = [run_isolated(target, arguments, threads=2) for _ in range(repeats)]
        rows += _rows(common | {"candidate": candidate, "n": repeats}, runs)
    return rows


def _rows(shared: dict[str, object], runs: list[Isolated]) -> list[dict[str, object]]:
    seconds = sorted(run.seconds for run in runs)
    median = sorted(runs, key=lambda run: run.peak_mib)[len(runs) // 2]
    above = median.peak_mib - median.base_mib
    parameters = int(median.value) / 2**20
    return [
        shared | {"metric": "time", "unit": "s", "value": seconds[len(seconds) // 2],
                  "p20": seconds[0], "p80": seconds[-1]},
        shared | {"metric": "peak memory above the imports", "unit": "MiB", "value": above},
        shared | {"metric": "the same", "unit": "x parameters", "value": above / parameters},
    ]  # fmt: skip


if __name__ == "__main__":
    main()
