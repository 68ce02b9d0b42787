"""Models and inputs from the name that a user gave a model."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from scpl_compile.errors import SourceError
from scpl_compile.ir import InputSpec, ModelSource, Scalar
from scpl_compile.runtime.progress import say
from scpl_compile.sources.building import Notice
from scpl_compile.sources.hugging_face import load_hugging_face
from scpl_compile.sources.hugging_face_inputs import hugging_face_inputs
from scpl_compile.sources.own import load_own
from scpl_compile.sources.timm import load_timm, timm_inputs
from scpl_compile.sources.torchvision import load_torchvision, torchvision_inputs
from scpl_compile.sources.weights import load_weights

__all__ = ["derive_inputs", "load_model"]


def load_model(
    spec: str,
    *,
    num_classes: int | None = None,
    config: Mapping[str, Scalar] | None = None,
    weights: Path | None = None,
    notice: Notice = say,
) -> tuple[nn.Module, ModelSource]:
    """Build the model that `spec` names, and say how to build it again.

    spec: `torchvision:NAME`, `timm:NAME`, `hf:TYPE`, `hf:PATH`, or `file.py:name` or
        `package.module:name`, where name is a callable that returns an nn.Module, or a module
        itself.
    num_classes: goes to the constructors of libraries only; `check_output` compares it for all.
    config: keyword arguments of the constructor.
    weights: a .safetensors file with exactly the model's names.
    notice: takes what the user should know, one line each.

    Raises:
        SourceError: anything of this is missing, unknown or does not fit.
    """
    arguments = dict(config or {})
    library, _, name = spec.partition(":")
    if not library or not name or spec.endswith(":"):
        raise SourceError(
            f"model {spec!r} names no constructor; write torchvision:resnet18, timm:resnet18, "
            "hf:bert, file.py:build or package.module:build"
        )
    if library == "torchvision":
        model, source = load_torchvision(name, num_classes, arguments, notice)
    elif library == "timm":
        model, source = load_timm(name, num_classes, arguments)
    elif library == "hf":
        model, source = load_hugging_face(
            name, num_classes, arguments, notice, own_weights=weights is not None
        )
    else:
        model, source = load_own(spec, arguments)
    if weights is not None:
        load_weights(model, weights)
    return model, source


def derive_inputs(model: nn.Module, source: ModelSource | None) -> tuple[InputSpec, ...]:
    """The inputs of a model of a library, from its own configuration.

    Raises:
        SourceError: they are not known from it, or the model is the user's own.
    """
    library, _, name = ("", "", "") if source is None else source.spec.partition(":")
    if source is not None and library == "torchvision":
        return torchvision_inputs(name, source.config)
    if source is not None and library == "timm":
        return timm_inputs(model, source.config)
    if source is not None and library == "hf":
        return hugging_face_inputs(source.spec, model)
    raise SourceError(
        "no input is given, and a model of your own does not say it: give example tensors, or the "
        "shape without the batch with --input, as in 3x32x32 or ids:int64:128<30000"
    )
