"""`timm:NAME`: a model of the timm library with random weights."""

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from scpl_compile.errors import SourceError
from scpl_compile.inputs import forward_parameters
from scpl_compile.ir import InputSpec, ModelSource, Scalar
from scpl_compile.sources.building import build, closest, with_num_classes

__all__ = ["load_timm", "timm_inputs"]

# Arguments of timm.create_model that fetch weights, or say where from.
_REFUSED = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
)


def load_timm(
    name: str, num_classes: int | None, config: Mapping[str, Scalar]
) -> tuple[nn.Module, ModelSource]:
    """The model that timm calls `name`; config: keyword arguments of timm.create_model.

    Raises:
        SourceError: there is no such model; an argument does not fit.
    """
    spec = f"timm:{name}"
    for option in _REFUSED:
        if config.get(option):
            raise SourceError(
                f"{spec}: config {option} is not taken, nothing is downloaded; save the state_dict "
                "as safetensors and pass --weights FILE"
            )
    timm = _library(name)
    if not timm.is_model(name):
        # The registry's own names only: timm downloads what begins with hf-hub:
        hint = closest(name, timm.list_models(), "as in timm:resnet18")
        raise SourceError(f"timm has no model {name!r}; {hint}")
    given = {key: value for key, value in config.items() if key not in _REFUSED}
    arguments = with_num_classes(spec, given, num_classes)
    model = build(spec, partial(timm.create_model, name), arguments)
    return model, ModelSource(spec=spec, config=arguments)


def _library(name: str) -> Any:
    try:
        return import_module("timm")
    except ImportError as error:
        raise SourceError(
            f"timm:{name} needs timm; pip install 'scpl-compile[zoo]' ({error})"
        ) from error


def timm_inputs(model: nn.Module, config: Mapping[str, Any]) -> tuple[InputSpec, ...]:
    """Images of timm's own size for `model`, or of the channels and the size in `config`.

    Raises:
        SourceError: the model says no size.
    """
    known: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if len(known.get("input_size") or ()) != 3:
        raise SourceError(
            f"timm does not say which input {type(model).__name__} takes: give its shape with "
            "--input, without the batch, as in 3x224x224"
        )
    channels, height, width = known["input_size"]
    side = config.get("img_size")
    shape = (config.get("in_chans", channels), side or height, side or width)
    return (InputSpec(name=forward_parameters(model)[0], dtype="float32", shape=shape),)
