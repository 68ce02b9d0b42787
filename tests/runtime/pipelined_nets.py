"""A model whose cuts carry all that torch's pipeline schedules may meet, and programs of it."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scpl_compile.api import compile_model
from scpl_compile.inputs import example_inputs
from scpl_compile.ir import Plan
from scpl_compile.runtime.program import load_stages, load_weights, read_plan, read_verification

BATCH_SIZE, NUM_CLASSES, WIDTH, LENGTH, WORDS = 8, 3, 6, 5, 11
INPUTS = f"ids:int64:{LENGTH}<{WORDS},mask:int64:{LENGTH}<2"
SPLITS = {2: ("side",), 4: ("lift", "side", "lstm")}


class Text(nn.Module):
    """ids and mask (B, LENGTH) int64 to (B, NUM_CLASSES).

    Across the cuts: the mask (integers) and a view of it, `skip` (passed on by the stages between,
    and read twice), `extra` (whose gradient reaches no stage's input, and which is a view) and the
    LSTM's (LENGTH, B, WIDTH).
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.lift = nn.Linear(WIDTH, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.side = nn.Embedding(WORDS, NUM_CLASSES)
        self.lstm = nn.LSTM(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = (self.embed(ids) + self.position) * mask.unsqueeze(-1)
        skip = torch.relu(self.lift(h))
        h = torch.tanh(self.mix(skip))
        extra = self.side(ids).flatten(1)
        columns = mask.unsqueeze(-1)
        y, _ = self.lstm(h.transpose(0, 1))
        y = y + (skip * columns).transpose(0, 1)
        logits: Tensor = self.out(y.mean(0)) + extra.unflatten(1, (LENGTH, -1)).mean(1)
        return logits


class Checkpointed(nn.Module):
    """Two linear layers, the second recomputed in backward."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = Recomputed(use_reentrant)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


class Recomputed(nn.Module):
    """A linear layer under checkpoint()."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.linear = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.linear, x, use_reentrant=self.use_reentrant)
        return y


class Normed(nn.Sequential):
    """Two linear layers and a batch norm."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, NUM_CLASSES)
        )


def compile_bp(
    out: Path,
    name: str,
    inputs: str,
    split_at: Sequence[str],
    method: str = "bp",
    **config: Any,
) -> Path:
    """The program of one of the models above, in `out`."""
    torch.manual_seed(0)
    compile_model(
        f"{__file__}:{name}", inputs, out=out, method=method, split_at=split_at,
        batch_size=BATCH_SIZE, num_classes=NUM_CLASSES, config=config,
    )  # fmt: skip
    return out


def compile_text(out: Path, num_stages: int) -> Path:
    return compile_bp(out, "Text", INPUTS, SPLITS[num_stages])


def load(directory: Path) -> tuple[Plan, ModuleType, nn.Module]:
    """Plan, stages.py, and the model with its first weights."""
    plan = read_plan(directory)
    emitted = load_stages(directory, plan)
    model: nn.Module = emitted.build_model()
    sha256 = read_verification(directory, plan).weights_sha256
    load_weights(model, directory / "weights.safetensors", sha256)
    return plan, emitted, model


def batch(plan: Plan, num_samples: int, seed: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs by name and labels."""
    values = example_inputs(plan.inputs, num_samples, seed=seed)
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(plan.num_classes, (num_samples,), generator=draws)
    return dict(zip((spec.name for spec in plan.inputs), values, strict=True)), labels


def eager(
    model: nn.Module, batches: Sequence[tuple[dict[str, Tensor], Tensor]]
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and the sum of the gradients of the unsplit `model`."""
    losses = []
    for values, labels in batches:
        loss = F.cross_entropy(model(**values), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
