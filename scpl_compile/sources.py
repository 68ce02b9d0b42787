"""From what a user names to a model and its inputs.

::

    "torchvision:resnet18"   "net.py:build"   "package.module:build"  ─ load_model ─▶ nn.Module
    "3x32x32"   "ids:int64:128<30000,mask:int64:128<2"  ─ parse_inputs ─▶ InputSpec ─▶ tensors
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scpl_compile.errors import ProgramError, SourceError
from scpl_compile.ir import InputSpec, ModelSource, Scalar
from scpl_compile.runtime.checkpoint import load_tensors
from scpl_compile.runtime.loading import file_sha256, load_callable, load_object

__all__ = [
    "Shapes",
    "check_output",
    "example_inputs",
    "load_model",
    "load_weights",
    "output_shapes",
    "parse_config",
    "parse_inputs",
]

Shapes = tuple[int, ...] | list[Any] | dict[str, Any]
"""A model's output as plain shapes: a tuple for one tensor, a list or a dict for several."""

_FLOATS = ("float32", "float64", "float16", "bfloat16")
_INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
_DTYPES = (*_FLOATS, *_INTEGERS, "bool")
_INPUT_EXAMPLES = "as in 3x32x32 or ids:int64:128<30000,mask:int64:128<2"

# Families of torchvision.models (a builder's module is torchvision.models.FAMILY.…) that do not
# give one (B, num_classes) tensor, or do not train.
_REFUSED_FAMILIES = {
    "detection": "a detection model",
    "segmentation": "a segmentation model",
    "optical_flow": "an optical flow model",
    "quantization": "a quantized model, which does not train",
}


def load_model(
    spec: str,
    *,
    num_classes: int | None = None,
    config: Mapping[str, Scalar] | None = None,
    weights: Path | None = None,
) -> tuple[nn.Module, ModelSource]:
    """Build the model that `spec` names, and say how to build it again.

    spec: `torchvision:NAME`, `file.py:name` or `package.module:name`, where name is a callable
        that returns an nn.Module, or a module itself.
    num_classes: goes to torchvision's constructors only; `check_output` compares it for all.
    config: keyword arguments of the constructor.
    weights: a .safetensors file with exactly the model's names.

    Raises:
        SourceError: anything of this is missing, unknown or does not fit.
    """
    arguments = dict(config or {})
    prefix, _, name = spec.rpartition(":")
    if not prefix or not name:
        raise SourceError(
            f"model {spec!r} names no constructor; write torchvision:resnet18, file.py:build or "
            "package.module:build"
        )
    if prefix == "torchvision":
        model, source = _load_torchvision(name, num_classes, arguments)
    elif prefix.split(":")[0] in ("timm", "hf"):
        raise SourceError(
            f"{spec}: {prefix.split(':')[0]}: models come later; for now name a callable that "
            "returns the model: file.py:build"
        )
    else:
        model, source = _load_own(spec, prefix, name, arguments)
    if weights is not None:
        load_weights(model, weights)
    return model, source


def _load_torchvision(
    name: str, num_classes: int | None, config: dict[str, Scalar]
) -> tuple[nn.Module, ModelSource]:
    spec = f"torchvision:{name}"
    for option in ("weights", "pretrained"):
        if option in config:
            raise SourceError(
                f"{spec}: config {option} is not taken, nothing is downloaded; save the state_dict "
                "as safetensors and pass --weights FILE"
            )
    if num_classes is not None and config.setdefault("num_classes", num_classes) != num_classes:
        raise SourceError(
            f"{spec}: --num-classes says {num_classes}, --config says "
            f"num_classes={config['num_classes']}; give one of them"
        )
    builder = _torchvision_builder(name)
    if name in ("googlenet", "inception_v3"):
        config.setdefault("init_weights", True)  # their default, which warns unless written out
    model = _build(spec, builder, config)
    return model, ModelSource(spec=spec, config=config)


def _torchvision_builder(name: str) -> Callable[..., Any]:
    try:
        models = import_module("torchvision.models")
    except ImportError as error:
        raise SourceError(
            f"torchvision:{name} needs torchvision; pip install 'scpl-compile[demo]' ({error})"
        ) from error
    families = {known: _family(models.get_model_builder(known)) for known in models.list_models()}
    if name not in families:
        usable = [known for known, family in families.items() if family not in _REFUSED_FAMILIES]
        close = get_close_matches(name, usable, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "as in torchvision:resnet18"
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


def _load_own(
    spec: str, home: str, name: str, config: dict[str, Scalar]
) -> tuple[nn.Module, ModelSource]:
    if home.endswith(".py"):
        path = Path(home).expanduser().resolve()
        target = load_callable(path, name)
        source = ModelSource(spec=spec, config=config, path=str(path), sha256=file_sha256(path))
    else:
        target = load_object(spec)
        source = ModelSource(spec=spec, config=config)
    if not isinstance(target, nn.Module):
        return _build(spec, target, config), source
    if config:
        raise SourceError(
            f"{spec} is a model already and takes no config ({', '.join(config)}); name a "
            "function that builds it"
        )
    return copy.deepcopy(target), replace(source, is_object=True)


def _build(spec: str, constructor: Any, config: Mapping[str, Scalar]) -> nn.Module:
    if not callable(constructor):
        raise SourceError(
            f"{spec} is of type {type(constructor).__name__}; it must be an nn.Module or a "
            "callable that returns one"
        )
    try:
        model = constructor(**config)
    except Exception as error:
        hint = "; its arguments come from --config" if isinstance(error, TypeError) else ""
        raise SourceError(f"{spec} failed with {type(error).__name__}: {error}{hint}") from error
    if not isinstance(model, nn.Module):
        raise SourceError(f"{spec} returned {type(model).__name__}, not an nn.Module")
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a .safetensors file into `model`; the names must be the model's, all of them.

    A name may be missing where the model ties it to one that is there.

    Raises:
        SourceError: the file is missing or torn; a name is missing, unknown, or of another shape.
    """
    if path.suffix != ".safetensors":
        raise SourceError(
            f"weights {path} must be a .safetensors file (others are pickles, which run code); "
            "write it with safetensors.torch.save_file(model.state_dict(), …)"
        )
    try:
        tensors, _ = load_tensors(path)
    except ProgramError as error:
        raise SourceError(f"weights {error}") from error
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    given = {own[name].data_ptr() for name in tensors if name in own}
    missing = [n for n in own if n not in tensors and own[n].data_ptr() not in given]
    unexpected = [name for name in tensors if name not in own]
    facts = [
        f"{len(names)} {word} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for word, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if facts:
        raise SourceError(f"weights {path} are not this model's: {' and '.join(facts)}")
    for name, value in tensors.items():
        if value.shape != own[name].shape:
            raise SourceError(
                f"weights {path}: {name} is {tuple(value.shape)}, the model's is "
                f"{tuple(own[name].shape)}"
            )
    model.load_state_dict(tensors, strict=False)


def parse_inputs(text: str, forward_parameter_names: Sequence[str]) -> tuple[InputSpec, ...]:
    """Inputs from `[name:][dtype:]SHAPE[<high]`, separated by commas, batch left out.

    A piece without a name is the parameter of forward at the same position; without a dtype it
    is float32. Integers need `<high`, one more than the largest.

    Raises:
        SourceError: names the piece that is wrong.
    """
    specs: list[InputSpec] = []
    for position, piece in enumerate(text.split(",")):
        spec = _parse_input(piece.strip(), position, forward_parameter_names)
        if spec.name in (other.name for other in specs):
            raise SourceError(f"input {piece!r}: {spec.name} is given twice")
        specs.append(spec)
    return tuple(specs)


def _parse_input(piece: str, position: int, names: Sequence[str]) -> InputSpec:
    *front, rest = piece.split(":")
    name = front.pop(0) if front and front[0] not in _DTYPES else ""
    dtype = front.pop(0) if front else "float32"
    match = re.fullmatch(r"((?:[0-9]+(?:x[0-9]+)*)?)(?:<([0-9]+))?", rest)
    if front or not match or not piece:
        raise SourceError(f"input {piece!r} is not [name:][dtype:]SHAPE[<high], {_INPUT_EXAMPLES}")
    if dtype not in _DTYPES:
        raise SourceError(f"input {piece!r}: dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    if not name:
        if position >= len(names):
            raise SourceError(f"input {piece!r}: forward takes {len(names)} inputs, not more")
        name = names[position]
    if name not in names:
        raise SourceError(f"input {piece!r}: forward has no {name!r}; it has {', '.join(names)}")
    shape = tuple(map(int, match[1].split("x"))) if match[1] else ()
    high = int(match[2]) if match[2] else None
    if 0 in shape or high == 0:
        raise SourceError(f"input {piece!r}: a size or a bound is 0, {_INPUT_EXAMPLES}")
    if (dtype in _INTEGERS) != (high is not None):
        need = "needs its bound <high" if high is None else f"takes no bound <{high}"
        raise SourceError(f"input {piece!r}: {dtype} {need}, {_INPUT_EXAMPLES}")
    return InputSpec(name=name, dtype=dtype, shape=shape, high=high)


def parse_config(text: str) -> dict[str, Scalar]:
    """`a=1,b=2.5,c=true,d=text` as {"a": 1, "b": 2.5, "c": True, "d": "text"}.

    Raises:
        SourceError: names the piece that is wrong.
    """
    config: dict[str, Scalar] = {}
    for piece in filter(None, map(str.strip, text.split(","))):
        name, equals, value = (part.strip() for part in piece.partition("="))
        if not equals or not name.isidentifier():
            raise SourceError(f"config {piece!r} is not name=value, as in width=64,norm=true")
        if name in config:
            raise SourceError(f"config {piece!r}: {name} is given twice")
        config[name] = _parse_scalar(value)
    return config


def _parse_scalar(text: str) -> Scalar:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return text
    return number if isfinite(number) and "_" not in text else text


def example_inputs(
    specs: Sequence[InputSpec], batch_size: int, seed: int = 0
) -> tuple[Tensor, ...]:
    """Random inputs (B, *shape), equal for equal seeds: normal floats, integers below `high`.

    In a mask (bool, or integers below 2) the first position is 1, so that no row is all padding.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(_example(spec, batch_size, generator) for spec in specs)


def _example(spec: InputSpec, batch_size: int, generator: torch.Generator) -> Tensor:
    shape = (batch_size, *spec.shape)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if spec.dtype in _FLOATS:
        return torch.randn(shape, generator=generator).to(dtype)
    high = 2 if spec.high is None else spec.high
    values = torch.randint(high, shape, generator=generator)
    if high == 2 and spec.shape:
        values[..., 0] = 1
    return values.to(dtype)


def output_shapes(output: Any) -> Shapes:
    """The shapes of a model's output, for `check_output`; what is no tensor becomes an empty list.

    A mapping (also transformers' ModelOutput) becomes a dict, any other sequence a list.
    """
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, Mapping):
        return {str(name): output_shapes(value) for name, value in output.items()}
    if isinstance(output, (list, tuple)):
        return [output_shapes(value) for value in output]
    return []


def check_output(shapes: Shapes, *, num_classes: int | None, batch_size: int) -> int:
    """The number of classes of a model whose output at `batch_size` has these shapes.

    Raises:
        SourceError: the output is not one (B, num_classes) tensor; says what it is and what to do.
    """
    wrap = "name a callable whose model returns one (B, num_classes) tensor: file.py:build"
    if isinstance(shapes, dict):
        raise SourceError(f"the model gives a dict ({', '.join(shapes) or 'empty'}); {wrap}")
    if isinstance(shapes, list):
        raise SourceError(
            f"the model gives {len(shapes)} outputs; {wrap} (torchvision's googlenet and "
            "inception_v3: --config aux_logits=false)"
        )
    if not shapes or shapes[0] != batch_size:
        raise SourceError(f"the model gives {shapes} for a batch of {batch_size}; {wrap}")
    if len(shapes) == 1 or shapes[1:] == (1,):
        raise SourceError(
            f"the model gives {shapes}: one number per sample is a regression; scpl needs classes: "
            "two outputs for a yes or no, or bins"
        )
    if len(shapes) == 3:
        raise SourceError(
            f"the model gives {shapes}: a prediction per token (a language model?); scpl needs "
            "one label per sample: pool over the tokens in forward"
        )
    if len(shapes) > 3:
        raise SourceError(
            f"the model gives {shapes}: a prediction per pixel or a feature map; scpl needs one "
            "label per sample: pool and classify in forward"
        )
    if num_classes is not None and shapes[1] != num_classes:
        raise SourceError(
            f"the model gives {shapes[1]} classes, --num-classes says {num_classes}; pass "
            f"--config num_classes={num_classes} (or the constructor's own name for it)"
        )
    return shapes[1]
