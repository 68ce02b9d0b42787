"""Two ranks over links of 10 Gbit/s, 1 Gbit/s and 200 Mbit/s: `python benchmarks/links/main.py`.

Needs root, Linux and iproute2: two network namespaces on this machine, joined by a virtual cable
whose rate is limited, stand for two hosts. Each rank has a core of its own.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import Stats, stats_rows, table, write_rows  # noqa: E402
from benchmarks.ranks.launch import Case, Host, compile_case, run_case  # noqa: E402
from benchmarks.ranks.main import ON_RANKS  # noqa: E402
from scpl_compile.runtime.program import read_plan  # noqa: E402

ALONE = ("stage 0 alone", "stage 1 alone")
NO_LINK = "loopback"
LINKS: dict[str, float] = {"10 Gbit/s": 10e9, "1 Gbit/s": 1e9, "200 Mbit/s": 200e6}
"""Bits per second."""

CASES: dict[str, tuple[Case, int]] = {
    "balanced_cnn": (
        Case(
            model="benchmarks.models:balanced_cnn", inputs="3x32x32", num_classes=10,
            batch_size=32, steps=100, split_at=("block2",), options={"head": "mlp"},
        ),
        3,
    ),
    "vit_22m": (
        Case(
            model="benchmarks.models:small_vit", inputs="3x32x32", num_classes=10, batch_size=16,
            steps=10, config={"width": 384, "depth": 12, "num_heads": 6},
        ),
        2,
    ),
}  # fmt: skip
"""Each with its timed calls, long enough that filling the pipeline is a small part of them. The
second has 21.3 million parameters, which DDP's link carries."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two timed calls, nothing written")
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--link", choices=[NO_LINK, *LINKS], action="append")
    options = parser.parse_args()
    for name in options.case or CASES:
        case, repeats = CASES[name]
        rows = measure(name, case, 2 if options.quick else repeats, options.link)
        table(rows)
        if not options.quick:
            write_rows(Path(__file__).with_name("results.csv"), rows)


def measure(
    name: str, case: Case, repeats: int, links: list[str] | None
) -> list[dict[str, object]]:
    """The rows of one model on every link."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        programs = compile_case(case, Path(folder))
        plan = read_plan(programs["scpl"])
        crossing = sum(c.meta.nbytes for c in plan.cuts[0].crossings)
        million = sum(stage.num_parameters for stage in plan.stages) / 1e6
        config = {"batch": case.batch_size, "crossing_mb": crossing / 1e6,
                  "million_parameters_with_heads": million, **case.config}  # fmt: skip
        unlimited: float | None = None
        for link in links or [NO_LINK, *LINKS]:
            with two_hosts(LINKS.get(link)) as host:
                stats = run_case(case, programs, (*ON_RANKS, *ALONE), repeats=repeats, host=host)
            common: dict[str, Any] = {
                "benchmark": "links", "case": f"{name}, {link}", "threads": 1, "device": "cpu",
                "config": config,
            }  # fmt: skip
            timed = stats_rows(stats, **common)
            rows += [row for row in timed if row["metric"] != "peak memory"]
            if link == NO_LINK:
                unlimited = share_of_slower_stage(stats)
            rows += ratio_rows(stats, unlimited, crossing, LINKS.get(link), common)
    return rows


def share_of_slower_stage(stats: dict[str, Stats]) -> float:
    """The rate of stream over that of the slower stage alone, in the same run."""
    return max(stats[key].median_ms for key in ALONE) / stats["stream"].median_ms


def ratio_rows(
    stats: dict[str, Stats],
    unlimited: float | None,
    crossing: int,
    rate: float | None,
    common: dict[str, Any],
) -> list[dict[str, object]]:
    """What stream loses against no limit, and how much of a step the transfer takes.

    Each link is a run of its own and the machine's speed moves between runs, so what is compared
    is each run's share of the slower stage. unlimited: that share without a limit.
    """
    ms = {key: one.median_ms for key, one in stats.items()}
    slower = max(ms[key] for key in ALONE)
    share = share_of_slower_stage(stats)
    ratios = {"stream's share of the slower stage's rate": share}
    if unlimited is not None and rate is not None:
        ratios["stream's share of its rate without a limit"] = share / unlimited
    if rate is not None:
        ratios["transfer over the slower stage's time"] = 8e3 * crossing / rate / slower
    for other in ("bp", "gpipe", "1f1b", "ddp"):
        ratios[f"stream over {other}"] = ms[other] / ms["stream"]
    shared = common | {"metric": "ratio of medians", "unit": "x", "n": stats["stream"].n}
    return [shared | {"candidate": key, "value": value} for key, value in ratios.items()]


@contextmanager
def two_hosts(rate: float | None) -> Iterator[Host]:
    """Two namespaces with a cable of `rate` bits per second between them; None: this host."""
    if rate is None:
        yield Host()
        return
    try:
        for host in (0, 1):
            _ip(f"netns add scpl{host}")
        _ip("link add scplv0 netns scpl0 type veth peer name scplv1 netns scpl1")
        for host in (0, 1):
            space, device = f"-n scpl{host}", f"scplv{host}"
            _ip(f"{space} addr add 10.77.0.{host + 1}/24 dev {device}")
            _ip(f"{space} link set {device} up")
            _ip(f"{space} link set lo up")
            limit = f"tbf rate {rate / 1e6:.0f}mbit burst 1mb latency 50ms"
            _run(f"ip netns exec scpl{host} tc qdisc replace dev {device} root {limit}")
        yield Host(
            address="10.77.0.1",
            prefix=lambda rank: ["ip", "netns", "exec", f"scpl{rank}"],
            environment=lambda rank: {"GLOO_SOCKET_IFNAME": f"scplv{rank}"},
        )
    finally:
        for host in (0, 1):
            subprocess.run(["ip", "netns", "del", f"scpl{host}"], check=False, capture_output=True)


def _ip(arguments: str) -> None:
    _run(f"ip {arguments}")


def _run(command: str) -> None:
    done = subprocess.run(command.split(), check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{command!r} failed ({done.stderr.strip()}); this benchmark needs root and iproute2"
        )


if __name__ == "__main__":
    main()
