"""Small models, one for each thing that emitted code must get right, and how they are compiled."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scpl_compile.api import Program, compile_model

NUM_CLASSES = 4


class ResidualBlock(nn.Module):
    """A cut in its middle is crossed by the branch and by the skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        y = self.norm2(self.conv2(self.relu(y)))
        return torch.relu(x + y)


class NestedCnn(nn.Module):
    """Blocks in a container: (B, 3, 8, 8) to (B, 4)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.layers = nn.Sequential(ResidualBlock(width), ResidualBlock(width))
        self.fc = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.stem(x))
        return self.fc(x.mean((2, 3)))


class UNet(nn.Module):
    """The first map is read again by the last stage: (B, 1, 8, 8) to (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 4, 3, padding=1)
        self.middle = nn.Sequential(
            nn.Conv2d(4, 4, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 4, 2, stride=2),
        )
        self.up = nn.Conv2d(8, 4, 3, padding=1)
        self.fc = nn.Linear(4, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.down(x))
        y = self.middle(skip)
        y = self.up(torch.cat([y, skip], dim=1))
        batch, channels, _, _ = y.shape
        return self.fc(y.view(batch, channels, -1).amax(2))


class LstmClassifier(nn.Module):
    """Output, both states and the mask cross: ids and mask (B, 5) to (B, 4)."""

    def __init__(self, vocabulary: int = 11, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm1 = nn.LSTM(width, width, batch_first=True)
        self.lstm2 = nn.LSTM(width, width, batch_first=True)
        self.fc = nn.Linear(width, NUM_CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x, (h, c) = self.lstm1(self.embedding(ids))
        x, _ = self.lstm2(x, (h, c))
        weights = mask.unsqueeze(-1).to(x.dtype)
        return self.fc((x * weights).sum(1) / weights.sum(1))


class EncoderBlock(nn.Module):
    """Attention over the unmasked tokens, with dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1))

    def forward(self, x: Tensor, is_padding: Tensor) -> Tensor:
        y = self.norm(x)
        y, _ = self.attention(y, y, y, key_padding_mask=is_padding, need_weights=False)
        x = x + y
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Blocks in a list, each of which reads the mask: ids and mask (B, 5) to (B, 4)."""

    def __init__(self, vocabulary: int = 11, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(EncoderBlock(width) for _ in range(3))
        self.fc = nn.Linear(width, NUM_CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids)
        is_padding = mask == 0
        for block in self.blocks:
            x = block(x, is_padding)
        weights = mask.unsqueeze(-1).to(x.dtype)
        return self.fc((x * weights).sum(1) / weights.sum(1))


class ClassToken(nn.Module):
    """A parameter of the model's own is expanded to the batch: (B, 1, 8, 8) to (B, 4)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(3)
        )
        self.fc = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], dim=1)
        for block in self.blocks:
            x = x + block(x.mean(1, keepdim=True) + x)
        return self.fc(x[:, 0])


class LateInput(nn.Module):
    """The last stage reads a raw input, and begins by writing what it received: (B, 6) twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.gate = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.first(x)
        z = torch.tanh(y)
        y.clamp_(-1, 1)
        y = y * torch.sigmoid(self.gate(context)) + z
        return self.fc(F.relu(self.second(y)))


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A model and the options with which it is compiled."""

    model: str
    inputs: str | None
    split_at: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def compile(self, out: Path | None = None, **options: Any) -> Program:
        """The program, written to `out`."""
        torch.manual_seed(0)
        return compile_model(
            self.model if ":" in self.model else f"golden_models:{self.model}",
            self.inputs, num_classes=NUM_CLASSES, batch_size=8,
            split_at=self.split_at, threads_per_stage=1, out=out, **self.options, **options,
        )  # fmt: skip


GOLDEN: Mapping[str, Golden] = {
    "nested_cnn": Golden(
        model="NestedCnn", inputs="3x8x8", split_at=("layers.0.norm1", "layers.0")
    ),
    "unet": Golden(model="UNet", inputs="1x8x8", split_at=("relu", "middle")),
    "lstm": Golden(
        model="LstmClassifier", inputs="ids:int64:5<11,mask:int64:5<2", split_at=("lstm1",)
    ),
    "transformer": Golden(
        model="Transformer",
        inputs="ids:int64:5<11,mask:int64:5<2",
        split_at=("blocks.0", "blocks.1"),
        options={"preset": "paper"},
    ),
    "class_token": Golden(
        model="ClassToken",
        inputs="1x8x8",
        split_at=("blocks.0", "add_3"),
        options={"method": "early_exit"},
    ),
    "late_input": Golden(
        model="LateInput",
        inputs="x:6,context:6",
        split_at=("tanh",),
        options={"method": "bp"},
    ),
    "paper_cnn": Golden(
        model="NestedCnn",
        inputs="3x8x8",
        split_at=("layers.0",),
        options={"preset": "paper", "options": {"hidden": 16, "out": 32}},
    ),
    # Models that people use: are their programs such as a person would write?
    "resnet50": Golden(model="torchvision:resnet50", inputs="3x32x32", options={"num_stages": 4}),
    "vit_b_16": Golden(
        model="torchvision:vit_b_16",
        inputs="3x32x32",
        options={"config": {"image_size": 32}, "num_stages": 3},
    ),
    "mobilevit": Golden(model="timm:mobilevit_xxs", inputs="3x64x64", options={"num_stages": 2}),
    "bert": Golden(
        model="hf:bert",
        inputs=None,
        options={
            "config": {
                "hidden_size": 32,
                "num_hidden_layers": 6,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "vocab_size": 500,
                "max_position_embeddings": 32,
            },
            "num_stages": 2,
        },
    ),
}

Compile = Callable[[str], Program]
"""The fixture `golden`: a program of GOLDEN by name, compiled once."""
