"""Small models of every shape that the property suites compile, with the inputs that they take.

Milliseconds per step; between them they have skips over a cut, several tensors at a cut, a mask,
batch norm, dropout of every kind, a non-persistent buffer, and a frozen stem.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.exactness.main import small_net
from benchmarks.models import balanced_cnn, text_lstm, text_transformer
from scpl_compile import Program, compile_model
from scpl_compile.sources import example_inputs

NUM_CLASSES = 4
Batch = tuple[tuple[Tensor, ...], Tensor]


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """(B, 3, 16, 16) → (B, 4): two skips pass over the middle of the net."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1 = _conv(3, width)
        self.down2 = _conv(width, 2 * width, stride=2)
        self.middle = _conv(2 * width, 2 * width, stride=2)
        self.up2 = _conv(4 * width, width)
        self.up1 = _conv(2 * width, width)
        self.classifier = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.down1(x)
        x2 = self.down2(x1)
        x3 = self.middle(x2)
        y = self.up2(torch.cat([F.interpolate(x3, scale_factor=2.0), x2], dim=1))
        y = self.up1(torch.cat([F.interpolate(y, scale_factor=2.0), x1], dim=1))
        logits: Tensor = self.classifier(y.mean(dim=(2, 3)))
        return logits


class Unused(nn.Module):
    """(B, 8) → (B, 4), with a layer that forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.second = nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(F.relu(self.first(x)))
        return logits


def transformer_without_dropout() -> nn.Module:
    """The text transformer with every dropout at 0."""
    model = text_transformer(vocabulary=50, width=16)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


OWN_METHOD = f"{Path(__file__).with_name('own_method.py')}:Cosine"
DECOUPLED: dict[str, dict[str, Any]] = {
    "scpl": {},
    "scpl paper": {"preset": "paper"},
    "early_exit": {"method": "early_exit"},
    "early_exit paper": {"method": "early_exit", "preset": "paper"},
    "al": {"method": "al"},
    "predsim": {"method": "predsim"},
    "deinforeg": {"method": "deinforeg"},
    "dascpl": {"method": "dascpl"},
    "own": {"method": OWN_METHOD},
}
"""The methods that stop gradients at the cuts, as options of `compiled`."""

_TEXT = "ids:int64:6<50,mask:int64:6<2"
BUILDERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "cnn": (lambda: balanced_cnn(width=8, num_classes=NUM_CLASSES), "3x8x8"),
    "lstm": (lambda: text_lstm(vocabulary=50, width=16), _TEXT),
    "small_net": (small_net, "4x8"),
    "transformer": (lambda: text_transformer(vocabulary=50, width=16), _TEXT),
    "transformer_without_dropout": (transformer_without_dropout, _TEXT),
    "unet": (UNet, "3x16x16"),
    "unused": (Unused, "8"),
}


@dataclass(frozen=True)
class Compiled:
    """A program with batches for it."""

    program: Program
    batches: list[Batch]


@cache
def compiled(name: str, num_stages: int, **options: Any) -> Compiled:
    """The model `name` in `num_stages` stages of one thread, and 5 batches of 6 samples."""
    build, inputs = BUILDERS[name]
    torch.manual_seed(0)
    program = compile_model(
        build(), inputs, num_classes=NUM_CLASSES, num_stages=num_stages, batch_size=6,
        threads_per_stage=1, **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    batches = [
        (
            example_inputs(program.plan.inputs, 6, seed),
            torch.randperm(6, generator=generator) % NUM_CLASSES,
        )
        for seed in range(5)
    ]
    return Compiled(program, batches)
