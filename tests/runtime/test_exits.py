"""The weights of exits: written with a run, and taken only with weights of the same step."""

from pathlib import Path

import pytest
import torch

from scpl_compile.errors import ProgramError
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime.trainer import Trainer
from small_nets import Compiled, compiled


@pytest.fixture
def found() -> Compiled:
    """Three stages, two of them with an exit."""
    return compiled("cnn", 3, method="early_exit")


def trained(found: Compiled, num_steps: int, folder: Path) -> list[torch.Tensor]:
    """The logits of every exit after so many steps; the exits are written into `folder`."""
    with found.program.trainer(lr=0.01, seed=0) as trainer:
        train(trainer, found, num_steps)
        trainer.save_exits(folder)
        return trainer.predict(found.batches[0][0])


def train(trainer: Trainer, found: Compiled, num_steps: int) -> None:
    for inputs, labels in found.batches[:num_steps]:
        trainer.step(inputs, labels)


def test_exits_that_were_written_are_those_that_are_read(found: Compiled, tmp_path: Path) -> None:
    expected = trained(found, 2, tmp_path)
    with found.program.trainer(lr=0.01, seed=0) as trainer:
        train(trainer, found, 2)
        trainer.drain()
        for stage in trainer._stages[:2]:
            for parameter in stage.module.local_loss.parameters():
                parameter.data.zero_()
        assert trainer.load_exits(tmp_path, 2) is None
        assert all(map(torch.equal, trainer.predict(found.batches[0][0]), expected))


def test_exits_of_another_step_are_refused(found: Compiled, tmp_path: Path) -> None:
    trained(found, 2, tmp_path)
    with found.program.trainer(seed=1) as trainer:
        before = trainer.predict(found.batches[0][0])
        message = r"exit-0\.safetensors was written after 2 steps and the weights .* after 3, .*--r"
        with pytest.raises(ProgramError, match=message):
            trainer.load_exits(tmp_path, 3)
        first = (tmp_path / "exit-0.safetensors").read_bytes()
        trained(found, 3, tmp_path)
        (tmp_path / "exit-0.safetensors").write_bytes(first)  # cut off between the two
        with pytest.raises(ProgramError, match=r"exit-1\.safetensors was written after 3 steps"):
            trainer.load_exits(tmp_path)
        assert all(map(torch.equal, trainer.predict(found.batches[0][0]), before)), "none is taken"


@pytest.mark.parametrize("header", ["", "{}", "3", '{"plan": "other", "steps": 2}'])
def test_exits_of_another_plan_are_refused(found: Compiled, tmp_path: Path, header: str) -> None:
    trained(found, 2, tmp_path)
    path = tmp_path / "exit-1.safetensors"
    tensors, _ = checkpoint.load_tensors(path)
    checkpoint.save_tensors(path, tensors, {"exit": header})
    message = r"exit-1\.safetensors is of another plan; train this program again"
    with found.program.trainer() as trainer, pytest.raises(ProgramError, match=message):
        trainer.load_exits(tmp_path, 2)
