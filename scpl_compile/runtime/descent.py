"""From the gradients of a stage to its update: scaling, accumulation, clipping, the optimizer."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scpl_compile.errors import ProgramError, TrainingError
from scpl_compile.runtime.sharding import like
from scpl_compile.runtime.step_options import StepOptions

__all__ = ["Descent"]


class Descent:
    """The optimizer of one stage, and what comes between its gradients and it.

    optimizer: None where the stage trains nothing. learning_rate: of every step.

    With fp16 the host reads once per update whether a gradient was infinite, as torch's GradScaler
    does; such an update is left out and the scale is halved.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        learning_rate: Callable[[int], float],
        options: StepOptions,
        device: torch.device,
    ) -> None:
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self._options = options
        groups = optimizer.param_groups if optimizer is not None else ()
        self._places = {id(p): i for i, p in enumerate(p for g in groups for p in g["params"])}
        self._parameters = {
            name: parameter
            for name, parameter in module.named_parameters()
            if id(parameter) in self._places
        }
        is_scaled = options.amp == "fp16" and optimizer is not None
        self._scaler = torch.amp.GradScaler(device.type) if is_scaled else None

    def root(self, loss: Tensor) -> Tensor:
        """What backward begins with instead of `loss`."""
        if self._options.accumulate > 1:
            loss = loss / self._options.accumulate
        return loss if self._scaler is None else self._scaler.scale(loss)

    def update(self, step: int) -> None:
        """U: one optimizer step, where `step` is the last of those that it is for."""
        optimizer = self.optimizer
        if optimizer is None or (step + 1) % self._options.accumulate:
            return
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        if self._scaler is None:
            self._clip()
            optimizer.step()
        elif any(parameter.grad is not None for parameter in self._parameters.values()):
            self._scaler.unscale_(optimizer)
            self._clip()
            self._scaler.step(optimizer)
            self._scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def _clip(self) -> None:
        if self._options.clip_norm:
            nn.utils.clip_grad_norm_(self._parameters.values(), self._options.clip_norm)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON values): the optimizer, gradients that wait for it, the scale.

        The optimizer's entries go by the place of their parameter in the stage.
        """
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        if self.optimizer is None:
            return tensors, values
        values["optimizer"] = type(self.optimizer).__name__
        for place, (name, parameter) in enumerate(self._parameters.items()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                kept: dict[str, Any] = tensors if isinstance(value, Tensor) else values
                kept[f"optimizer.{place}.{key}"] = value
            if parameter.grad is not None:
                tensors[f"gradient.{name}"] = parameter.grad
        if self._scaler is not None:
            values["scaler"] = self._scaler.state_dict()
        return tensors, values

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises:
            TrainingError: it is of another optimizer, or only one of the two is scaled (fp16).
        """
        if self.optimizer is None:
            return
        own = type(self.optimizer).__name__
        if values.get("optimizer") != own:
            raise TrainingError(
                f"the checkpoint is of the optimizer {values.get('optimizer')}, not {own}; resume "
                "with the same optimizer"
            )
        if ("scaler" in values) != (self._scaler is not None):
            which = ("without", "with") if self._scaler is not None else ("with", "without")
            raise TrainingError(
                f"the checkpoint is of a run {which[0]} amp fp16, this one is {which[1]}; resume "
                "with the same amp"
            )
        if self._scaler is not None:
            self._scaler.load_state_dict(values["scaler"])
        self._load_optimizer(tensors, values)
        for name, parameter in self._parameters.items():
            gradient = tensors.get(f"gradient.{name}")
            # In the parameter's memory format, or the norm would be summed in another order.
            parameter.grad = (
                None
                if gradient is None
                else torch.empty_like(parameter).copy_(like(gradient, parameter))
            )

    def _load_optimizer(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        assert self.optimizer is not None
        parameters = list(self._parameters.values())
        places = [self._places[id(parameter)] for parameter in parameters]
        state: dict[int, dict[str, Any]] = {}
        for source in (tensors, values):
            for path, value in source.items():
                if path.startswith("optimizer."):
                    _, place, key = path.split(".", 2)
                    parameter = parameters[int(place)]
                    if isinstance(value, Tensor) and not _fits(value, parameter):
                        raise ProgramError(
                            f"{path!r} is {tuple(value.shape)} in the checkpoint, for a parameter "
                            f"{tuple(parameter.shape)}; remove it to resume earlier"
                        )
                    state.setdefault(places[int(place)], {})[key] = like(value, parameter)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _fits(value: Tensor, parameter: Tensor) -> bool:
    """Whether it can be an optimizer's, of this parameter: a number, of its shape, or of rows or
    columns of it (Adafactor).
    """
    return value.numel() == 1 or (
        value.ndim == parameter.ndim
        and all(one in (1, own) for one, own in zip(value.shape, parameter.shape, strict=True))
    )
