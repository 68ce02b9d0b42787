"""Streaming over batches against one stage after another, bit for bit:
`python benchmarks/exactness/main.py [--quick]`.

Every case is trained `STEPS` steps by each schedule from the same start; then all that a stage
owns is compared: parameters, both kinds of buffers, the optimizer's state, the random state, and
the losses of every step. Between any two actions each worker sleeps for a random time that is
another in each repeat, so that the stages meet in many orders. tests/test_exactness.py runs the
same cases with fewer repeats.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import table, write_rows  # noqa: E402
from benchmarks.models import balanced_cnn, text_transformer  # noqa: E402
from scpl_compile import Program, compile_model  # noqa: E402
from scpl_compile.actions import Action, stage_actions  # noqa: E402
from scpl_compile.runtime.engine import Event  # noqa: E402
from scpl_compile.sources import example_inputs  # noqa: E402

__all__ = ["CASES", "Case", "Outcome", "differences", "overlaps", "run", "small_net"]

STEPS = 20
NUM_CLASSES = 4
Batches = list[tuple[tuple[Tensor, ...], Tensor]]

# ---------------------------------------------------------------------- the small net


class _Lstm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, num_layers=2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        return x + y


class _Attention(nn.Module):
    """Self-attention whose dropout is an argument of a function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        dropout = 0.3 if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return x + y.squeeze(1)


class _Deep(nn.Module):
    """A residual block that is left out for some samples."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from torchvision.ops import StochasticDepth

        self.linear = nn.Linear(width, width)
        self.drop = StochasticDepth(0.3, "row")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(F.relu(self.linear(x)))


class _Checkpointed(nn.Module):
    """A block whose backward runs its forward, with its dropout, a second time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return x + y


class _Centered(nn.Module):
    """Batch norm over samples and tokens, and a running mean that no checkpoint file has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("center", torch.zeros(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.center.lerp_(x.mean((0, 1)), 0.1)
        y: Tensor = self.norm(self.linear(x - self.center).transpose(1, 2))
        return x + y.transpose(1, 2)


class _SmallNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.3), nn.ReLU())
        self.lstm = _Lstm(width)
        self.attention = _Attention(width)
        self.deep = _Deep(width)
        self.checkpointed = _Checkpointed(width)
        self.centered = _Centered(width)
        self.classifier = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lstm(self.embed(x))
        x = self.deep(self.attention(x))
        x = self.centered(self.checkpointed(x))
        logits: Tensor = self.classifier(x.mean(dim=1))
        return logits


SMALL_CUTS = ("embed", "lstm", "attention", "deep", "checkpointed")


def small_net(width: int = 8) -> nn.Module:
    """Everything that draws randomness or keeps state, in milliseconds: (B, T, width) → (B, 4).

    Six parts, each after one of `SMALL_CUTS`: nn.Dropout, LSTM with dropout, attention with
    dropout, stochastic depth, activation checkpointing with dropout inside, batch norm with a
    non-persistent buffer.
    """
    return _SmallNet(width)


# ---------------------------------------------------------------------- cases


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model with its inputs; views: inputs per label; repeats: of the benchmark."""

    build: Callable[[], nn.Module]
    inputs: str
    batch_size: int
    num_classes: int = NUM_CLASSES
    views: int = 1
    repeats: int = 5

    def compile(self, num_stages: int, **options: Any) -> Program:
        """The program in `num_stages` stages of one thread each."""
        torch.manual_seed(0)
        return compile_model(
            self.build(), self.inputs, num_classes=self.num_classes, num_stages=num_stages,
            batch_size=max(2, self.batch_size), threads_per_stage=1, **options,
        )  # fmt: skip

    def batches(self, program: Program, sizes: Sequence[int]) -> Batches:
        """One batch per size: random inputs, labels of several classes."""
        found: Batches = []
        for seed, size in enumerate(sizes):
            labels = torch.randint(
                self.num_classes, (size,), generator=torch.Generator().manual_seed(seed)
            )
            labels[:2] = torch.arange(2)[:size]  # one class alone would be warned of
            found.append((example_inputs(program.plan.inputs, self.views * size, seed), labels))
        return found


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


# The middle two are what benchmarks/throughput measures.
CASES = {
    "small_net": Case(build=small_net, inputs="4x8", batch_size=6, repeats=50),
    "balanced_cnn": Case(build=balanced_cnn, inputs="3x32x32", batch_size=16, num_classes=10),
    "resnet18": Case(build=_resnet18, inputs="3x32x32", batch_size=8, num_classes=10),
    "text_transformer": Case(
        build=lambda: text_transformer(vocabulary=50, width=32),
        inputs="ids:int64:12<50,mask:int64:12<2",
        batch_size=8,
        repeats=50,
    ),
}

# ---------------------------------------------------------------------- running and comparing


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All that a run leaves: per stage its state (name -> bytes) and losses, and the events."""

    states: list[dict[str, bytes]]
    losses: list[list[tuple[int, dict[str, float]]]]
    events: tuple[Event, ...]


def run(
    program: Program,
    batches: Batches,
    schedule: str,
    *,
    jitter: int | None = None,
    trainer: Callable[..., Any] | None = None,
    **options: Any,
) -> Outcome:
    """Train on `batches`, one step each.

    jitter: seed of random sleeps between the actions; None: none.
    trainer: what makes the trainer; default: program.trainer. options: go to it.
    """
    if jitter is not None:
        num_stages = program.plan.num_stages
        options["actions"] = [
            _jittered(stage_actions(schedule, k, num_stages), Random(f"{jitter} {k}"))
            for k in range(num_stages)
        ]
    make = trainer or program.trainer
    with make(schedule=schedule, record_events=True, **options) as trained:
        for inputs, labels in batches:
            trained.step(inputs, labels)
        trained.drain()
        states = [_bytes(*stage.state()) for stage in trained._stages]
        return Outcome(states=states, losses=trained.take_losses(), events=trained.events)


def _jittered(actions: Iterator[Action], random: Random) -> Iterator[Action]:
    for action in actions:
        if random.random() < 0.3:
            time.sleep(1e-3 * random.random())
        yield action


def _bytes(tensors: dict[str, Tensor], values: dict[str, Any]) -> dict[str, bytes]:
    state = {name: value.numpy().tobytes() for name, value in tensors.items()}
    return state | {name: repr(value).encode() for name, value in values.items()}


def differences(a: Outcome, b: Outcome) -> list[str]:
    """What differs between two runs in any bit: "stage 1 module.lstm.weight_hh_l0", …"""
    found = []
    for k, (one, other) in enumerate(zip(a.states, b.states, strict=True)):
        names = sorted(one.keys() | other.keys())
        found += [f"stage {k} {name}" for name in names if one.get(name) != other.get(name)]
    for k, (rows, others) in enumerate(zip(a.losses, b.losses, strict=True)):
        if rows != others:
            found.append(f"stage {k} losses")
    return found


def overlaps(events: Sequence[Event]) -> list[tuple[Action, Action]]:
    """Pairs of backward passes of different stages that ran at the same time.

    Backward alone: a forward that draws may spend its time waiting for the generator.
    """
    backward = sorted((e for e in events if e.action.kind == "B"), key=lambda e: e.start_ns)
    return [
        (one.action, other.action)
        for i, one in enumerate(backward)
        for other in backward[i + 1 :]
        if other.start_ns < one.end_ns and other.action.stage != one.action.stage
    ]


# ---------------------------------------------------------------------- the benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few repeats, nothing written")
    parser.add_argument("--case", choices=CASES, action="append")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for name in options.case or CASES:
        for num_stages in (2, 4):
            repeats = 1 if options.quick else CASES[name].repeats
            rows += run_case(name, num_stages, repeats)
    table(rows)
    if not options.quick:
        write_rows(Path(__file__).with_name("results.csv"), rows)


def run_case(name: str, num_stages: int, repeats: int) -> list[dict[str, object]]:
    """How many repeats of stream and in_step differ from sequential, and how often B met B."""
    case = CASES[name]
    program = case.compile(num_stages)
    batches = case.batches(program, [case.batch_size] * STEPS)
    expected = run(program, batches, "sequential")
    common: dict[str, Any] = {
        "benchmark": "exactness", "case": f"{name}, {num_stages} stages", "threads": 1,
        "device": "cpu", "n": repeats, "config": {"batch": case.batch_size, "steps": STEPS},
    }  # fmt: skip
    rows = []
    for schedule in ("stream", "in_step"):
        outcomes = [run(program, batches, schedule, jitter=seed) for seed in range(repeats)]
        differing = sum(bool(differences(outcome, expected)) for outcome in outcomes)
        met = sum(len(overlaps(outcome.events)) for outcome in outcomes) / repeats
        shared = common | {"candidate": f"{schedule} against sequential"}
        rows.append(shared | {"metric": "runs that differ", "unit": "runs", "value": differing})
        rows.append(
            shared | {"metric": "backward passes side by side", "unit": "pairs/run", "value": met}
        )
    return rows


if __name__ == "__main__":
    main()
