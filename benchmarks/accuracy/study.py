"""Accuracy on Fashion-MNIST: `python benchmarks/accuracy/study.py [--study] [--seed S ...]`.

The small VGG-style net (benchmarks.models:paper_net) in the four stages of its four parts, Adam
1e-3 with a cosine to 1e-5, 2 epochs, no augmentation.

Without --study: the default, the released algorithm (--preset paper), Early Exit and plain
backpropagation; float32, schedule `stream`, batch 128 (the default of an emitted program); the test
split is read once, after training.

--study: the heads that the default was chosen from, by accuracy on the validation split; batch 256,
one thread, bfloat16 autocast, stages one after another, so that it ends in a bearable time.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.measure import table, write_rows  # noqa: E402
from benchmarks.models import paper_net  # noqa: E402
from scpl_compile import Program, Trainer, compile_model  # noqa: E402
from scpl_compile.ir import Scalar  # noqa: E402
from scpl_compile.runtime.data import Loader  # noqa: E402
from scpl_compile.runtime.datasets import open_splits  # noqa: E402

EPOCHS = 2
PARTS = ("part1", "part2", "part3")


def conv(**options: Scalar) -> dict[str, Scalar]:
    """A convolutional head with a linear projection of 64."""
    return {"head": "conv", "hidden": 0, "out": 64, **options}


NARROW = conv(conv_size=8, stride=2, channel_multiplier=2.0, channel_limit=96, pooling="avg:2")
STUDY: Mapping[str, tuple[str, str, dict[str, Scalar]]] = {
    "backpropagation": ("bp", "default", {}),
    "released (paper)": ("scpl", "paper", {}),
    "released, last stage through": ("scpl", "paper", {"last": "through"}),
    "mlp avg:4": ("scpl", "default", {"head": "mlp", "pooling": "avg:4", "hidden": 128, "out": 64}),
    "mlp avg:4, contrast alone": (
        "scpl",
        "default",
        {"head": "mlp", "pooling": "avg:4", "hidden": 128, "out": 64, "cross_entropy": 0.0},
    ),
    "conv 8, x2 up to 96, avg:2": ("scpl", "default", NARROW),
    "conv 8, x2 up to 96, avg:2, contrast 0.3": ("scpl", "default", {**NARROW, "contrast": 0.3}),
    "conv 8, x2 up to 96, avg:2, no contrast": (
        "early_exit", "default", {key: value for key, value in NARROW.items() if key != "out"},
    ),
    "conv 8, x2 up to 96, avg:2, released last stage": (
        "scpl", "default", {**NARROW, "last": "released"},
    ),
    "conv 7, x1 up to 96, avg:4": (
        "scpl", "default",
        conv(conv_size=7, stride=2, channel_multiplier=1.0, channel_limit=96, pooling="avg:4"),
    ),
    "conv 8, x1.5 up to 96, avg:4": (
        "scpl", "default",
        conv(conv_size=8, stride=2, channel_multiplier=1.5, channel_limit=96, pooling="avg:4"),
    ),
    "conv 4 stride 1, x1 up to 128, avg:2": (
        "scpl", "default",
        conv(conv_size=4, stride=1, channel_multiplier=1.0, channel_limit=128, pooling="avg:2"),
    ),
}  # fmt: skip
CLAIM: Mapping[str, tuple[str, str, dict[str, Scalar]]] = {
    "default": ("scpl", "default", {}),
    "released (paper)": ("scpl", "paper", {}),
    "early_exit": ("early_exit", "default", {}),
    "backpropagation": ("bp", "default", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--study", action="store_true", help="compare heads on the validation split"
    )
    parser.add_argument("--seed", type=int, action="append", help="default: 0, 1, 2")
    parser.add_argument("--only", action="append", help="these candidates")
    options = parser.parse_args()
    candidates = STUDY if options.study else CLAIM
    for seed in options.seed or (0, 1, 2):
        for name in options.only or candidates:
            rows = run(name, candidates[name], seed, options.study)
            table(rows)
            write_rows(Path(__file__).with_name("results.csv"), rows)


def run(
    name: str, candidate: tuple[str, str, dict[str, Scalar]], seed: int, is_study: bool
) -> list[dict[str, object]]:
    """The rows of one training run."""
    method, preset, options = candidate
    batch_size = 256 if is_study else 128
    torch.manual_seed(seed)
    program = compile_model(
        paper_net(),
        torch.zeros(batch_size, 1, 28, 28),
        num_classes=10,
        split_at=PARTS,
        method=method,
        preset=preset,
        options=options,
        threads_per_stage=1,
        verify=not is_study,
    )
    loader = Loader(
        open_splits("fashion-mnist"),
        inputs=program.plan.inputs,
        num_classes=10,
        batch_size=batch_size,
        seed=seed,
    )
    start = time.perf_counter()
    accuracy = train(program, loader, seed, is_study)
    seconds = time.perf_counter() - start
    common = {
        "benchmark": "accuracy",
        "candidate": name,
        "threads": 1,
        "device": "cpu",
        "n": 1,
        "case": f"{'head study, ' if is_study else ''}seed {seed}",
        "config": {
            "epochs": EPOCHS,
            "batch": batch_size,
            "method": method,
            "preset": preset,
            **options,
            "precision": "bfloat16 autocast" if is_study else "float32",
        },
    }
    split = "validation" if is_study else "test"
    return [
        common | {"metric": f"{split} accuracy", "unit": "%", "value": 100 * accuracy},
        common | {"metric": "training time", "unit": "s", "value": seconds},
    ]


def train(program: Program, loader: Loader, seed: int, is_study: bool) -> float:
    """Accuracy after training: on the validation split in the study, else on the test split."""
    schedule = (
        program.plan.schedule if program.plan.method == "bp" or not is_study else "sequential"
    )
    with program.trainer(
        seed=seed,
        schedule=schedule,
        lr_schedule="cosine",
        total_steps=EPOCHS * loader.num_batches,
    ) as trainer:
        if is_study:
            trainer = _in_bfloat16(trainer)
        for epoch in range(EPOCHS):
            for batch in loader.epoch(epoch):
                trainer.step(batch.inputs, batch.labels)
        return trainer.evaluate(loader.evaluation("validation" if is_study else "test")).accuracy


def _in_bfloat16(trainer: Trainer) -> Trainer:
    """The same trainer, every stage's forward under autocast."""
    for stage in trainer._stages:
        step = stage._training_step

        def training_step(*inputs: object, step: object = step, **labels: object) -> object:
            with torch.autocast("cpu", torch.bfloat16):
                sent, losses = step(*inputs, **labels)  # type: ignore[operator]
            return tuple(value.float() for value in sent), losses

        stage._training_step = training_step
    return trainer


if __name__ == "__main__":
    main()
