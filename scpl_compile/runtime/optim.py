"""Optimizers by name."""

import inspect
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from scpl_compile.errors import MethodError
from scpl_compile.runtime.settings import Setting, parse_settings

__all__ = ["make_optimizer", "optimizer_names", "read_options"]


def optimizer_names() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """torch.optim's optimizers by lower-case name, those that need a closure left out."""
    return {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value not in (torch.optim.Optimizer, torch.optim.LBFGS)
    }


def read_options(options: str | Mapping[str, Setting] | None) -> dict[str, Setting]:
    """`momentum=0.9,nesterov=true,betas=0.9/0.98` as keyword arguments.

    Raises:
        MethodError: names the piece that is wrong.
    """
    if not isinstance(options, str):
        return dict(options or {})
    try:
        return parse_settings(options)
    except ValueError as error:
        raise MethodError(f"optimizer option {error}, as in momentum=0.9,nesterov=true") from error


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    lr: float,
    options: Mapping[str, Setting],
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer | None:
    """The optimizer of one stage; None where the stage has nothing to train.

    weight_decay: of the parameters of 2 and more dimensions; the others (biases, norms) then have
    none. They are two groups. With 0 there is one group, with what the options say or torch does.

    Raises:
        MethodError: an unknown name or option, or a value that torch refuses.
    """
    known = optimizer_names()
    if name.lower() not in known:
        raise MethodError(f"optimizer {name!r} is not one of {', '.join(sorted(known))}")
    make = known[name.lower()]
    if weight_decay:
        _check_weight_decay(name, make, options, weight_decay)
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        return None
    try:
        return make(_groups(trainable, weight_decay), **{"lr": lr, **options})
    except (TypeError, ValueError, RuntimeError) as error:
        raise MethodError(
            f"optimizer {name!r} refuses lr={lr}, {dict(options)}: {error}"
        ) from error


def _check_weight_decay(
    name: str, make: Callable[..., object], options: Mapping[str, Setting], weight_decay: float
) -> None:
    if weight_decay < 0:
        raise MethodError(f"weight_decay is {weight_decay}; give at least 0")
    if "weight_decay" not in inspect.signature(make).parameters:
        raise MethodError(f"optimizer {name!r} has no weight decay; leave --weight-decay at 0")
    if "weight_decay" in options:
        raise MethodError(
            f"weight_decay={options['weight_decay']} among the optimizer's options is of all "
            f"parameters, --weight-decay {weight_decay} of matrices; give one of them"
        )


def _groups(trainable: list[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    if not weight_decay:
        return [{"params": trainable}]
    groups = (
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]
