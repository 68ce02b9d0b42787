"""A rank's own stage: built without memory, filled from the weights, and nothing else is kept."""

import gc
import weakref
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from scpl_compile.errors import ProgramError
from scpl_compile.runtime.losses import LocalLoss
from scpl_compile.runtime.own_stage import build_without_memory, keep_stage
from scpl_compile.runtime.program import all_tensors
from scpl_compile.runtime.stage import take


class Net(nn.Module):
    """Two halves; an LSTM, batch norm, a buffer that no state_dict has, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6, num_layers=2, batch_first=True)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("center", torch.randn(6), persistent=False)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.out = nn.Linear(6, 4)


class Front(nn.Module):
    """The LSTM with what is small, and a head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        take(self, model, "lstm", "norm", "center", "frozen")
        self.local_loss = LocalLoss(num_classes=4, in_shapes=((6,),), hidden=8, out=8)


class Back(nn.Module):
    """Both names of the tied weight."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        take(self, model, "first", "second", "out")


def kept(
    stage_class: Callable[[nn.Module], nn.Module], build: Callable[[], nn.Module] = Net
) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """(model, stage, the weights of all) after this rank has kept its stage."""
    weights = {name: value.detach().clone() for name, value in all_tensors(build()).items()}
    model = build_without_memory(build)
    stage = stage_class(model)
    names = {id(tensor): name for name, tensor in all_tensors(model).items()}
    own = [names[id(t)] for t in (*stage.parameters(), *stage.buffers()) if id(t) in names]
    keep_stage(model, stage, names, {name: weights[name] for name in own})
    return model, stage, weights


def on_meta(tensors: Iterable[Tensor]) -> set[bool]:
    return {tensor.is_meta for tensor in tensors}


# ---------------------------------------------------------------------- building


def test_a_model_is_built_without_memory() -> None:
    model = build_without_memory(Net)
    assert on_meta([*model.parameters(), *model.buffers()]) == {True}


@pytest.mark.filterwarnings("ignore")
def test_a_constructor_that_computes_with_tensors_builds_on_the_cpu() -> None:
    from torchvision.models import regnet_y_400mf

    with pytest.raises(Exception, match="meta"), torch.device("meta"):
        regnet_y_400mf(weights=None)
    model = build_without_memory(lambda: regnet_y_400mf(weights=None))
    assert on_meta([*model.parameters(), *model.buffers()]) == {False}


@pytest.mark.parametrize(
    "keep",
    [
        lambda module: setattr(module, "grid", torch.arange(4)),
        lambda module: setattr(module, "grids", [torch.arange(4)]),
        lambda module: setattr(module, "by_size", {4: (torch.arange(4),)}),
    ],
)
def test_plain_tensors_which_no_file_has_keep_their_values(
    keep: Callable[[nn.Module], None],
) -> None:
    def build() -> nn.Module:
        net = nn.Sequential(nn.Linear(2, 2))
        keep(net[0])
        return net

    assert on_meta(build_without_memory(build).parameters()) == {False}


def test_an_error_of_the_constructor_itself_is_raised() -> None:
    def build() -> nn.Module:
        raise ValueError("no such width")

    with pytest.raises(ValueError, match="no such width"):
        build_without_memory(build)


# ---------------------------------------------------------------------- keeping


@pytest.mark.parametrize("stage_class", [Front, Back])
def test_the_stage_has_its_values_and_the_rest_no_memory(
    stage_class: Callable[[nn.Module], nn.Module],
) -> None:
    model, stage, weights = kept(stage_class)
    own = {id(tensor) for tensor in (*stage.parameters(), *stage.buffers())}
    for name, tensor in all_tensors(model).items():
        if id(tensor) in own:
            assert torch.equal(tensor, weights[name])
        else:
            assert tensor.is_meta
    assert on_meta([*stage.parameters(), *stage.buffers()]) == {False}


def test_kinds_stay() -> None:
    """Parameters, frozen ones, and both kinds of buffers."""
    model, stage, _ = kept(Front)
    assert isinstance(stage.frozen, nn.Parameter) and not stage.frozen.requires_grad
    assert stage.norm.weight.requires_grad
    assert "center" not in stage.state_dict() and "norm.running_mean" in stage.state_dict()
    assert stage.norm is model.norm


def test_an_lstm_computes_with_what_it_was_given_and_trains_it() -> None:
    """It keeps a second list of its weights."""
    _, stage, weights = kept(Front)
    plain = nn.LSTM(6, 6, num_layers=2, batch_first=True)
    plain.load_state_dict({n.removeprefix("lstm."): v for n, v in weights.items() if "lstm" in n})
    x = torch.randn(2, 5, 6)
    expected, found = plain(x)[0], stage.lstm(x)[0]
    assert torch.equal(found, expected)
    found.sum().backward()
    expected.sum().backward()
    grads = zip(stage.lstm.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in grads)


def test_tied_weights_stay_one_tensor() -> None:
    model, stage, weights = kept(Back)
    assert stage.first.weight is stage.second.weight is model.second.weight
    assert torch.equal(stage.first.weight, weights["first.weight"])
    assert len([p for p in stage.parameters() if p.shape == (6, 6)]) == 1


def test_heads_are_not_of_the_model_and_stay() -> None:
    model = build_without_memory(Net)
    torch.manual_seed(5)
    before = {n: v.clone() for n, v in Front(model).local_loss.state_dict().items()}
    torch.manual_seed(5)
    stage = Front(model)
    names = {id(tensor): name for name, tensor in all_tensors(model).items()}
    keep_stage(model, stage, names, {n: v.detach() for n, v in all_tensors(Net()).items()})
    after = stage.local_loss.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_of_a_model_on_the_cpu_the_rest_is_freed() -> None:
    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.grid = torch.arange(4)

    built: list[weakref.ref[Tensor]] = []

    def build() -> nn.Module:
        net = Plain()
        built.extend(weakref.ref(p) for p in (net.out.weight, net.lstm.weight_hh_l0))
        return net

    alive = build_without_memory(build)
    gc.collect()
    assert [parameter() is None for parameter in built[-2:]] == [False, False]
    del alive

    model, stage, weights = kept(Front, build)
    gc.collect()
    assert [parameter() for parameter in built] == [None] * len(built)
    assert model.out.weight.is_meta and model.grid.tolist() == [0, 1, 2, 3]
    assert torch.equal(stage.norm.weight, weights["norm.weight"])


# ---------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm.bias"), r"'norm.bias' is missing in the weights, and \(6,\)"),
        (lambda w: w.update({"norm.bias": torch.zeros(7)}), r"'norm.bias' is \(7,\) torch.float32"),
        (lambda w: w.update({"norm.bias": torch.zeros(6).double()}), "is .* torch.float64 in the"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    model = build_without_memory(Net)
    stage = Front(model)
    names = {id(tensor): name for name, tensor in all_tensors(model).items()}
    weights = {name: value.detach() for name, value in all_tensors(Net()).items()}
    change(weights)
    with pytest.raises(ProgramError, match=f"{message}.*compile again with --force"):
        keep_stage(model, stage, names, weights)
