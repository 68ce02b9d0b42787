"""Every parameter trains: after one step all of them have moved, in every method."""

import pytest
import torch

from small_nets import DECOUPLED, NUM_CLASSES, compiled

METHODS = {**DECOUPLED, "bp": {"method": "bp"}}
# lstm: the cut is crossed by the sequence, the state h and c, and the mask; unet: by skips.
NETS = {"cnn": 4, "lstm": 3, "small_net": 6, "transformer": 4, "unet": 4}
FROZEN = {"cnn": {"stem.weight", "stem.bias"}}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_every_parameter_moves(name: str, method: str, optimizer: str) -> None:
    found = compiled(name, NETS[name], **METHODS[method])
    with found.program.trainer(optimizer=optimizer, lr=0.1) as trainer:
        stages = [stage.module for stage in trainer._stages]
        before = [{n: p.clone() for n, p in stage.named_parameters()} for stage in stages]
        inputs, labels = found.batches[0]
        trainer.step(inputs, labels)
        trainer.drain()
        still = {
            f"stage {k} {n}"
            for k, stage in enumerate(stages)
            for n, p in stage.named_parameters()
            if torch.equal(p, before[k][n])
            and n not in FROZEN.get(name, set())
            and n not in found.program.plan.untrained
        }
    assert still == set()


@pytest.mark.parametrize("name", NETS)
def test_the_heads_are_of_the_stages_and_not_of_the_model(name: str) -> None:
    found = compiled(name, NETS[name])
    model = {n for n, _ in found.program.model.named_parameters()}
    with found.program.trainer() as trainer:
        for k, stage in enumerate(trainer._stages):
            heads = {n for n, _ in stage.module.named_parameters()} - model
            is_last = k == NETS[name] - 1
            assert (not heads) == is_last
            assert all(n.startswith("local_loss.") for n in heads)


def test_what_crosses_a_cut_is_what_the_later_stages_read() -> None:
    """The multi-tensor cuts that these tests are about are there."""
    lstm = compiled("lstm", 3).program.plan
    assert {c.meta.shape for cut in lstm.cuts for c in cut.crossings} >= {
        (6, 6, 16),  # the sequence
        (1, 6, 16),  # h and c: the batch is their second dimension
        (6, 6),  # the mask
    }
    unet = compiled("unet", 4).program.plan
    assert max(len(cut.crossings) for cut in unet.cuts) >= 2
    assert any(len(loss.reads) > 1 for stage in lstm.stages for loss in stage.losses)


def test_a_parameter_without_a_use_is_no_error() -> None:
    """It has no gradient in ordinary training either; all others train."""
    found = compiled("unused", 2)
    with found.program.trainer(optimizer="sgd", lr=0.1) as trainer:
        before = {n: p.clone() for n, p in trainer.model.named_parameters()}
        trainer.step(*found.batches[0])
        trainer.drain()
        moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert before.keys() - moved == {"unused.weight", "unused.bias"}
    assert found.program.plan.num_classes == NUM_CLASSES
