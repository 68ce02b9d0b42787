"""The pieces of which an emitted stage is written: `take` its modules, `cut` its outputs."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from scpl_compile.errors import ProgramError

__all__ = ["Part", "StopGradient", "as_tuple", "cut", "evaluating", "start_training", "take"]


class Part(nn.Module):
    """What a stage keeps of one of the model's containers: some children, under their own names.

    `self.layer2[1]` and `self.encoder.layer[3]` read in a stage as they read in the model, and
    the names in state_dict are the model's.
    """

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, str(key))


def take(stage: nn.Module, model: nn.Module, *paths: str) -> None:
    """Put the model's modules, parameters and buffers at `paths` into `stage` under the same paths.

    They stay the same objects: what the stage trains is the model.

    Raises:
        ProgramError: the model has nothing at a path, or the stage already uses the name.
    """
    for path in paths:
        *parents, name = path.split(".")
        owner = model
        home = stage
        for parent in parents:
            owner = _child(owner, parent, path)
            if parent not in home._modules:
                _refuse_taken(home, parent, path)
                home.add_module(parent, Part())
            home = home._modules[parent]  # type: ignore[assignment]
        _refuse_taken(home, name, path)
        _attach(home, owner, name, path)


def _child(owner: nn.Module, name: str, path: str) -> nn.Module:
    child = owner._modules.get(name)
    if child is None:
        raise ProgramError(f"the model has no module {path!r}; was it compiled from another model?")
    return child


def _refuse_taken(home: nn.Module, name: str, path: str) -> None:
    if hasattr(home, name):
        raise ProgramError(f"the model's {path!r} would hide the attribute {name!r} of the stage")


def _attach(home: nn.Module, owner: nn.Module, name: str, path: str) -> None:
    if name in owner._modules:
        home.add_module(name, owner._modules[name])
    elif name in owner._parameters:
        home.register_parameter(name, owner._parameters[name])
    elif name in owner._buffers:
        persistent = name not in owner._non_persistent_buffers_set
        home.register_buffer(name, owner._buffers[name], persistent=persistent)
    elif isinstance(getattr(owner, name, None), Tensor):
        home.register_buffer(name, getattr(owner, name), persistent=False)
    else:
        raise ProgramError(f"the model has no {path!r}; was it compiled from another model?")


def cut(value: Tensor, *, clone: bool = False) -> Tensor:
    """What crosses a cut: the value, without its gradient, contiguous.

    clone: where the storage belongs to a parameter, a buffer, a cache or a raw input, its owner
    would change it while the next stage still reads.
    """
    crossing = value.detach().contiguous()
    return crossing.clone() if clone and crossing.data_ptr() == value.data_ptr() else crossing


class StopGradient(nn.Module):
    """Passes a value on and stops its gradient, within a stage.

    A module, so that verify can let the gradient through (`is_open`) and compare with the model's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_open = False

    def forward(self, value: Tensor) -> Tensor:
        """`value`, detached unless `is_open`."""
        return value if self.is_open else value.detach()


def as_tuple(values: Tensor | tuple[Tensor, ...] | Iterable[Tensor]) -> tuple[Tensor, ...]:
    """A stage's forward gives one tensor or a tuple of them; here it is always a tuple."""
    return (values,) if isinstance(values, Tensor) else tuple(values)


def start_training(model: nn.Module) -> None:
    """Put `model` into training mode as a training loop does: by its own train().

    A model in training mode with modules in eval mode stays as it is: somebody holds them there.
    """
    if not model.training or all(module.training for module in model.modules()):
        model.train()


@contextmanager
def evaluating(stages: Sequence[nn.Module]) -> Iterator[None]:
    """Everything in `stages` is in eval mode inside, and afterwards in the mode it was in.

    Module by module: a batch norm that the user holds in eval mode while the rest trains stays so.
    """
    modes = [(module, module.training) for stage in stages for module in stage.modules()]
    try:
        for stage in stages:
            stage.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
