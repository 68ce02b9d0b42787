"""Errors of allocators name the remedy, others do not."""

import pytest
import torch

from scpl_compile.errors import TrainingError
from scpl_compile.runtime.memory import remedy
from stage_nets import BlockStage, batches, block_stages, make_trainer, submit_all

REMEDY = "smaller --batch-size, other --devices, or compile into more --stages"


def too_much() -> torch.Tensor:
    return torch.empty(2**60)


def test_what_torch_raises_on_the_cpu_is_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        too_much()
    assert REMEDY in remedy(raised.value)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), MemoryError()])
def test_the_errors_of_a_gpu_and_of_python_are_known(error: Exception) -> None:
    assert REMEDY in remedy(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("out of memory")])
def test_other_errors_have_no_remedy(error: Exception) -> None:
    assert remedy(error) == ""


class Huge(BlockStage):
    """Does not fit into any memory."""

    def training_step(self, x: torch.Tensor, *, labels: torch.Tensor) -> object:
        return too_much()


def test_a_stage_that_does_not_fit_says_what_to_do() -> None:
    with make_trainer(stages=block_stages(2, stage1=Huge)) as trainer:
        with pytest.raises(TrainingError, match=f"stage 1 failed: RuntimeError: .*{REMEDY}"):
            submit_all(trainer, batches(2))
            trainer.drain()
