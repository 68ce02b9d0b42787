"""`--preset paper` is the released algorithm, written out here from its description alone.

Four blocks and a predictor (paper.md, section 1). Every block has a head Linear-ReLU-Linear on its
flattened map, 512 wide, 1024 out; the contrastive loss at temperature 0.1; one Adam of its own. The
predictor learns by cross entropy from the last map, whose gradient stops there, and belongs to the
last block's optimizer. In float64, so that nothing but the formula can make a difference.
"""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scpl_compile import Trainer, compile_model

TEMPERATURE = 0.1
LR, LAST_LR = 1e-3, 1e-5
STEPS = 6
CLASSES = 3


class Vgg(nn.Module):
    """Convolutions in four blocks, and the predictor of the released VGG."""

    def __init__(self) -> None:
        super().__init__()
        channels = (1, 4, 6, 6, 8)
        blocks = [
            nn.Sequential(
                nn.Conv2d(channels[i], channels[i + 1], 3, padding=1),
                nn.BatchNorm2d(channels[i + 1]),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
            for i in range(4)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.predictor = nn.Sequential(
            nn.Flatten(), nn.Linear(8, 10), nn.Sigmoid(), nn.Linear(10, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.predictor(self.blocks(x))
        return logits


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def released_loss(features: Tensor, labels: Tensor) -> Tensor:
    """z = f / max(|f|, 1e-12), s = z z' / T; -sum over positives of the log probability among all
    others, divided by the number of samples of that label (the anchor too); the mean of all.
    """
    z = features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)
    s = z @ z.T / TEMPERATURE
    shifted = s - s.max(dim=1, keepdim=True).values.detach()
    others = ~torch.eye(len(z), dtype=torch.bool)
    log_p = shifted - (shifted.exp() * others).sum(dim=1, keepdim=True).log()
    same = labels[:, None] == labels[None, :]
    each = -(log_p * (same & others)).sum(dim=1) / same.sum(dim=1)
    return each.mean()


class Released:
    """The blocks of `model` with the heads' weights of `trainer`; one Adam per block."""

    def __init__(self, model: Vgg, trainer: Trainer) -> None:
        self.blocks = [copy.deepcopy(block) for block in model.blocks]
        self.predictor = copy.deepcopy(model.predictor)
        self.heads = [self._head(stage.module) for stage in trainer._stages]
        groups = [
            [*block.parameters(), *head.parameters()]
            for block, head in zip(self.blocks, self.heads, strict=True)
        ]
        groups[-1] += self.predictor.parameters()
        self.optimizers = [torch.optim.Adam(group, lr=LR) for group in groups]

    @staticmethod
    def _head(stage: nn.Module) -> nn.Sequential:
        first, second = [m for m in stage.local_loss.modules() if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
        return nn.Sequential(copy.deepcopy(first), nn.ReLU(), copy.deepcopy(second))

    def step(self, x: Tensor, labels: Tensor, lr: float) -> list[float]:
        """The summed loss of every block."""
        told = []
        for k, block in enumerate(self.blocks):
            x = block(x)
            loss = released_loss(self.heads[k](x.flatten(1)), labels)
            if k == len(self.blocks) - 1:
                loss = loss + F.cross_entropy(self.predictor(x.detach()), labels)
            optimizer = self.optimizers[k]
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            told.append(float(loss.detach()))
            x = x.detach()
        return told


def batches() -> list[tuple[Tensor, Tensor]]:
    """Some classes have one sample, or none."""
    torch.manual_seed(3)
    sizes = (8, 8, 5, 8, 2, 8)
    return [(torch.randn(n, 1, 16, 16), torch.randint(CLASSES, (n,))) for n in sizes]


@pytest.fixture
def pair(double: None) -> Iterator[tuple[Trainer, Released]]:
    torch.manual_seed(0)
    model = Vgg()
    program = compile_model(
        model,
        torch.randn(8, 1, 16, 16),
        num_classes=CLASSES,
        split_at=("blocks.0", "blocks.1", "blocks.2"),
        preset="paper",
        verify=False,
    )
    with program.trainer(schedule="stream") as trainer:
        yield trainer, Released(model, trainer)


def test_heads_have_the_released_shapes(pair: tuple[Trainer, Released]) -> None:
    maps = (4 * 8 * 8, 6 * 4 * 4, 6 * 2 * 2, 8)
    shapes = [[tuple(p.shape) for p in head.parameters()] for head in pair[1].heads]
    assert shapes == [[(512, size), (512,), (1024, 512), (1024,)] for size in maps]
    for stage, block in zip(pair[0]._stages, pair[1].optimizers, strict=True):
        assert sum(p.numel() for p in stage.module.parameters()) == sum(
            p.numel() for p in block.param_groups[0]["params"]
        )


def test_every_stage_has_the_released_optimizer(pair: tuple[Trainer, Released]) -> None:
    for stage, other in zip(pair[0]._stages, pair[1].optimizers, strict=True):
        assert type(stage.optimizer) is torch.optim.Adam
        for name in ("betas", "eps", "weight_decay", "amsgrad"):
            (group,) = {str(group[name]) for group in stage.optimizer.param_groups}
            assert group == str(other.defaults[name])


def test_training_is_the_released_one(pair: tuple[Trainer, Released]) -> None:
    """Losses of every step, and all weights and statistics at the end."""
    trainer, released = pair
    expected = []
    for x, labels in batches():
        trainer.step(x, labels)
        expected.append(released.step(x, labels, LR))
    trainer.drain()
    found = [[sum(losses.values()) for _, losses in rows] for rows in trainer.take_losses()]
    torch.testing.assert_close(torch.tensor(found).T, torch.tensor(expected), rtol=1e-6, atol=0)
    state = trainer.state_dict()
    theirs = nn.ModuleDict(
        {"blocks": nn.Sequential(*released.blocks), "predictor": released.predictor}
    )
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_the_released_learning_rate_falls_as_a_cosine_to_a_hundredth(double: None) -> None:
    """1e-3 to 1e-5; here in every step, there once an epoch."""
    program = compile_model(
        Vgg(), torch.randn(8, 1, 16, 16), num_classes=CLASSES, num_stages=2, preset="paper",
        verify=False,
    )  # fmt: skip
    with program.trainer(lr_schedule="cosine", total_steps=STEPS) as trainer:
        found = [trainer.learning_rate(step) for step in range(STEPS + 1)]
    cosine = [0.5 * (1 + math.cos(math.pi * step / STEPS)) for step in range(STEPS + 1)]
    assert found == pytest.approx([LAST_LR + (LR - LAST_LR) * q for q in cosine])
