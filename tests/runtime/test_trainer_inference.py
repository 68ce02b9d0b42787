"""predict, evaluate and state_dict: what the trained model gives, read without disturbing it."""

import copy

import pytest
import torch
import torch.nn.functional as F

from scpl_compile.errors import DataError
from scpl_compile.ir import LocalLoss
from stage_nets import (
    BATCH_SIZE,
    WIDTH,
    BlockStage,
    Net,
    batches,
    block_plan,
    block_stages,
    build_net,
    differences,
    make_trainer,
    outcome,
    state_of,
    submit_all,
    train,
)

pytestmark = pytest.mark.timeout(60)


def test_evaluate_drains_and_is_what_the_model_gives() -> None:
    model = build_net(3)
    data = batches(7, seed=8)
    with make_trainer(3, model=model) as trainer:
        submit_all(trainer, batches(20))
        found = trainer.evaluate(iter(data))
        assert min(trainer._engine._board.num_updates) == 20
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in data])
    labels = torch.cat([labels for _, labels in data])
    assert found.num_samples == 7 * BATCH_SIZE
    assert found.accuracy == float((logits.argmax(-1) == labels).double().mean())
    assert found.losses[0] == pytest.approx(float(F.cross_entropy(logits, labels)))
    assert len(found.accuracies) == len(found.losses) == 1


def test_evaluate_reads_objects_with_inputs_and_labels_too() -> None:
    class Sample:
        inputs, labels = batches(1)[0]

    with make_trainer() as trainer:
        assert trainer.evaluate([Sample()]) == trainer.evaluate(batches(1))
        with pytest.raises(DataError, match="there is no sample"):
            trainer.evaluate([])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(6), r"labels must be int64 \(B,\), not torch\.float32"),
        (torch.full((6,), -1), "label -1 is out of range for 4 classes"),
        (torch.full((6,), 4), "label 4 is out of range for 4 classes"),
        (torch.zeros(5, dtype=torch.int64), "6 samples have 5 labels"),
        (torch.zeros(3, dtype=torch.int64), "6 samples have 3 labels"),
        ([0] * 6, r"labels must be an int64 tensor \(B,\), not list"),
    ],
)
def test_evaluate_refuses_the_labels_that_a_step_refuses(labels: object, message: str) -> None:
    with make_trainer() as trainer:
        with pytest.raises(DataError, match=message):
            trainer.evaluate([(torch.randn(6, WIDTH), labels)])
        # Of one class they may be: samples often lie in the order of their classes.
        same = torch.full((6,), 2)
        assert trainer.evaluate([(torch.randn(6, WIDTH), same)]).num_samples == 6


def test_predicting_changes_nothing() -> None:
    x = torch.randn(3, WIDTH)
    with make_trainer() as trainer:
        submit_all(trainer, batches(3))
        (one,) = trainer.predict(x)
        before = state_of(trainer._stages)
        (two,) = trainer.predict((x,))
        assert torch.equal(one, two) and not one.requires_grad
        assert differences(state_of(trainer._stages), before) == []
        assert all(m.training for stage in trainer._stages for m in stage.module.modules())
        with pytest.raises(DataError, match="has the shape"):
            trainer.predict(x[0])
        assert all(stage.module.training for stage in trainer._stages)
        submit_all(trainer, batches(6)[3:])
        found = outcome(trainer)
    assert differences(found, train(6)) == []


def test_every_exit_is_evaluated_in_the_plans_order() -> None:
    local = LocalLoss(name="local", kind="local", reads=("h1",))
    plan = block_plan(2, inference=("0F", "0X", "1F"), losses=[(local,), ()])
    x, labels = batches(1)[0]
    with make_trainer(plan=plan) as trainer:
        early, late = trainer.predict(x)
        found = trainer.evaluate([(x, labels)])
        stages = [stage.module.eval() for stage in trainer._stages]
        h = stages[0](x)
        assert torch.equal(early, stages[0].head(h)) and torch.equal(late, stages[1](h))
    assert found.accuracies[0] == float((early.argmax(-1) == labels).double().mean())
    assert found.accuracy == float((late.argmax(-1) == labels).double().mean())


def test_the_state_dict_loads_into_the_original_model() -> None:
    with make_trainer(3) as trainer:
        submit_all(trainer, batches(5))
        state = trainer.state_dict()
        kept = {name: value.clone() for name, value in state.items()}
        x = torch.randn(4, WIDTH)
        (logits,) = trainer.predict(x)
        submit_all(trainer, batches(8)[5:])
        trainer.drain()
    model = build_net(3, seed=99)
    model.load_state_dict(state)
    for block, trained in zip(model.blocks, trainer.model.blocks, strict=True):  # type: ignore[arg-type]
        assert not torch.equal(block.mean, trained.mean)  # no file of weights has it
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[name], state[name]) for name in state)  # a copy
    with make_trainer(3, model=model) as other:
        for stage, trained_stage in zip(other._stages, trainer._stages, strict=True):
            for name, buffer in stage.module.named_buffers():
                if name.endswith(".mean"):
                    buffer.copy_(trained_stage.module.get_buffer(name))
        assert other.predict(x)[0].shape == logits.shape


def test_buffers_that_a_stage_has_of_its_own_are_in_the_state_dict() -> None:
    """A buffer on another device than the model's is another tensor; here a clone stands for it."""

    class Moved(BlockStage):
        def __init__(self, model: Net, index: int) -> None:
            super().__init__(model, index)
            block = copy.copy(self.blocks[index])
            block._modules = {**block._modules, "norm": copy.deepcopy(block.norm)}
            self.blocks._modules[str(index)] = block

    with make_trainer(stages=block_stages(2, stage0=Moved)) as trainer:
        submit_all(trainer, batches(3))
        state = trainer.state_dict()
    assert int(state["blocks.0.norm.num_batches_tracked"]) == 3
    assert int(trainer.model.blocks[0].norm.num_batches_tracked) == 0  # type: ignore[index,union-attr]
