"""Models whose state is unusual: each compiles, is verified and trains, or is refused by name."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scpl_compile import Program, compile_model
from scpl_compile.errors import CaptureError, EmitError, PartitionError
from scpl_compile.sources import example_inputs

BATCH = 6


class Net(nn.Module):
    """(B, 6) → (B, 4) around `mid`, which is (B, 6) → (B, 6)."""

    def __init__(self, mid: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.mid = mid or nn.Linear(6, 6)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.mid(torch.relu(self.first(x)))))


def compiled(model: nn.Module, inputs: str = "6", **options: Any) -> Program:
    options.setdefault("num_stages", 2)
    return compile_model(model, inputs, batch_size=BATCH, threads_per_stage=1, **options)


def trained(program: Program, schedule: str = "stream") -> dict[str, Tensor]:
    """The state after two steps; everything that needs a gradient has moved."""
    before = {name: p.detach().clone() for name, p in program.model.named_parameters()}
    with program.trainer(lr=0.1, schedule=schedule) as trainer:
        for step in range(2):
            inputs = example_inputs(program.plan.inputs, BATCH, step)
            trainer.step(inputs, torch.arange(BATCH) % 4)
        state = trainer.state_dict()
    for name, parameter in program.model.named_parameters():
        assert torch.equal(state[name], before[name]) != parameter.requires_grad, name
    return state


def opaque(program: Program) -> dict[str, str]:
    return dict(program.plan.opaque)


# ---------------------------------------------------------------------- generators


class Noise(nn.Module):
    """Adds noise from a generator of its own."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.generator = generator or torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.rand(x.shape, generator=self.generator)


class Coin(nn.Module):
    """Its own random numbers in Python choose what it computes."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.linear, self.source = nn.Linear(6, 6), source

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (0.5 + float(self.source.random()))


def test_a_module_with_a_generator_of_its_own_stays_whole() -> None:
    model = Net(Noise())
    state = model.mid.generator.get_state()
    program = compiled(model)
    assert opaque(program) == {"mid": "uses a torch.Generator"}
    assert torch.equal(model.mid.generator.get_state(), state)  # verify draws and gives it back
    first, again = trained(program), trained(program, "sequential")
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    "source", [random.Random(1), np.random.default_rng(1), np.random.RandomState(1)],
    ids=["random", "numpy", "numpy-legacy"],
)  # fmt: skip
def test_random_numbers_of_python_that_a_module_owns_keep_it_whole(source: Any) -> None:
    after = copy.deepcopy(source)
    program = compiled(Net(Coin(source)))
    assert opaque(program) == {"mid": "changes its attribute 'source'"}
    assert source.random() == after.random()
    trained(program)


def test_modules_that_share_a_generator_share_a_stage() -> None:
    generator = torch.Generator()
    model = nn.Sequential(Noise(generator), nn.Linear(6, 6), Noise(generator), nn.Linear(6, 4))
    program = compiled(model)
    assert program.plan.stages[0].nodes == ("0", "1", "2")
    with pytest.raises(PartitionError, match="they share 0.generator"):
        compiled(model, num_stages=3)


# ---------------------------------------------------------------------- in place


class Doubles(Net):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return super().forward(x)


class DoublesByOperator(Net):
    def forward(self, x: Tensor) -> Tensor:
        x *= 2
        return super().forward(x)


class DoublesLate(Net):
    """A later stage writes the model's input."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.mid(torch.relu(self.first(x * 1))))
        x += 1
        return self.last(y + x)


@pytest.mark.parametrize(
    "model", [Doubles(), DoublesByOperator(), DoublesLate(),
              nn.Sequential(nn.ReLU(inplace=True), Net()),
              nn.Sequential(nn.Dropout(0.5, inplace=True), Net())],
    ids=["method", "operator", "late", "relu", "dropout"],
)  # fmt: skip
def test_an_input_that_the_model_writes_is_copied(model: nn.Module) -> None:
    program = compiled(model)
    x = torch.randn(BATCH, 6)
    given = x.clone()
    with program.trainer() as trainer:
        trainer.step(x, torch.arange(BATCH) % 4)
        (logits,) = trainer.predict(x)
        assert torch.equal(x, given)
        trained_model = copy.deepcopy(model)
        trained_model.load_state_dict(trainer.state_dict())
    torch.testing.assert_close(logits, trained_model.eval()(given))


# ---------------------------------------------------------------------- tied and frozen


class Tied(nn.Module):
    """Token ids (B, 5) to (B, 20), embedding and output of one weight; `fc` comes after them."""

    def __init__(self, fc: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.fc = fc

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.head(self.body(self.embedding(ids)).mean(1)))


def test_tied_weights_at_both_ends_are_named_with_the_choices() -> None:
    with pytest.raises(PartitionError) as raised:
        compiled(Tied(nn.Identity()), "ids:int64:5<20")
    assert "they share embedding.weight = head.weight" in str(raised.value)
    assert str(raised.value).endswith(
        "ask for --stages 1, or give what shares a parameter one of its own each"
    )


def test_tied_weights_are_put_into_one_stage() -> None:
    program = compiled(Tied(nn.Linear(20, 4)), "ids:int64:5<20")
    assert [stage.nodes[0] for stage in program.plan.stages] == ["embedding", "fc"]
    state = trained(program)
    assert torch.equal(state["embedding.weight"], state["head.weight"])
    with pytest.raises(PartitionError, match=r"'body_1': 'embedding' and 'head' belong in one"):
        compiled(Tied(nn.Linear(20, 4)), "ids:int64:5<20", split_at=["body.1"])


@pytest.mark.parametrize("frozen", ["first", "mid"])
def test_frozen_modules_stay_as_they_are_and_are_no_stage(frozen: str) -> None:
    model = Net(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)))
    model.get_submodule(frozen).requires_grad_(False)
    program = compiled(model)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(trains & set(stage.parameters) for stage in program.plan.stages)
    trained(program)


def test_a_pooling_layer_alone_is_no_stage() -> None:
    """VGG-11's (7, 7) average pool costs more than the layers around it on small images."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(64), nn.Flatten(), nn.Linear(4 * 64 * 64, 4)
    )
    program = compiled(model, "3x8x8")
    assert all(stage.parameters for stage in program.plan.stages)
    with pytest.raises(PartitionError, match="every stage needs a parameter that trains"):
        compiled(model, "3x8x8", num_stages=3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Net().requires_grad_(False), "all 6 parameters of Net are frozen"),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), "there are none in Sequential"),
        (nn.DataParallel(Net()), r"inside: model\.module"),
    ],
    ids=["frozen", "none", "wrapped"],
)
def test_a_model_that_cannot_be_used_says_why(model: nn.Module, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        compiled(model)


# ---------------------------------------------------------------------- buffers and attributes


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


class CountsItself(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Scaled(nn.Module):
    """A tensor that is an attribute and not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 6), torch.full((6,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


def test_a_counter_in_a_buffer_counts_once_per_step() -> None:
    program = compiled(Net(Counts()))
    assert opaque(program) == {"mid": "writes 'mid.calls' in place"}
    assert int(program.model.mid.calls) == 0
    assert int(trained(program)["mid.calls"]) == 2


def test_a_counter_of_the_model_itself_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"CountsItself itself .*'calls'.*move that code"):
        compiled(CountsItself())


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_batch_norm_keeps_its_statistics(momentum: float | None) -> None:
    program = compiled(Net(nn.BatchNorm1d(6, momentum=momentum)))
    assert int(trained(program)["mid.num_batches_tracked"]) == 2


def test_a_tensor_that_is_not_registered_keeps_its_module_whole() -> None:
    program = compiled(Net(Scaled()))
    assert "neither parameter nor buffer" in opaque(program)["mid"]
    trained(program)


class OddNames(nn.Module):
    """Names that are no identifiers, or words of Python."""

    NAMES = ("a-b", "class", "1x")

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            self.add_module(name, nn.Linear(6, 6))
        self.register_parameter("s-c", nn.Parameter(torch.ones(6)))
        self.register_buffer("b f", torch.ones(6))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.NAMES:
            x = torch.relu(getattr(self, name)(x))
        return self.fc(x * getattr(self, "s-c") + getattr(self, "b f"))


@pytest.mark.parametrize("num_stages", [2, 4])
def test_names_that_are_no_identifiers(num_stages: int) -> None:
    trained(compiled(OddNames(), num_stages=num_stages))


def named(name: str) -> nn.Module:
    class Named(Net):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.relu(getattr(self, name)(x)))

    return Named()


@pytest.mark.parametrize("name", ["exit", "stop", "classifier", "labels", "losses", "model"])
@pytest.mark.parametrize("last", ["through", "released"])
def test_names_that_only_look_like_a_stages_own(name: str, last: str) -> None:
    trained(compiled(named(name), options={"last": last}))


@pytest.mark.parametrize(
    ("name", "method"),
    [("training_step", "scpl"), ("local_loss", "scpl"), ("exit", "early_exit")],
)
def test_a_name_that_stages_need_is_refused(name: str, method: str) -> None:
    with pytest.raises(EmitError, match=f"the model's '{name}' .* rename it in the model"):
        compiled(named(name), method=method)


# ---------------------------------------------------------------------- what tracing would drop


class Prints(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        print("prints")
        return self.linear(x)


def test_a_module_that_prints_goes_on_printing(capsys: pytest.CaptureFixture[str]) -> None:
    program = compiled(Net(Prints()))
    assert opaque(program) == {"mid": "prints"}
    capsys.readouterr()
    trained(program)
    assert capsys.readouterr().out == "prints\n" * 2


def test_a_model_whose_own_forward_prints_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"Prints itself cannot be traced .*\(prints\)"):
        compiled(Prints())
