"""`hf:TYPE` and `hf:PATH`: a classifier of the transformers library.

TYPE is a model_type of transformers ("bert", "vit"), PATH a config.json or a directory with one.
The classes are found by the type of the configuration, so nothing is ever downloaded, and nothing
is run that is not of transformers.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scpl_compile.errors import SourceError
from scpl_compile.ir import ModelSource, Scalar
from scpl_compile.sources.building import Notice, build, closest, with_num_classes

__all__ = ["load_hugging_face"]

_HEADS = ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION")
# Keys of a config.json that say nothing about the model's modules; labels become num_labels.
_NOT_ARGUMENTS = frozenset({
    "_name_or_path", "architectures", "auto_map", "dtype", "id2label", "label2id", "model_type",
    "torch_dtype", "transformers_version",
})  # fmt: skip
# Keys and values of earlier tokens, kept between calls.
_CACHES = ("use_cache", "use_mems_eval", "use_mems_train")
# Taken by every configuration, but no field of its class.
_ALSO_KNOWN = ("num_labels", "attn_implementation")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """What was found at a path: the content of config.json, and the directory if one was named."""

    content: Mapping[str, Any]
    directory: Path | None


def load_hugging_face(
    name: str,
    num_classes: int | None,
    config: Mapping[str, Scalar],
    notice: Notice,
    *,
    own_weights: bool = False,
) -> tuple[nn.Module, ModelSource]:
    """The classifier of an architecture of transformers, with random weights.

    name: a model_type, a config.json, or a directory with one; safetensors in that directory are
        loaded, unless the caller has weights of its own (own_weights). A head that these lack
        stays random.
    num_classes: becomes num_labels. config: keyword arguments of the configuration.

    Raises:
        SourceError: the type is unknown or has no classification head; a key is unknown.
    """
    spec = f"hf:{name}"
    transformers = _library(spec)
    configs = transformers.CONFIG_MAPPING
    stored = None if name in configs else _stored(name, configs)
    model_type = name if stored is None else stored.content.get("model_type")
    if model_type not in configs:
        raise SourceError(
            f"{spec}: its model_type {model_type!r} is none of transformers "
            f"{transformers.__version__}; upgrade transformers, or name a callable: file.py:build"
        )
    config_class = configs[model_type]
    model_class = _model_class(spec, config_class, transformers)
    default = _build_config(spec, config_class, {})
    given = with_num_classes(spec, config, num_classes, "num_labels")
    _check_keys(spec, given, config_class, default)
    arguments = _arguments(spec, config_class, stored, default, given)
    arguments |= _needed_arguments(_build_config(spec, config_class, arguments), arguments)
    whole = _build_config(spec, config_class, arguments)
    directory = None if stored is None or own_weights else stored.directory
    if directory is None:
        model = build(spec, lambda: model_class(whole), {})
    else:
        with _quiet(transformers):
            model = _with_weights(spec, model_class, whole, directory, notice)
    return model.train(), ModelSource(
        spec=spec,
        config=arguments,
        model_class=model_class.__name__,
        config_class=config_class.__name__,
    )


def _library(spec: str) -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise SourceError(
            f"{spec} needs transformers; pip install 'scpl-compile[zoo]' ({error})"
        ) from error


def _stored(name: str, configs: Mapping[str, Any]) -> _Stored:
    path = Path(name).expanduser()
    if not path.exists():
        raise SourceError(
            f"hf:{name} is neither a model_type of transformers nor a local config.json or "
            f"directory (nothing is downloaded); {closest(name, configs, 'as in hf:bert')}"
        )
    file = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"hf:{name}: {file} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise SourceError(
            f"hf:{name}: {file} has no model_type; name the config.json of a model of transformers"
        )
    return _Stored(content=content, directory=path if path.is_dir() else None)


def _model_class(spec: str, config_class: Any, transformers: Any) -> Any:
    """The first classification head that the architecture has."""
    for head in _HEADS:
        mapping = getattr(transformers, f"MODEL_FOR_{head}_MAPPING")
        if (found := mapping.get(config_class, None)) is not None:
            return found[0] if isinstance(found, tuple) else found
    raise SourceError(
        f"{spec}: transformers has no classifier of sequences, images or audio for "
        f"{config_class.__name__}; put a head on the model in a callable of your own: file.py:build"
    )


def _build_config(spec: str, config_class: Any, arguments: Mapping[str, Any]) -> Any:
    """The configuration object.

    Raises:
        SourceError: it refuses an argument.
    """
    try:
        return config_class(**arguments)
    except Exception as error:
        text = " ".join(str(error).split())
        raise SourceError(f"{spec}: {config_class.__name__} refuses this: {text}") from error


def _check_keys(spec: str, given: Mapping[str, Scalar], config_class: Any, default: Any) -> None:
    known = {*(field.name for field in fields(config_class)), *config_class.attribute_map}
    known = {*known, *default.to_dict(), *_ALSO_KNOWN} - _NOT_ARGUMENTS
    for key in given:
        if key not in known:
            hint = closest(key, known, "its documentation lists the arguments")
            raise SourceError(f"{spec}: {config_class.__name__} has no {key!r}; {hint}")


def _arguments(
    spec: str, config_class: Any, stored: _Stored | None, default: Any, given: Mapping[str, Scalar]
) -> dict[str, Any]:
    """`given`, before that what config.json says; what is the default anyway is left out of it."""
    if stored is None:
        return dict(given)
    content = {key: v for key, v in stored.content.items() if key not in _NOT_ARGUMENTS}
    if labels := stored.content.get("id2label"):
        content.setdefault("num_labels", len(labels))
    usual = {**default.to_dict(), "num_labels": default.num_labels}
    changed = {key: v for key, v in content.items() if key not in usual or usual[key] != v}
    short, long = {**changed, **given}, {**content, **given}
    configs = [_build_config(spec, config_class, arguments) for arguments in (short, long)]
    # A default may depend on other arguments, and then be another than in `default`.
    return short if configs[0].to_dict() == configs[1].to_dict() else long


def _needed_arguments(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments without which a classifier could not be trained on batches.

    No cache of keys and values (none in the part for text either); and a padding token within the
    vocabulary, by which heads that read the last token find it.
    """
    found: dict[str, Any] = {
        name: False for name in _CACHES if getattr(config, name, False) and name not in given
    }
    if getattr(getattr(config, "text_config", None), "use_cache", False):
        found["text_config"] = {**given.get("text_config", {}), "use_cache": False}
    vocab_size = getattr(config, "vocab_size", None)
    if not isinstance(vocab_size, int) or not hasattr(config, "pad_token_id"):
        return found
    if not _is_token(config.pad_token_id, vocab_size) and "pad_token_id" not in given:
        end = getattr(config, "eos_token_id", None)
        found["pad_token_id"] = end if _is_token(end, vocab_size) else 0
    return found


def _is_token(token: Any, vocab_size: int) -> bool:
    return isinstance(token, int) and 0 <= token < vocab_size


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the bar and the table about loaded weights: `_with_weights` tells what matters."""
    logging = transformers.utils.logging
    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


def _with_weights(
    spec: str, model_class: Any, config: Any, directory: Path, notice: Notice
) -> nn.Module:
    """The model with the weights of a directory; of those it lacks, the notice tells.

    Raises:
        SourceError: the files are damaged, or hold less than half of the model.
    """
    if not any(directory.glob("*.safetensors")):
        notice(f"{spec}: no safetensors file is in {directory}, so all weights are random")
        return build(spec, lambda: model_class(config), {})
    try:
        model, found = model_class.from_pretrained(
            directory, config=config, dtype=torch.float32, local_files_only=True,
            use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:
        text = " ".join(str(error).split())
        raise SourceError(f"{spec}: the weights in {directory} cannot be loaded: {text}") from error
    random = sorted({*found["missing_keys"], *(item[0] for item in found["mismatched_keys"])})
    tensors: dict[str, Tensor] = model.state_dict()
    lacking = sum(tensors[name].numel() for name in random if name in tensors)
    if 2 * lacking > sum(value.numel() for value in tensors.values()):
        raise SourceError(
            f"{spec}: the weights in {directory} are another model's, {len(random)} tensors are "
            f"not there or of another shape, such as {random[0]}"
        )
    if random:
        more = ", …" if len(random) > 4 else ""
        notice(f"{spec}: not in {directory}, so random: {', '.join(random[:4])}{more}")
    built: nn.Module = model
    return built
