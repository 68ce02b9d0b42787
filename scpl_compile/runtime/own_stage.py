"""A rank holds the tensors of its own stage and no others.

::

    build_model() on the meta device ─ Stage(model) ─▶ its tensors read from weights.safetensors
                   │
                   └─ fails, or keeps tensors outside of parameters and buffers:
                      built on the CPU; what the stage does not take is freed
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from scpl_compile.errors import ProgramError

__all__ = ["build_without_memory", "keep_stage"]


def build_without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    """The model with all tensors on the meta device; on the CPU where that would lose some.

    Some constructors compute with tensors, which have no values on the meta device, and raise. Some
    keep tensors as plain attributes, which no file of weights holds.
    """
    try:
        with torch.device("meta"):
            model = build()
    except Exception:
        return build()
    return build() if _has_plain_tensors(model) else model


def _has_plain_tensors(model: nn.Module) -> bool:
    return any(
        _holds_tensor(value)
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules", "_flat_weights")
    )


def _holds_tensor(value: object) -> bool:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (list, tuple, set)):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, Tensor)


def keep_stage(
    model: nn.Module, stage: nn.Module, names: Mapping[int, str], values: Mapping[str, Tensor]
) -> None:
    """Give the stage's share of `model` its values, and the rest of `model` no memory.

    names: by id, of every parameter and buffer of `model` (a shared one has one name). values: by
    name, of all that `stage` has taken. The stage's heads, which are not of the model, stay.

    Raises:
        ProgramError: a tensor of the stage has no value, or one of another shape or dtype.
    """
    own = {id(tensor) for tensor in (*stage.parameters(), *stage.buffers())}
    replaced: dict[int, Tensor] = {}
    kept: list[Tensor] = []  # so that no id is used again meanwhile
    for module in (*model.modules(), *stage.modules()):
        for name, old in (*module._parameters.items(), *module._buffers.items()):
            if old is None or id(old) not in names:
                continue
            kept.append(old)
            if id(old) not in replaced:
                value = _value(names[id(old)], old, values) if id(old) in own else None
                replaced[id(old)] = _like(old, value)
            # By setattr: a recurrent layer keeps a second list of its weights.
            setattr(module, name, replaced[id(old)])


def _value(name: str, old: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    value = values.get(name)
    if value is None or (value.shape, value.dtype) != (old.shape, old.dtype):
        found = "is missing" if value is None else f"is {tuple(value.shape)} {value.dtype}"
        raise ProgramError(
            f"{name!r} {found} in the weights, and {tuple(old.shape)} {old.dtype} in the model; "
            "was the model's code changed? compile again with --force"
        )
    return value


def _like(old: Tensor, value: Tensor | None) -> Tensor:
    """`value`, or no memory, as the parameter or buffer that `old` is."""
    new = old.detach().to("meta") if value is None else value
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new
