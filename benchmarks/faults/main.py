"""Ranks that are killed, and what checkpoints cost: `python benchmarks/faults/main.py`.

kills: each of two ranks is killed (SIGKILL) ten times, at random steps, under torchrun
--max-restarts; the final weights are compared with those of a run that nobody has disturbed.
cost: a run with a checkpoint every 50 steps beside the same without, in turn.
soak: --soak MINUTES of streaming, on two ranks and in one process; resident memory and queue fill.
link: --link cuts the link between two hosts (links/main.py makes them; needs root).
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.faults.link import link_rows  # noqa: E402
from benchmarks.measure import table, write_rows  # noqa: E402
from scpl_compile import compile_model  # noqa: E402
from scpl_compile.runtime.checkpoint import load_tensors  # noqa: E402

KILLS, STEPS, SAVE_EVERY = 10, 120, 10
ENGINES = ("ranks", "threads")
KILLER = Path(__file__).with_name("killer.py")
COMMON = {"benchmark": "faults", "threads": 1, "device": "cpu"}
TRAINING = ("--data", "random:4096", "--batch-size", "32", "--log-every", "10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two kills, one repeat, no rows")
    parser.add_argument("--soak", type=float, default=0.0, help="minutes, instead of the others")
    parser.add_argument("--engine", choices=ENGINES, action="append", help="of the soak")
    parser.add_argument("--link", action="store_true", help="a cut link, instead of the others")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program")
        compile_model(
            "benchmarks.models:balanced_cnn", "3x32x32", num_classes=10, num_stages=2,
            batch_size=32, threads_per_stage=1, out=program,
        )  # fmt: skip
        if options.soak:
            rows = [row for engine in options.engine or ENGINES
                    for row in soak(program, engine, 60 * options.soak)]  # fmt: skip
        elif options.link:
            rows = link_rows(program, TRAINING)
        else:
            rows = kill_rows(program, 2 if options.quick else KILLS)
            rows += cost_rows(program, 1 if options.quick else 5)
    table(rows)
    if not options.quick:
        write_rows(Path(__file__).with_name("results.csv"), rows)


def torchrun(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", "--monitor-interval", "0.1"]  # fmt: skip
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    return subprocess.Popen(
        [*command, *map(str, arguments)], env=variables, text=True, stderr=subprocess.PIPE
    )


def ended(process: subprocess.Popen[str]) -> str:
    """What it told, once it has ended well."""
    _, told = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"a run ended with {process.returncode}:\n{told}")
    return told


# ---------------------------------------------------------------------- kills


def kill_rows(program: Path, count: int) -> list[dict[str, object]]:
    """For each rank: whether the weights are those of the undisturbed run, and what it cost."""
    training = (*TRAINING, "--steps", STEPS, "--save-every", SAVE_EVERY)
    ended(torchrun(program / "train.py", *training, "--run-dir", "whole"))
    rows = []
    for rank in (0, 1):
        draws = random.Random(rank)
        steps = sorted(draws.sample(range(1, STEPS - 1), count))
        run = f"killed-{rank}"
        told = ended(
            torchrun(
                "--max-restarts", count, KILLER, program / "train.py", *training, "--run-dir", run,
                KILLS=json.dumps([(rank, step) for step in steps]),
            )
        )  # fmt: skip
        resumed = len(re.findall(r"^resumed after step", told, re.MULTILINE))
        case = f"rank {rank} killed {count} times in {STEPS} steps"
        facts = {
            "weights that differ": float(differing(program / "whole", program / run)),
            "restarts from a checkpoint": float(resumed),
        }
        rows += [
            {**COMMON, "case": case, "candidate": "torchrun --max-restarts", "metric": metric,
             "unit": "", "value": value, "n": 1, "config": {"killed_at": steps}}
            for metric, value in facts.items()
        ]  # fmt: skip
    return rows


def differing(one: Path, other: Path) -> int:
    """How many tensors of two runs are not the same bits."""
    left, right = (load_tensors(run / "final.safetensors")[0] for run in (one, other))
    assert left.keys() == right.keys()
    return sum(not left[name].equal(right[name]) for name in left)


# ---------------------------------------------------------------------- cost of checkpoints


def cost_rows(program: Path, repeats: int) -> list[dict[str, object]]:
    """Samples per second with a checkpoint every 50 steps and without, on ranks, in turn."""
    rates: dict[str, list[float]] = {"without": [], "every 50 steps": []}
    for repeat in range(repeats):
        for name, save_every in (("without", 0), ("every 50 steps", 50)):
            training = (*TRAINING, "--steps", 300, "--save-every", save_every)
            run = f"cost-{name.replace(' ', '-')}-{repeat}"
            ended(torchrun(program / "train.py", *training, "--run-dir", run))
            result = json.loads((program / run / "result.json").read_text())
            rates[name].append(result["samples_per_second"])
    medians = {name: statistics.median(values) for name, values in rates.items()}
    shared = {**COMMON, "case": "balanced_cnn, 2 ranks, batch 32", "n": repeats}
    rows: list[dict[str, object]] = [
        {**shared, "candidate": f"checkpoints {name}", "metric": "rate", "unit": "samples/s",
         "value": value}
        for name, value in medians.items()
    ]  # fmt: skip
    pairs = zip(rates["every 50 steps"], rates["without"], strict=True)
    cost = 100 * (1 - statistics.median(one / other for one, other in pairs))
    return [*rows, {**shared, "candidate": "checkpoints every 50 steps", "metric": "cost",
                    "unit": "%", "value": cost}]  # fmt: skip


# ---------------------------------------------------------------------- soak


def soak(program: Path, engine: str, seconds: float) -> list[dict[str, object]]:
    """Resident memory of all processes and the queues' fill, after warm-up and at the end."""
    training = ("--data", "random:4096", "--batch-size", "32", "--epochs", 10**6, "--log-every",
                "50", "--save-every", "200", "--run-dir", f"soak-{engine}")  # fmt: skip
    if engine == "ranks":
        process = torchrun(program / "train.py", *training)
    else:
        process = subprocess.Popen(
            [sys.executable, str(program / "train.py"), "--engine", "threads", *map(str, training)],
            text=True, stderr=subprocess.PIPE,
        )  # fmt: skip
    try:
        memory = watched(process.pid, seconds)
    finally:
        process.terminate()
        process.communicate()
    return soak_rows(engine, memory, queue_fill(program / f"soak-{engine}"), seconds)


def watched(pid: int, seconds: float) -> list[float]:
    """MiB resident, every 5 seconds."""
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(5.0, seconds / 20))
        found.append(sum(resident_mib(one) for one in family(pid)))
    return found


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in family(int(child)))]


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def queue_fill(run: Path) -> list[float]:
    """Of the last stage, in every row that tells it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["queue_fill"][-1] for row in rows if "queue_fill" in row]


def soak_rows(
    engine: str, memory: Sequence[float], fill: Sequence[float], seconds: float
) -> list[dict[str, object]]:
    tenth, fills = max(1, len(memory) // 10), max(1, len(fill) // 10)
    early, late = statistics.median(memory[tenth : 2 * tenth]), statistics.median(memory[-tenth:])
    facts = [
        ("resident after warm-up", "MiB", early),
        ("resident at the end", "MiB", late),
        ("growth", "%", 100 * (late / early - 1)),
        ("queue fill after warm-up", "", statistics.mean(fill[fills : 2 * fills])),
        ("queue fill at the end", "", statistics.mean(fill[-fills:])),
    ]
    case = f"{seconds / 60:g} minutes, {engine}"
    return [
        {**COMMON, "case": case, "candidate": "stream", "metric": metric, "unit": unit,
         "value": value, "n": len(memory)}
        for metric, unit, value in facts
    ]  # fmt: skip


if __name__ == "__main__":
    main()
