"""Optimizers by name, their options and weight decay."""

import pytest
import torch
from torch import nn

from scpl_compile.errors import MethodError
from scpl_compile.runtime.optim import make_optimizer, optimizer_names, read_options


def weights(*, trainable: bool = True) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2), requires_grad=trainable)]


@pytest.mark.parametrize("name", sorted(optimizer_names()))
def test_every_optimizer_of_torch_is_made_by_its_name(name: str) -> None:
    optimizer = make_optimizer(name, weights(), 0.5, {})
    assert optimizer is not None
    assert type(optimizer).__name__.lower() == name
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_lbfgs_needs_a_closure_and_is_left_out() -> None:
    assert {"adam", "adamw", "sgd"} <= optimizer_names().keys()
    assert not {"lbfgs", "optimizer"} & optimizer_names().keys()


def test_names_are_read_in_any_case_and_options_are_passed_on() -> None:
    optimizer = make_optimizer("SGD", weights(), 0.1, {"momentum": 0.9, "nesterov": True})
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.9 and optimizer.defaults["nesterov"]


def test_frozen_parameters_are_not_trained() -> None:
    frozen, trained = weights(trainable=False), weights()
    assert make_optimizer("adam", frozen, 0.1, {}) is None
    assert make_optimizer("adam", [], 0.1, {}) is None
    optimizer = make_optimizer("adam", frozen + trained, 0.1, {})
    assert optimizer is not None and optimizer.param_groups[0]["params"] == trained


@pytest.mark.parametrize("trainable", [True, False])
def test_an_unknown_name_is_refused_with_the_known_ones(trainable: bool) -> None:
    with pytest.raises(MethodError, match="'adamm' is not one of adadelta, .*, adam, adamax"):
        make_optimizer("adamm", weights(trainable=trainable), 0.1, {})


@pytest.mark.parametrize(
    ("name", "lr", "options"),
    [
        ("adam", -1.0, {}),
        ("adam", 0.1, {"momentum": 0.9}),
        ("sgd", 0.1, {"nesterov": True}),
        ("adam", 0.1, {"eps": "small"}),
        ("adam", 0.1, {"fused": True, "foreach": True}),
    ],
)
def test_what_torch_refuses_is_told_in_one_sentence(
    name: str, lr: float, options: dict[str, bool | float | str]
) -> None:
    with pytest.raises(MethodError, match=f"optimizer {name!r} refuses lr={lr}, .*: "):
        make_optimizer(name, weights(), lr, options)


def test_what_an_optimizer_does_not_train_is_told() -> None:
    bias = [nn.Parameter(torch.ones(2))]
    with pytest.raises(MethodError, match="optimizer 'muon' refuses.*2D"):
        make_optimizer("muon", bias, 0.1, {})


def test_options_are_read_from_text() -> None:
    read = read_options("betas=0.8/0.9,eps=1e-6,amsgrad=true")
    assert read == {"betas": (0.8, 0.9), "eps": 1e-6, "amsgrad": True}
    assert read_options(read) == read and read_options(None) == {}
    optimizer = make_optimizer("adam", weights(), 0.1, read)
    assert optimizer is not None and optimizer.defaults["betas"] == (0.8, 0.9)
    with pytest.raises(MethodError, match="optimizer option 'momentum' is not name=value, as in"):
        read_options("momentum")


# ---------------------------------------------------------------------- weight decay


def mixed() -> nn.Module:
    """A bias, a norm, and weights of 2 and 4 dimensions."""
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def test_matrices_decay_and_biases_and_norms_do_not() -> None:
    """With a gradient of 0 what SGD does is the decay alone."""
    module = mixed()
    optimizer = make_optimizer("sgd", module.parameters(), 0.1, {}, weight_decay=0.5)
    assert optimizer is not None
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    for value in module.parameters():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    for name, value in module.named_parameters():
        factor = 1 - 0.1 * 0.5 if value.ndim > 1 else 1.0
        torch.testing.assert_close(value.detach(), before[name] * factor)


def test_an_empty_group_is_left_out() -> None:
    for parameters, decay in ((weights(), 0.5), ([nn.Parameter(torch.ones(2))], 0.0)):
        optimizer = make_optimizer("adamw", parameters, 0.1, {}, weight_decay=0.5)
        assert optimizer is not None
        assert [group["weight_decay"] for group in optimizer.param_groups] == [decay]


def test_without_weight_decay_the_optimizers_own_stays() -> None:
    optimizer = make_optimizer("adamw", mixed().parameters(), 0.1, {})
    assert optimizer is not None
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2]


@pytest.mark.parametrize("trainable", [True, False])
def test_a_weight_decay_that_cannot_be_is_refused(trainable: bool) -> None:
    given = weights(trainable=trainable)
    with pytest.raises(MethodError, match="weight_decay is -1; give at least 0"):
        make_optimizer("adam", given, 0.1, {}, weight_decay=-1)
    with pytest.raises(MethodError, match="optimizer 'rprop' has no weight decay"):
        make_optimizer("rprop", given, 0.1, {}, weight_decay=0.1)
    with pytest.raises(MethodError, match="give one of them"):
        make_optimizer("adam", given, 0.1, {"weight_decay": 0.1}, weight_decay=0.1)
