"""What `compile_model` is given, an object or a name each, as a model and specs of its inputs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from scpl_compile.errors import SourceError
from scpl_compile.inputs import describe_inputs, forward_parameters, parse_inputs
from scpl_compile.ir import InputSpec, ModelSource, Scalar
from scpl_compile.sources.building import Notice
from scpl_compile.sources.named import derive_inputs, load_model

__all__ = ["Inputs", "resolve_inputs", "resolve_model"]

Inputs = str | Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""Example tensors, batch first; or their shapes as text, without the batch."""


def resolve_model(
    model: nn.Module | str,
    source: str | None,
    num_classes: int | None,
    config: Mapping[str, Scalar] | None,
    weights: Path | None,
    notice: Notice,
) -> tuple[nn.Module, ModelSource | None, str]:
    """(module, where it comes from, its name).

    Raises:
        SourceError: it is no model, or `source` builds another one than the object given.
    """
    if isinstance(model, str):
        module, found = load_model(
            model, num_classes=num_classes, config=config, weights=weights, notice=notice
        )
        return module, found, model
    if not isinstance(model, nn.Module):
        raise SourceError(
            f"the model is of type {type(model).__name__}; give an nn.Module, or name a callable: "
            "'file.py:build'"
        )
    if weights is not None:
        raise SourceError("weights= goes with a model that is named; load them into your object")
    if source is None:
        if config:
            raise SourceError("config= goes with a model that is named, or with source=")
        return model, None, type(model).__name__
    again, found = load_model(source, num_classes=num_classes, config=config, notice=notice)
    given, built = _traits(model), _traits(again)
    if odd := sorted(
        name for name in given.keys() | built.keys() if given.get(name) != built.get(name)
    ):
        raise SourceError(
            f"source {source!r} builds another model than the one given: they differ in {odd[0]!r} "
            f"({given.get(odd[0], 'absent')}, built: {built.get(odd[0], 'absent')}); do in the "
            "callable what was done to the object"
        )
    return model, found, source


def _traits(model: nn.Module) -> dict[str, str]:
    """Shape, dtype and whether it trains, of every tensor of the model's state."""
    trains = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    return {
        name: f"{tuple(value.shape)} {value.dtype}{'' if name in trains else ', does not train'}"
        for name, value in model.state_dict().items()
    }


def resolve_inputs(
    model: nn.Module, inputs: Inputs | None, source: ModelSource | None, notice: Notice
) -> tuple[tuple[InputSpec, ...], int | None]:
    """(specs, batch size of the examples or None); None: derived from the model, with a notice.

    Raises:
        SourceError: they do not fit forward, or cannot be derived.
    """
    if inputs is None:
        specs = derive_inputs(model, source)
        notice(f"input, from the model's own configuration: {','.join(map(str, specs))}")
        return specs, None
    if isinstance(inputs, str):
        return parse_inputs(inputs, forward_parameters(model)), None
    return describe_inputs(model, inputs)
