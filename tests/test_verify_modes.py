"""verify and the trainer hold modules in the modes in which the model's own train() holds them."""

import pytest
import torch
from torch import Tensor, nn

from scpl_compile.api import compile_model


class _FrozenNorm(nn.Module):
    """The idiom of fine-tuning: train() holds the batch norms in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))

    def train(self, mode: bool = True) -> "_FrozenNorm":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.training = False
        return self


@pytest.mark.parametrize("held_by", ["train()", "the user"])
def test_a_batch_norm_held_in_eval_mode_stays_so(held_by: str) -> None:
    model: nn.Module = _FrozenNorm()
    if held_by == "the user":
        model = nn.Sequential(model.first, model.second, model.head)
        model[0][1].eval()
        model[1][1].eval()
    program = compile_model(model, torch.randn(8, 6), num_stages=2)
    assert program.verification.is_verified
    with program.trainer() as trainer:
        for _ in range(3):
            trainer.step(torch.randn(8, 6), torch.arange(8) % 4)
        state = trainer.state_dict()
    for name, value in model.named_buffers():
        assert torch.equal(state[name], value), name
