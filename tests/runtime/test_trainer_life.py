"""How a trainer begins and ends: in which modes it trains, and what stays when it is dropped."""

import gc
import threading
import time
import weakref

import pytest
import torch

from stage_nets import SECONDS, WIDTH, Net, batches, build_net, make_trainer, submit_all

pytestmark = pytest.mark.timeout(60)

# ---------------------------------------------------------------------- modes


class FrozenNorm(Net):
    """Its train() holds the first batch norm in eval mode, as fine-tuning often does."""

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        self.blocks[0].norm.eval()
        return self


def frozen(model: Net) -> bool:
    """After some steps: whether the first batch norm was left alone, and the second was not."""
    with make_trainer(model=model) as trainer:
        submit_all(trainer, batches(2))
        trainer.predict(torch.randn(2, WIDTH))
        submit_all(trainer, batches(3)[2:])
        trainer.drain()
        assert [stage.module.head.training for stage in trainer._stages[:1]] == [True]
        assert trainer.model.training and trainer.model.blocks[1].norm.training  # type: ignore[index,union-attr]
    counts = [int(block.norm.num_batches_tracked) for block in model.blocks]
    assert counts[1] == 3 and model.blocks[0].norm.training == (counts[0] > 0)
    return counts[0] == 0


@pytest.mark.parametrize("start", [True, False, None])
def test_the_models_own_train_decides_what_trains(start: bool | None) -> None:
    """As in a plain loop; None: nobody has called train() or eval() yet."""
    model = FrozenNorm(2)
    if start is not None:
        model.train(start)
    assert frozen(model)


def test_modules_that_are_held_in_eval_mode_stay_so() -> None:
    model = build_net(2)
    model.blocks[0].norm.eval()
    assert frozen(model)


@pytest.mark.parametrize("training", [True, False])
def test_otherwise_everything_trains(training: bool) -> None:
    assert not frozen(build_net(2).train(training))


# ---------------------------------------------------------------------- a trainer that is dropped


def test_a_trainer_that_nobody_holds_ends_and_frees_its_weights() -> None:
    before = set(threading.enumerate())
    trainer = make_trainer(3)
    submit_all(trainer, batches(3))
    trainer.drain()
    kept = [weakref.ref(value) for value in (trainer, trainer.model.blocks[0].linear.weight)]  # type: ignore[index,union-attr]
    del trainer
    deadline = time.monotonic() + SECONDS
    while not set(threading.enumerate()) <= before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
