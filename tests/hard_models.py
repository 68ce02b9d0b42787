"""Constructs that a compiler could lose.

A construct is a `Part`, a module (B, 6) → (B, 6). It stands in the middle of a small network as a
submodule, and as code of the network's own forward.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

NUM_CLASSES = 4


class Part(nn.Module):
    """(B, 6) → (B, 6); `step` has the construct."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def step(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x)


class Autocast(Part):
    def step(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return y.float()


class NoGrad(Part):
    def step(self, x):
        y = self.linear(x)
        with torch.no_grad():
            scale = y.abs().amax()
        return y / (1 + scale)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class CustomFunction(Part):
    def step(self, x):
        return StraightThrough.apply(self.linear(x))


class Checkpointed(Part):
    def step(self, x):
        return checkpoint(self.linear, x, use_reentrant=False)


class FunctionalDropout(Part):
    def step(self, x):
        return F.dropout(self.linear(x), 0.3, training=self.training)


class TrainingBranch(Part):
    def step(self, x):
        y = self.linear(x)
        if self.training:
            y = y * 1.5
        return y


class LayerDrop(Part):
    def step(self, x):
        if self.training and random.random() < 0.0:
            return x
        return self.linear(x)


class NumpyNoise(Part):
    def step(self, x):
        return self.linear(x) * (1 + float(np.random.rand()))


class DataBranch(Part):
    def step(self, x):
        y = self.linear(x)
        return y if y.sum() > 0 else y * 2


class DataScale(Part):
    def step(self, x):
        y = self.linear(x)
        return y * (1 + abs(float(y.mean())))


class BatchBranch(Part):
    def step(self, x):
        return self.linear(x) * (2.0 if x.shape[0] > 4 else 1.0)


class BatchLoop(Part):
    def step(self, x):
        return torch.stack([self.linear(row) for row in x])


class BatchScale(Part):
    def step(self, x):
        y = self.linear(x)
        return y.view(y.size(0) * 2, -1).view(y.shape[0], -1) * y.shape[0] ** -0.5


class SizeLoop(Part):
    def step(self, x):
        y = self.linear(x)
        for i in range(x.shape[1]):
            y = y + x[:, i : i + 1] * i
        return y


class Routing(Part):
    def step(self, x):
        y = self.linear(x)
        rows = (x[:, 0] > 0).nonzero().squeeze(1)
        return y.index_add(0, rows, y[rows])


class MakesSure(Part):
    """Code that only makes sure of something, and a size that depends on data."""

    def step(self, x):
        assert x.abs().max().item() < 1e6, "too large"
        if (x != x).any():
            raise ValueError("not a number")
        rows = x[x[:, 0] > -1e6]
        torch._check(rows.shape[0] >= 1)
        return self.linear(rows.view(x.size(0), -1))


class KeepsTable(Part):
    """A plain tensor that is kept again on whatever device the input is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.rand(6)

    def step(self, x):
        self.table = self.table.to(x.device)
        return self.linear(x) + self.table


class CountsInPlainTensor(Part):
    """A plain tensor that is written through a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(6)

    def step(self, x):
        self.seen[:3].add_(1.0)
        return self.linear(x) + self.seen * 0.01


class Rank(Part):
    """How many dimensions a tensor has depends on data."""

    def step(self, x):
        rows = (x[:, 0] > 0).nonzero().squeeze()
        if rows.dim() == 0:
            rows = rows.unsqueeze(0)
        return self.linear(x) + x[rows].sum(0)


class Rows(Part):
    """How many tensors there are depends on data."""

    def step(self, x):
        y = self.linear(x)
        for row in x[x[:, 0] > 0]:
            y = y + row
        return y


class NoGradBlock(Part):
    """A module of several, called under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def step(self, x):
        with torch.no_grad():
            target = self.teacher(x)
        return self.linear(x) * target


class NoGradInPlace(Part):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def step(self, x):
        y = self.linear(x) * 1.0
        with torch.no_grad():
            self.relu(y)
        return y


class TensorOrNumber(Part):
    """An argument that is a tensor in one mode and a number in the other."""

    def step(self, x):
        return torch.add(self.linear(x), x if self.training else 0.0)


class Siamese(Part):
    """One stem with a batch norm, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))

    def step(self, x):
        return self.stem(self.linear(x)) + self.stem(x * 2) + self.stem(x + 1)


class Recovers(Part):
    """An assertion that the model itself catches."""

    def step(self, x):
        y = self.linear(x)
        try:
            assert x.max() < 1, "too large"
        except AssertionError:
            y = y / 2
        return y


class AnyOf(Part):
    """A claim of which no single answer is one."""

    def step(self, x):
        assert any((column > -9).all() for column in (x[:, 0], x[:, 1]))
        return self.linear(x)


class SliceAssignment(Part):
    def step(self, x):
        y = self.linear(x)
        y[:, 0] = x[:, 1] * 2
        y[:, 2:4] += 1
        return y


class Views(Part):
    def step(self, x):
        y = self.linear(x)
        part = y[:, :3]
        part *= 2
        return y + 1 - part.sum(1, keepdim=True)


class Aliases(Part):
    """Dropout gives its argument back in evaluation, so the write is seen through both names."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def step(self, x):
        y = self.linear(x)
        z = self.dropout(y)
        y += 1
        return y * z


class AssignsData(Part):
    def step(self, x):
        y = self.linear(x)
        y.data = y.data + 1
        return y


class Swapped(Part):
    def step(self, x):
        y = self.linear(x)
        return (1 - y) + 2 / (y.abs() + 1) + 2 ** y.tanh() + y.matmul(torch.eye(6))


class Fourier(Part):
    def step(self, x):
        spectrum = torch.fft.rfft(self.linear(x), dim=1)
        return torch.fft.irfft(spectrum * torch.view_as_complex(torch.ones(4, 2)), n=6)


class Padded(Part):
    def step(self, x):
        y = F.pad(self.linear(x), (1, 1))
        return y.view(y.shape[0], 2, -1).flatten(1)[:, 1:-1]


class CountsCalls(Part):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def step(self, x):
        self.calls += 1
        return self.linear(x)


class KeepsLast(Part):
    def __init__(self) -> None:
        super().__init__()
        self.last_seen = None

    def step(self, x):
        y = self.linear(x)
        self.last_seen = y.detach()
        return y


class PlainTensor(Part):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((6,), 2.0)

    def step(self, x):
        return self.linear(x) * self.scale


class MadeInForward(Part):
    def step(self, x):
        return nn.LayerNorm(6, elementwise_affine=False)(nn.ReLU()(self.linear(x)) + x)


class ParametersAsArguments(Part):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(6))

    def step(self, x):
        return F.linear(x, self.linear.weight, self.bias) + self.linear.bias


class Passes(nn.Module):
    """Keywords go through two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def inner(self, x, *, scale, shift=None):
        y = self.linear(x) * scale
        return y if shift is None else y + shift


class Keywords(Part):
    def __init__(self) -> None:
        super().__init__()
        self.passes = Passes()

    def step(self, x):
        options = {"scale": 2.0, "shift": x}
        return self.passes(self.linear(x), **options)


@dataclass
class Result:
    value: Tensor
    extra: Tensor | None = None


class GivesDataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return Result(self.linear(x), extra=x)


class GivesDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, given):
        return {"value": self.linear(given["value"]), "extra": (given["value"], [given["value"]])}


class Dataclasses(Part):
    def __init__(self) -> None:
        super().__init__()
        self.inner = GivesDataclass()

    def step(self, x):
        result = self.inner(self.linear(x))
        return result.value + result.extra


class Dicts(Part):
    def __init__(self) -> None:
        super().__init__()
        self.inner = GivesDict()

    def step(self, x):
        result = self.inner({"value": self.linear(x)})
        return result["value"] + result["extra"][1][0]


class Twice(Part):
    def step(self, x):
        return self.linear(torch.relu(self.linear(x)))


class TrainingOnly(Part):
    """A child that is called in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Linear(6, 6)

    def step(self, x):
        y = self.linear(x)
        return y + self.noise(x) if self.training else y


class WeightNorm(Part):
    def __init__(self) -> None:
        super().__init__()
        self.linear = parametrizations.weight_norm(nn.Linear(6, 6))

    def step(self, x):
        return self.linear(x)


class SpectralNorm(Part):
    def __init__(self) -> None:
        super().__init__()
        self.linear = parametrizations.spectral_norm(nn.Linear(6, 6))

    def step(self, x):
        return self.linear(x)


class CumulativeNorm(Part):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, momentum=None)

    def step(self, x):
        return self.norm(self.linear(x))


class Device(Part):
    def step(self, x):
        mask = torch.ones(x.shape[0], 6, device=x.device, dtype=x.dtype)
        return self.linear(x).to(self.linear.weight.device) * mask


class Hooked(Part):
    def __init__(self) -> None:
        super().__init__()
        self.linear.register_forward_hook(lambda module, args, result: result * 2)

    def step(self, x):
        return self.linear(x)


class AsNet(nn.Module):
    """`part` between two layers of a network."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.part = part
        self.mid = nn.Linear(6, 6)
        self.last = nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        x = self.part(torch.relu(self.first(x)))
        return self.last(torch.relu(self.mid(x)))


def as_submodule(part: type[Part]) -> nn.Module:
    return AsNet(part())


def as_root(part: type[Part]) -> nn.Module:
    """The network whose own forward runs the code of `part`."""

    def __init__(self) -> None:
        part.__init__(self)
        self.first = nn.Linear(6, 6)
        self.mid = nn.Linear(6, 6)
        self.last = nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        x = self.step(torch.relu(self.first(x)))
        return self.last(torch.relu(self.mid(x)))

    made = type(f"{part.__name__}Net", (part,), {"__init__": __init__, "forward": forward})
    return made()
