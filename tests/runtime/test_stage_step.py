"""F, B and U of one stage: what a plain training loop computes, and all that a resume needs."""

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scpl_compile.errors import ProgramError, TrainingError
from scpl_compile.runtime.optim import make_optimizer, optimizer_names
from scpl_compile.runtime.randomness import seeded
from stage_nets import (
    BATCH_SIZE,
    NUM_CLASSES,
    WIDTH,
    BlockStage,
    LossStage,
    Net,
    batches,
    block_stages,
    build_net,
    differences,
    module_with_step,
    run_stage,
    stage_steps,
    state_of,
    step_of,
)

# ---------------------------------------------------------------------- F, B, U


def test_a_step_is_what_a_plain_loop_does() -> None:
    stage = stage_steps(1, draws=False)[0]
    data = dict(enumerate(batches(5)))
    model = build_net(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with seeded(3):
        for x, labels in data.values():
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
    with seeded(3):
        run_stage(stage, data)
    trained = {**dict(stage.module.named_parameters()), **dict(stage.module.named_buffers())}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(value, trained[name]), name


def test_the_learning_rate_is_that_of_the_step() -> None:
    module = LossStage(*[1.0] * 3)
    optimizer = make_optimizer("sgd", module.parameters(), 9.0, {})
    stage = step_of(module, optimizer=optimizer, learning_rate=lambda step: 10.0**-step)
    run_stage(stage, {step: batches(1)[0] for step in (1, 4, 2)})
    expected = 1 - 3 * (0.1 + 0.0001 + 0.01)  # the gradient of a + b is 3
    assert float(module.weight.detach()) == pytest.approx(expected)


def test_gradients_do_not_stay() -> None:
    stage = stage_steps(1)[0]
    run_stage(stage, dict(enumerate(batches(2))))
    assert all(parameter.grad is None for parameter in stage.module.parameters())


def test_a_stage_may_train_nothing() -> None:
    module = nn.Module()
    module.training_step = lambda x, *, labels: (x + 1, {})
    stage = step_of(module, sends=("y",))
    x, labels = batches(1)[0]
    run_stage(stage, {0: (x, labels)})
    assert stage.take_losses() == [(0, {})]
    assert stage.state()[0].keys() == {"random.torch", "random.numpy", "random.python"}


def test_a_loss_without_gradient_is_told_and_not_trained_on() -> None:
    module = nn.Module()
    module.training_step = lambda x, *, labels: ((), {"constant": x.sum() * 0 + 7})
    stage = step_of(module)
    run_stage(stage, {0: batches(1)[0]})
    assert stage.take_losses() == [(0, {"constant": 7.0})]


def test_what_is_sent_goes_by_the_names_of_the_plan() -> None:
    module = nn.Module()
    module.training_step = lambda x, *, labels: ((x + 1, x + 2), {})
    x, labels = batches(1)[0]
    stage = step_of(module, sends=("y", "z"))
    stage.receive(3, {"x": x}, labels, None)
    stage.forward(3)
    values, sent_labels, mark = stage.outgoing(3)
    assert torch.equal(values["y"], x + 1) and torch.equal(values["z"], x + 2)
    assert torch.equal(sent_labels, labels) and mark is None
    wrong = step_of(module, sends=("y",))
    wrong.receive(3, {"x": x}, labels, None)
    with pytest.raises(ValueError, match="zip"):
        wrong.forward(3)


@pytest.mark.parametrize("action", ["forward", "outgoing", "backward", "input_gradients"])
def test_a_batch_that_is_not_there_is_named(action: str) -> None:
    stage = stage_steps(1)[0]
    run_stage(stage, {0: batches(1)[0]})
    with pytest.raises(TrainingError, match="stage 0 holds no batch of step 0"):
        getattr(stage, action)(0)


# ---------------------------------------------------------------------- what is received


def test_labels_are_repeated_for_every_view_in_the_first_stage_only() -> None:
    seen: list[list[Tensor]] = [[], []]

    class Looks(BlockStage):
        def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
            seen[self.index].append(labels)
            return super().training_step(x, labels=labels)

    first, second = stage_steps(2, stages=block_stages(2, stage0=Looks, stage1=Looks))
    x, labels = batches(1, views=3)[0]
    run_stage(first, {})
    first.receive(0, {"x": x}, labels, None)
    first.forward(0)
    second.receive(0, *first.outgoing(0))
    second.forward(0)
    assert all(torch.equal(found, labels.repeat(3)) for (found,) in seen)


def test_decoupled_stages_receive_values_without_gradient() -> None:
    stage = step_of(LossStage(1.0))
    x = torch.ones(2, WIDTH, requires_grad=True)
    stage.receive(0, {"x": x * 2}, torch.zeros(2, dtype=torch.int64), None)
    assert not stage._flight(0).values["x"].requires_grad


def test_in_backpropagation_the_gradient_of_what_was_received_goes_back() -> None:
    """Loss of the second stage: sum of 3 h; of the relayed r: nothing in between."""
    front, back = nn.Module(), nn.Module()
    front.training_step = lambda x, ids, *, labels: ((2 * x, x, ids), {})
    back.training_step = lambda h, r, ids, *, labels: ((), {"sum": (3 * h + 5 * r).sum()})
    names = ("h", "r", "ids")
    stages = [
        step_of(front, inputs=("x", "ids"), sends=names, detach=False),
        step_of(back, inputs=names, detach=False),
    ]
    stages[1].index = 1
    x = torch.ones(2, 3, requires_grad=True)
    labels = torch.zeros(2, dtype=torch.int64)
    for stage, values in zip(stages, [{"x": x, "ids": torch.arange(2)}, None], strict=True):
        stage.receive(0, values or stages[0].outgoing(0)[0], labels, None)
        stage.forward(0)
    stages[1].backward(0)
    gradients, _ = stages[1].input_gradients(0)
    assert gradients.keys() == {"h", "r"}  # integers have none
    stages[0].take_gradients(0, gradients, None)
    stages[0].backward(0)
    assert torch.equal(stages[0].input_gradients(0)[0]["x"], torch.full((2, 3), 2 * 3 + 5.0))
    assert x.grad is None  # the caller's own tensor is left alone


# ---------------------------------------------------------------------- randomness


def test_a_random_stage_draws_from_its_own_stream() -> None:
    before = torch.get_rng_state()
    one, other = stage_steps(1)[0], stage_steps(1)[0]
    data = dict(enumerate(batches(3)))
    run_stage(one, data)
    torch.rand(5)
    run_stage(other, data)
    assert differences(state_of([one]), state_of([other])) == []
    torch.set_rng_state(before)


def test_a_backward_that_draws_uses_the_stages_stream_where_told() -> None:
    class Draws(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            drawn.append(float(torch.rand(())))
            return gradient

    drawn: list[float] = []
    module = nn.Linear(WIDTH, 1)
    module.training_step = lambda x, *, labels: ((), {"sum": Draws.apply(module(x).sum())})
    for recomputes in (True, False):
        with seeded(1):
            run_stage(step_of(module, draws=False, recomputes=recomputes), {0: batches(1)[0]})
    with seeded(0):  # the stage's stream in step_of
        own = float(torch.rand(()))
    with seeded(1):
        assert drawn == [own, float(torch.rand(()))]


# ---------------------------------------------------------------------- state


def test_a_state_is_a_copy_of_everything() -> None:
    stage = stage_steps(2)[1]
    data = dict(enumerate(batches(4)))
    run_stage(stage, {0: data[0]})
    tensors, values = stage.state()
    kept = {name: value.clone() for name, value in tensors.items()}
    assert {
        "module.blocks.1.linear.weight",
        "module.blocks.1.norm.num_batches_tracked",
        "module.blocks.1.mean",  # non-persistent
        "module.out.bias",
        "optimizer.0.exp_avg",
        "optimizer.0.step",
        "random.torch",
    } <= tensors.keys()
    assert values["optimizer"] == "Adam" and json.loads(json.dumps(values)) == values
    run_stage(stage, {1: data[1]})
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


def test_a_shared_parameter_is_in_the_state_once() -> None:
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight
    tensors, _ = step_of(module_with_step(module)).state()
    names = {name for name in tensors if name.startswith("module.")}
    assert names == {"module.a.weight", "module.a.bias", "module.b.bias"}


def test_a_state_is_contiguous_and_loads_into_another_memory_format() -> None:
    def conv(data_seed: int) -> nn.Module:
        with seeded(data_seed):
            module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        module.training_step = lambda x, *, labels: ((), {"sum": module(x).square().sum()})
        return module

    images = {
        step: (torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)) for step in range(6)
    }
    one = step_of(module := conv(0), optimizer=make_optimizer("adam", module.parameters(), 0.1, {}))
    run_stage(one, {step: images[step] for step in range(3)})
    tensors, values = one.state()
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    two = step_of(module := conv(1), optimizer=make_optimizer("adam", module.parameters(), 0.1, {}))
    two.load_state(copy.deepcopy(tensors), values)
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    for stage in (one, two):
        run_stage(stage, {step: images[step] for step in range(3, 6)})
    assert differences(state_of([one]), state_of([two])) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("random", None),
        ("random", "[]"),
        ("random", "[" * 10**5),
        ("optimizer.0", 1),
        ("optimizer.99.step", 1),
        ("optimizer.x.step", 1),
    ],
)
def test_values_that_no_stage_has_are_a_damaged_checkpoint(name: str, value: object) -> None:
    stage = stage_steps(1)[0]
    tensors, values = stage.state()
    with pytest.raises(ProgramError, match="stage 0: the checkpoint is damaged .*remove it"):
        stage.load_state(tensors, {**values, name: value})


def test_tensors_of_another_dtype_are_refused() -> None:
    stage = stage_steps(1)[0]
    tensors, values = stage.state()
    name = next(name for name in tensors if name.startswith("module."))
    with pytest.raises(TrainingError, match="float64 in the checkpoint and .*float32 in the stage"):
        stage.load_state({**tensors, name: tensors[name].double()}, values)


WITHOUT_DENSE = {"sparseadam", "muon"}  # take sparse gradients or matrices only


@pytest.mark.parametrize("optimizer", sorted(optimizer_names().keys() - WITHOUT_DENSE))
def test_a_loaded_stage_goes_on_like_the_one_that_was_saved(optimizer: str) -> None:
    one, two = (
        stage_steps(1, optimizer=optimizer)[0],
        stage_steps(1, optimizer=optimizer, seed=9)[0],
    )
    data = dict(enumerate(batches(8)))
    run_stage(one, {step: data[step] for step in range(4)})
    tensors, values = copy.deepcopy(one.state())
    run_stage(two, {0: data[7]})  # any past
    two.load_state(tensors, json.loads(json.dumps(values)))
    assert differences(state_of([one]), state_of([two])) == []
    rest = {step: data[step] for step in range(4, 8)}
    run_stage(one, rest)
    run_stage(two, rest)
    assert differences(state_of([one]), state_of([two])) == []
    assert one.take_losses()[4:] == two.take_losses()


def test_loading_forgets_bad_steps_and_losses_of_before() -> None:
    stage = step_of(LossStage(1.0, float("nan"), 3.0))
    x = batches(1)[0]
    run_stage(stage, {0: x})
    tensors, values = stage.state()
    run_stage(stage, {1: x})
    stage.load_state(tensors, values)
    run_stage(stage, {1: x})
    assert stage.take_losses() == [(1, {"a": 3.0, "b": 2.0})]


def test_the_state_of_another_stage_is_refused() -> None:
    first, second = stage_steps(2)
    state = second.state()
    with pytest.raises(TrainingError, match="stage 0: the checkpoint and the stage differ in 'blo"):
        first.load_state(*state)
    tensors, values = second.state()
    wider = {**tensors, "module.out.weight": torch.zeros(NUM_CLASSES + 1, WIDTH)}
    with pytest.raises(
        TrainingError, match=r"'out.weight' is \(5, 8\) torch.float32 in the checkpoint and \(4, "
    ):
        second.load_state(wider, values)


def test_the_state_of_another_optimizer_is_refused() -> None:
    adam, sgd = stage_steps(1)[0], stage_steps(1, optimizer="sgd")[0]
    with pytest.raises(TrainingError, match="checkpoint is of the optimizer Adam, not SGD"):
        sgd.load_state(*adam.state())


def test_net_and_batches_are_what_the_tests_take_them_for() -> None:
    """The helpers draw the same for the same seed and leave the global generator alone."""
    before = torch.get_rng_state()
    one, two = build_net(3), build_net(3)
    assert isinstance(one, Net) and len(one.blocks) == 3
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert batches(2, views=2)[0][0].shape == (2 * BATCH_SIZE, WIDTH)
    assert torch.equal(torch.get_rng_state(), before)
