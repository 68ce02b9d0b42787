"""`torchvision:NAME`: a classifier of torchvision.models with random weights.

googlenet and inception_v3 give auxiliary logits in train mode and none in eval mode. They are built
without: a stage has one forward for both modes, and the auxiliary classifiers are no part of what
is evaluated.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import nn

from scpl_compile.errors import SourceError
from scpl_compile.ir import InputSpec, ModelSource, Scalar
from scpl_compile.sources.building import Notice, build, closest, with_num_classes

__all__ = ["load_torchvision", "torchvision_inputs"]

# Families of torchvision.models (a builder's module is torchvision.models.FAMILY.…) that do not
# give one (B, num_classes) tensor, or do not train.
_REFUSED_FAMILIES = {
    "detection": "a detection model",
    "segmentation": "a segmentation model",
    "optical_flow": "an optical flow model",
    "quantization": "a quantized model, which does not train",
}
_WITH_AUXILIARY = ("googlenet", "inception_v3")


def load_torchvision(
    name: str, num_classes: int | None, config: Mapping[str, Scalar], notice: Notice
) -> tuple[nn.Module, ModelSource]:
    """The model that torchvision calls `name`; config: keyword arguments of its builder.

    Raises:
        SourceError: there is no such classifier; an argument does not fit.
    """
    spec = f"torchvision:{name}"
    for option in ("weights", "pretrained"):
        if option in config:
            raise SourceError(
                f"{spec}: config {option} is not taken, nothing is downloaded; save the state_dict "
                "as safetensors and pass --weights FILE"
            )
    arguments = with_num_classes(spec, config, num_classes)
    builder = _builder(name)
    if name in _WITH_AUXILIARY:
        _leave_out_auxiliary(spec, arguments, notice)
    return build(spec, builder, arguments), ModelSource(spec=spec, config=arguments)


def _leave_out_auxiliary(spec: str, arguments: dict[str, Scalar], notice: Notice) -> None:
    if arguments.setdefault("aux_logits", False):
        raise SourceError(
            f"{spec}: config aux_logits=true is not taken, the auxiliary logits are there in train "
            "mode only and a stage has one forward; leave it out"
        )
    arguments.setdefault("init_weights", True)  # their default, which warns unless written out
    notice(f"{spec} is built without its auxiliary classifiers (aux_logits=False)")


def _library(name: str) -> Any:
    try:
        return import_module("torchvision.models")
    except ImportError as error:
        raise SourceError(
            f"torchvision:{name} needs torchvision; pip install 'scpl-compile[demo]' ({error})"
        ) from error


def _builder(name: str) -> Callable[..., Any]:
    models = _library(name)
    families = {known: _family(models.get_model_builder(known)) for known in models.list_models()}
    if name not in families:
        usable = [known for known, family in families.items() if family not in _REFUSED_FAMILIES]
        hint = closest(name, usable, "as in torchvision:resnet18")
        raise SourceError(f"torchvision has no model {name!r}; {hint}")
    if families[name] in _REFUSED_FAMILIES:
        raise SourceError(
            f"torchvision:{name} is {_REFUSED_FAMILIES[families[name]]}; scpl compiles classifiers "
            "that give one (B, num_classes) tensor, such as torchvision:resnet18"
        )
    builder: Callable[..., Any] = models.get_model_builder(name)
    return builder


def _family(builder: Callable[..., Any]) -> str:
    return builder.__module__.split(".")[2]


def torchvision_inputs(name: str, config: Mapping[str, Any]) -> tuple[InputSpec, ...]:
    """The smallest images that published weights of model `name` take, or of config's image_size.

    Raises:
        SourceError: they are not images of one size (videos).
    """
    weights = _library(name).get_model_weights(name)
    sizes = [w.transforms.keywords["crop_size"] for w in weights]
    size = config.get("image_size", min(sizes))
    if not isinstance(size, int):
        raise SourceError(
            f"the input of torchvision:{name} is not known from its name: give its shape with "
            "--input, without the batch, as in 3x16x112x112"
        )
    return (InputSpec(name="x", dtype="float32", shape=(3, size, size)),)
