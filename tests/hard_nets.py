"""Networks whose wiring is hard to cut, (B, …) → (B, 4) or several outputs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

NUM_CLASSES = 4


class ThreeSkips(nn.Module):
    """A U-Net: (B, 1, 8, 8); three skips pass over the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(i, 4, 3, padding=1) for i in (1, 4, 4))
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(3))
        self.fc = nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        skips = []
        for layer in self.down:
            x = torch.relu(layer(x))
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for layer, skip in zip(self.up, reversed(skips), strict=True):
            x = F.interpolate(x, size=skip.shape[2:])
            x = torch.relu(layer(torch.cat([x, skip], dim=1)))
        return self.fc(x.mean((2, 3)))


class TwoTowers(nn.Module):
    """Two inputs, each with layers of its own, meet at the end: (B, 6), (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.right = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.fc = nn.Linear(16, NUM_CLASSES)

    def forward(self, x, context):
        return self.fc(torch.cat([self.left(x), self.right(context)], 1))


class Recurrent(nn.Module):
    """The state crosses the cut: (B, 5, 6), in (T, B, H) inside."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first = kind(6, 8)
        self.second = kind(8, 8)
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        y, state = self.first(x.transpose(0, 1))
        y, state = self.second(y, state)
        return self.fc(y.mean(0))


class Packed(nn.Module):
    """(B, 5, 6) and lengths (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = PackedEncoder()
        self.mid = nn.Linear(8, 8)
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, x, lengths):
        return self.fc(torch.relu(self.mid(self.encoder(x, lengths))).mean(1))


class PackedEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)

    def forward(self, x, lengths):
        lengths = lengths.clamp(min=1)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = self.lstm(packed)
        return pad_packed_sequence(y, batch_first=True, total_length=5)[0]


class PackedItself(PackedEncoder):
    """The same in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, x, lengths):
        return self.fc(super().forward(x, lengths).mean(1))


class OneTable(nn.Module):
    """An encoder and a decoder that embed with one table: ids (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        table = nn.Embedding(11, 8)
        self.encoder = OneSide(table)
        self.decoder = OneSide(table)
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, ids):
        return self.fc(self.decoder(ids.flip(1), self.encoder(ids, 0.0)).mean(1))


class OneSide(nn.Module):
    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, ids, memory):
        x = self.table(ids) * 2.0 + memory
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


class Encoder(nn.Module):
    """torch's own encoder with a padding mask: ids (B, 5)."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, ids):
        padding = ids == 0
        x = self.embedding(ids) + self.position[: ids.shape[1]]
        x = self.encoder(x, src_key_padding_mask=padding)
        return self.fc(x.masked_fill(padding.unsqueeze(-1), 0.0).sum(1))


class Attention(nn.Module):
    """Self-attention whose weights are used as well: (B, 5, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.second = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        x = self.first(x)
        y, weights = self.attention(x, x, x)
        y, _ = self.second(y, x, y + weights.sum(-1, keepdim=True))
        return self.fc(y.mean(1))


class PositionCrosses(nn.Module):
    """One position table is made at the start and added in every layer: ids (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.positions = nn.Embedding(5, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, ids):
        positions = self.positions(torch.arange(ids.shape[1], device=ids.device))
        x = self.words(ids)
        for layer in self.layers:
            x = torch.relu(layer(x + positions))
        return self.fc(x.mean(1))


class Expanded(nn.Module):
    """The same with a table that is expanded to the batch, which can cross a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6))
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.fc = nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        table = self.table.expand(x.shape[0], -1)
        for layer in self.layers:
            x = torch.relu(layer(x + table))
        return self.fc(x)


class BufferCrosses(nn.Module):
    """A view of a buffer, and one of the input, are read on both sides: (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(6))
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.fc = nn.Linear(3, NUM_CLASSES)

    def forward(self, x):
        scale = self.scale[:3].expand(x.size(0), 3)
        left, right = x[:, :3], x[:, 3:]
        for layer in self.layers:
            left = torch.relu(layer(left * scale)) + right
        return self.fc(left)


class Transposed(nn.Module):
    """What crosses is a transposed view, and what comes next is in place: (B, 4, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(4, 4)
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        y = self.first(x).transpose(1, 2)
        y.clamp_(-1, 1)
        y += 0.5
        return self.fc(self.second(y).mean(2))


class InPlaceFirst(nn.Module):
    """The first thing after the cut writes what it received, which is read again: (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        y = self.layers[0](x)
        z = y.tanh()
        self.relu(y)
        y = self.layers[1](y) + y + z
        y[:, 0] = 0
        return self.fc(self.layers[2](y))


class SkipsAStage(nn.Module):
    """The first value is read by the last layer, and the input by all: (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.fc = nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        first = y = self.layers[0](x)
        for layer in self.layers[1:]:
            y = torch.relu(layer(y)) + x
        return self.fc(y * torch.sigmoid(first))


class TiedEnds(nn.Module):
    """ids (B, 5) → (B, 11): the weight of the embedding is the head's."""

    def __init__(self, depth: int = 2, is_cuttable: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.after = nn.Linear(11, NUM_CLASSES) if is_cuttable else nn.Identity()

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.after(self.head(x.mean(1)))


class Shared(nn.Module):
    """One layer between all others: (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.fc = nn.Linear(6, NUM_CLASSES)
        self.mid = nn.Linear(6, 6)

    def forward(self, x):
        x = torch.relu(self.shared(x))
        x = torch.relu(self.shared(x + 1))
        return self.fc(torch.relu(self.mid(x)))


class EarlyOutputs(nn.Module):
    """An auxiliary output is made long before the logits: (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.early = nn.Linear(6, 3)
        self.fc = nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        x = torch.relu(self.layers[0](x))
        early = self.early(x)
        for layer in self.layers[1:]:
            x = torch.relu(layer(x))
        return {"early": early, "logits": self.fc(x)}


class NoMeta(nn.Module):
    """Its constructor looks at data, so it cannot be built on the meta device: (B, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.depth = 2 + int(torch.rand(3).sum().item() * 0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(self.depth))
        self.fc = nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.fc(x)


def frozen_stem() -> nn.Module:
    model = SkipsAStage()
    model.layers[0].requires_grad_(False)
    return model


def double() -> nn.Module:
    return SkipsAStage().double()


class OddNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("a-b", "class", "1x", "x y"):
            self.add_module(name, nn.Linear(6, 6))
        self.fc = nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        for name in ("a-b", "class", "1x", "x y"):
            x = torch.relu(getattr(self, name)(x))
        return self.fc(x)


class DepthByInput(nn.Module):
    """As many steps as the input is long; the layer is the same: (B, 5, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(6, 8)
        self.norm = nn.BatchNorm1d(8, momentum=None)
        self.mid = nn.Linear(8, 8)
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        state: Tensor = x.new_zeros(x.shape[0], 8)
        for t in range(x.size(1)):
            state = self.cell(x[:, t], state)
        return self.fc(torch.relu(self.mid(self.norm(state))))
