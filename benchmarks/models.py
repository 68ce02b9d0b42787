"""The models of the benchmarks and of some tests. B: batch, C: classes, T: tokens, D: width.

    balanced_cnn      (B, 3, 32, 32)                → (B, 10)    stages of equal cost
    paper_net         (B, 1, 28, 28)                → (B, 10)    the accuracy study's net
    small_vit         (B, 3, 32, 32)                → (B, 10)    attention on image patches
    text_lstm         ids (B, T), mask (B, T)       → (B, C)     a cut crosses state and mask
    text_transformer  ids (B, T), mask (B, T)       → (B, C)     blocks in a loop, dropout

All pass torch.fx.symbolic_trace. A mask is int64, 1 where the token counts; every row of it has
at least one 1.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["balanced_cnn", "paper_net", "small_vit", "text_lstm", "text_transformer"]


def balanced_cnn(
    num_stages: int = 2, blocks_per_stage: int = 3, width: int = 64, num_classes: int = 10
) -> nn.Sequential:
    """A CNN whose `num_stages` equal runs of blocks cost the same: (B, 3, H, W) → (B, num_classes).

    A 2x2 convolution with stride 2, then num_stages x blocks_per_stage blocks conv3x3-BN-ReLU that
    all map (B, width, H/2, W/2) to itself, then global average pooling and a linear layer. H and W
    are even; 32x32 is meant, a larger image makes all stages dearer. At 32x32 and B = 128 a
    training step of the default took 0.32 s on one core at 2.6 GHz.

    The stem stays as it was drawn: were it trained, the first stage alone would compute a gradient
    of its first block's input, a third of a block more than any other stage.
    """
    stem = nn.Conv2d(3, width, 2, stride=2).requires_grad_(False)
    num_blocks = num_stages * blocks_per_stage
    return nn.Sequential(
        OrderedDict(
            [
                ("stem", stem),
                *((f"block{index}", _conv_block(width, width)) for index in range(num_blocks)),
                ("pool", nn.AdaptiveAvgPool2d(1)),
                ("flatten", nn.Flatten()),
                ("classifier", nn.Linear(width, num_classes)),
            ]
        )
    )


def _conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class _PaperNet(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.part1 = nn.Sequential(_conv_block(1, 32), _conv_block(32, 32), nn.MaxPool2d(2))
        self.part2 = nn.Sequential(_conv_block(32, 64), nn.MaxPool2d(2))
        self.part3 = nn.Sequential(_conv_block(64, 96), nn.MaxPool2d(2))
        self.part4 = _conv_block(96, 128)
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.part1(x)
        x = self.part2(x)
        x = self.part3(x)
        x = self.part4(x)
        logits: Tensor = self.classifier(x)
        return logits


def paper_net(num_classes: int = 10) -> nn.Module:
    """The small VGG-style net of the accuracy study: (B, 1, 28, 28) → (B, num_classes).

    Four parts of 3x3 convolutions with BN and ReLU, channels 32-32 | 64 | 96 | 128. The first three
    end in 2x2 max pooling: (B, 32, 14, 14), (B, 64, 7, 7), (B, 96, 3, 3), (B, 128, 3, 3).
    `classifier` pools globally and is linear.
    """
    return _PaperNet(num_classes)


class _Attention(nn.Module):
    """Self-attention without a mask: (B, T, D) → (B, T, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return projected


def _mlp(width: int, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
    )


class _VitBlock(nn.Module):
    """A pre-norm encoder block: (B, T, D) → (B, T, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class _Vit(nn.Module):
    def __init__(
        self, image_size: int, patch: int, width: int, depth: int, num_heads: int, num_classes: int
    ) -> None:
        super().__init__()
        num_patches = (image_size // patch) ** 2
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, num_patches, width))
        self.blocks = nn.Sequential(*(_VitBlock(width, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        x = self.norm(self.blocks(x))
        logits: Tensor = self.classifier(x.mean(dim=1))
        return logits


def small_vit(
    image_size: int = 32,
    patch: int = 4,
    width: int = 192,
    depth: int = 6,
    num_heads: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """A Vision Transformer: (B, 3, image_size, image_size) → (B, num_classes).

    Patches by a convolution and learned positions give (B, (image_size/patch)², width), which
    `depth` pre-norm blocks in one nn.Sequential keep; then LayerNorm, mean over patches, linear.
    `patch` divides image_size, num_heads divides width.
    """
    return _Vit(image_size, patch, width, depth, num_heads, num_classes)


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (B, T, D) over the tokens that mask (B, T) counts: (B, D)."""
    weights = mask.unsqueeze(-1).to(x.dtype)
    return (x * weights).sum(dim=1) / weights.sum(dim=1)


class _TextLSTM(nn.Module):
    def __init__(self, vocabulary: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm1 = nn.LSTM(width, width, batch_first=True)
        self.lstm2 = nn.LSTM(width, width, batch_first=True)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x, (h, c) = self.lstm1(self.embedding(ids))
        x, _ = self.lstm2(x, (h, c))
        logits: Tensor = self.classifier(_masked_mean(x, mask))
        return logits


def text_lstm(vocabulary: int = 1000, width: int = 64, num_classes: int = 4) -> nn.Module:
    """Two LSTMs, the second starting in the first's last state: → (B, num_classes).

    ids: int64 (B, T), below `vocabulary`. mask: int64 (B, T), 1 where the token counts.
    Between the LSTMs cross (B, T, width), h and c, both (1, B, width), and the mask, which the
    mean over tokens needs.
    """
    return _TextLSTM(vocabulary, width, num_classes)


class _TextBlock(nn.Module):
    """A pre-norm encoder block: x (B, T, D), is_padding bool (B, T) → (B, T, D)."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _mlp(width, dropout)

    def forward(self, x: Tensor, is_padding: Tensor) -> Tensor:
        y = self.norm1(x)
        y, _ = self.attention(y, y, y, key_padding_mask=is_padding, need_weights=False)
        x = x + self.dropout(y)
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class _TextTransformer(nn.Module):
    def __init__(
        self, vocabulary: int, max_tokens: int, width: int, num_heads: int, num_classes: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(max_tokens, width))
        self.blocks = nn.ModuleList(_TextBlock(width, num_heads, 0.1) for _ in range(4))
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        is_padding = mask == 0
        for block in self.blocks:
            x = block(x, is_padding)
        logits: Tensor = self.classifier(_masked_mean(x, mask))
        return logits


def text_transformer(
    vocabulary: int = 1000,
    max_tokens: int = 128,
    width: int = 64,
    num_heads: int = 4,
    num_classes: int = 4,
) -> nn.Module:
    """Four pre-norm encoder blocks with dropout 0.1 over embedded tokens: → (B, num_classes).

    ids: int64 (B, T), below `vocabulary`, T at most `max_tokens`. mask: int64 (B, T), 1 where the
    token counts; attention and the final mean leave the others out. num_heads divides width.
    """
    return _TextTransformer(vocabulary, max_tokens, width, num_heads, num_classes)
