"""take: a stage holds the model's own objects under the model's names. cut: what crosses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from scpl_compile.errors import ProgramError
from scpl_compile.runtime.stage import (
    Part,
    StopGradient,
    as_tuple,
    cut,
    evaluating,
    start_training,
    take,
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(3))
        self.encoder = nn.Module()
        self.encoder.token = nn.Parameter(torch.zeros(3))
        self.encoder.norm = nn.BatchNorm1d(3)
        self.register_buffer("positions", torch.arange(3))
        self.register_buffer("cache", torch.ones(3), persistent=False)
        self.table = torch.full((3,), 2.0)
        self.forward_mode = 1


def taken(*paths: str) -> tuple[nn.Module, Model]:
    stage, model = nn.Module(), Model()
    take(stage, model, *paths)
    return stage, model


# ---------------------------------------------------------------------- take


def test_modules_stay_the_same_objects_under_the_same_paths() -> None:
    stage, model = taken("stem", "layers.1", "encoder.norm")
    assert stage.stem is model.stem
    assert stage.layers[1] is stage.layers["1"] is model.layers[1]
    assert stage.encoder.norm is model.encoder.norm
    assert isinstance(stage.layers, Part)


def test_parameters_and_buffers_stay_the_same_tensors() -> None:
    stage, model = taken("encoder.token", "positions", "cache", "table")
    assert stage.encoder.token is model.encoder.token
    assert stage.positions is model.positions
    assert stage.cache is model.cache
    assert stage.table is model.table


def test_the_state_dict_is_that_part_of_the_models() -> None:
    stage, model = taken("layers.2", "encoder.token", "encoder.norm", "positions", "cache", "table")
    whole = model.state_dict()
    assert stage.state_dict().keys() == {
        name for name in whole if name.startswith(("layers.2.", "encoder.", "positions"))
    }
    assert {n for n, _ in stage.named_buffers()} >= {"cache", "table"}
    assert model.load_state_dict(stage.state_dict(), strict=False).unexpected_keys == []


def test_what_the_stage_trains_is_the_model() -> None:
    stage, model = taken("layers.0", "encoder.token")
    torch.optim.SGD(stage.parameters(), lr=1.0)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.fill_(4.0)
    assert (model.layers[0][0].weight == 4).all() and (model.encoder.token == 4).all()
    assert not (model.stem.weight == 4).any()


@pytest.mark.parametrize(
    "path",
    ["nothing", "stem.nothing", "layers.7", "nothing.weight", "forward_mode", "layers.0.x.y"],
)
def test_a_path_that_the_model_lacks_is_named(path: str) -> None:
    with pytest.raises(ProgramError, match=f"the model has no (module )?'{path}'.*another model"):
        taken(path)


def test_a_name_that_the_stage_already_has_is_refused() -> None:
    class Forwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.training_step = nn.Linear(1, 1)

    class Stage(nn.Module):
        def training_step(self) -> None: ...

    with pytest.raises(ProgramError, match="would hide the attribute 'training_step'"):
        take(Stage(), Forwards(), "training_step")


@pytest.mark.parametrize(
    "paths", [("stem", "stem"), ("layers.1", "layers"), ("layers", "layers.1")]
)
def test_a_module_and_its_part_cannot_both_be_taken(paths: tuple[str, ...]) -> None:
    stage, model = nn.Module(), Model()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ProgramError, match="would hide"):
        take(stage, model, *paths)
    assert [name for name, _ in model.named_modules()] == names


# ---------------------------------------------------------------------- cut


def crossings() -> dict[str, Tensor]:
    base = torch.randn(4, 6, requires_grad=True)
    return {
        "plain": base * 2,
        "leaf": base,
        "transposed": (base * 2).t(),
        "strided": (base * 2)[:, ::2],
        "integer": torch.arange(5),
        "empty": torch.empty(0, 3),
        "scalar": base.sum(),
    }


@pytest.mark.parametrize("clone", [False, True])
@pytest.mark.parametrize("name", crossings())
def test_a_crossing_value_is_equal_contiguous_and_without_gradient(name: str, clone: bool) -> None:
    value = crossings()[name]
    crossing = cut(value, clone=clone)
    assert torch.equal(crossing, value)
    assert crossing.is_contiguous() and not crossing.requires_grad and crossing.grad_fn is None


def test_a_cloned_crossing_shares_no_memory_with_its_owner() -> None:
    owner = nn.Parameter(torch.ones(3, 2))
    for value in (owner, owner.t(), owner[1:], owner.detach()):
        crossing = cut(value, clone=True)
        assert crossing.untyped_storage().data_ptr() != owner.untyped_storage().data_ptr()
        assert torch.equal(crossing, value)


def test_without_clone_nothing_is_copied() -> None:
    value = torch.ones(3, requires_grad=True) * 2
    assert cut(value).data_ptr() == value.data_ptr()


# ---------------------------------------------------------------------- the other pieces


@given(st.booleans())
def test_stop_gradient_lets_the_gradient_through_only_when_open(is_open: bool) -> None:
    stop, value = StopGradient(), torch.ones(2, requires_grad=True)
    assert not stop.is_open
    stop.is_open = is_open
    passed = stop(value)
    assert torch.equal(passed, value)
    assert passed.requires_grad == is_open


def test_as_tuple_takes_one_tensor_or_several() -> None:
    one = torch.zeros(2, 3)
    assert as_tuple(one) == (one,)
    assert as_tuple((one,)) == (one,)
    assert as_tuple(value for value in (one, one)) == (one, one)
    assert as_tuple(()) == ()


def test_evaluating_puts_every_module_back_into_the_mode_it_was_in() -> None:
    model, other = Model().train(), Model().eval()
    model.encoder.norm.eval()  # held by the user
    modes = [module.training for stage in (model, other) for module in stage.modules()]
    with pytest.raises(KeyError), evaluating([model, other]):
        assert not any(m.training for stage in (model, other) for m in stage.modules())
        raise KeyError
    assert modes == [module.training for stage in (model, other) for module in stage.modules()]


def test_training_starts_as_in_a_training_loop_unless_modules_are_held_in_eval_mode() -> None:
    calls: list[bool] = []

    class Own(Model):
        def train(self, mode: bool = True) -> "Own":
            calls.append(mode)
            return super().train(mode)

    model = Own()
    start_training(model)
    model.eval()
    start_training(model)
    assert calls == [True, False, True] and all(m.training for m in model.modules())
    model.encoder.norm.eval()
    start_training(model)
    assert calls == [True, False, True] and not model.encoder.norm.training
    assert model.training and model.stem.training
