"""What tests of runs read of a run directory."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

QUICK = ("--data", "random:64", "--batch-size", "16")  # 4 batches per epoch


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def loss_rows(run: Path) -> dict[tuple[int, int], dict[str, float]]:
    """The losses by (stage, step); every pair once."""
    rows = [row for row in metrics(run) if "stage" in row]
    found = {(row["stage"], row["step"]): row["losses"] for row in rows}
    assert len(found) == len(rows)
    return found


def final(run: Path) -> dict[str, torch.Tensor]:
    """The trained weights."""
    return load_file(run / "final.safetensors")


def same_bits(one: Path, other: Path) -> bool:
    """Whether both runs ended with the same weights and buffers."""
    left, right = final(one), final(other)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def read_scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, of TensorBoard's files."""
    module = import_module("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(directory)).Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }
