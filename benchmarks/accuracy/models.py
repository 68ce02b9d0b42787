"""The four models of the paper, at a width that two cores can train.

    vgg8, resnet18       (B, 1, 28, 28)              → (B, num_classes)
    lstm, transformer    ids (B, T), mask (B, T)     → (B, num_classes)

`width` scales all of them: 128 gives the released VGG8, 64 the released ResNet-18, 300 the text
models. Here it is a quarter of the former two. A mask is int64, 1 where the token counts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["lstm", "resnet18", "transformer", "vgg8"]


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def vgg8(width: int = 32, num_classes: int = 10) -> nn.Sequential:
    """Six convolutions 1-2 | 2-4 | 4 | 4 (times `width`), pooled after each group; two layers."""
    layers: list[nn.Module] = []
    channels = 1
    for group in ((1, 2), (2, 4), (4,), (4,)):
        for multiple in group:
            wider = multiple * width
            layers += [_conv(channels, wider), nn.BatchNorm2d(wider), nn.ReLU()]
            channels = wider
        layers.append(nn.MaxPool2d(2))
    hidden = 2500 * width // 128
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(channels, hidden), nn.Sigmoid(),
        nn.Linear(hidden, num_classes),
    )  # fmt: skip


class _Block(nn.Module):
    """Two convolutions beside a shortcut: (B, C, H, W) → (B, out_channels, H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, out_channels, stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv(out_channels, out_channels)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18(width: int = 16, num_classes: int = 10) -> nn.Sequential:
    """A 3x3 stem and eight residual blocks of width 1-1-2-2-4-4-8-8 (times `width`)."""
    layers: list[nn.Module] = [_conv(1, width), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for multiple in (1, 2, 4, 8):
        for index in range(2):
            stride = 2 if multiple > 1 and index == 0 else 1
            layers.append(_Block(channels, multiple * width, stride))
            channels = multiple * width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
    )


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(x.dtype)
    return (x * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class _LSTM(nn.Module):
    def __init__(self, vocabulary: int, width: int, depth: int, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(depth))
        self.classifier = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, num_classes)
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids)
        state = None
        for layer in self.layers:
            x, state = layer(x, state)
        logits: Tensor = self.classifier(_masked_mean(x, mask))
        return logits


def lstm(
    vocabulary: int = 8000, width: int = 128, depth: int = 4, num_classes: int = 2
) -> nn.Module:
    """`depth` LSTMs, each starting in the last state of the one before, and the masked mean."""
    return _LSTM(vocabulary, width, depth, num_classes)


class _Encoder(nn.Module):
    """A pre-norm encoder block, dropout 0.1: x (B, T, D), is_padding bool (B, T) → (B, T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, dropout=0.1, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, width)
        )
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, is_padding: Tensor) -> Tensor:
        y = self.norm1(x)
        y, _ = self.attention(y, y, y, key_padding_mask=is_padding, need_weights=False)
        x = x + self.dropout(y)
        mixed: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return mixed


class _Transformer(nn.Module):
    def __init__(self, vocabulary: int, width: int, depth: int, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(256, width))
        self.blocks = nn.ModuleList(_Encoder(width) for _ in range(depth))
        self.classifier = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, num_classes)
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        is_padding = mask == 0
        for block in self.blocks:
            x = block(x, is_padding)
        logits: Tensor = self.classifier(_masked_mean(x, mask))
        return logits


def transformer(
    vocabulary: int = 8000, width: int = 128, depth: int = 4, num_classes: int = 2
) -> nn.Module:
    """`depth` encoder blocks (a feed-forward part as wide as the model) and the masked mean.

    Unlike the released one it knows positions (at most 256 tokens).
    """
    return _Transformer(vocabulary, width, depth, num_classes)
