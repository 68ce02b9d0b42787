"""The text of build_model(): the constructor of the model, written out."""

from keyword import iskeyword
from operator import attrgetter
from typing import Any

from scpl_compile.emit.expressions import argument, constant
from scpl_compile.emit.imports import RUNTIME, Imports
from scpl_compile.emit.layout import Argument, call_lines
from scpl_compile.errors import EmitError
from scpl_compile.ir import ModelSource

__all__ = ["build_model_lines"]

_HEAD = "def build_model() -> nn.Module:"


def build_model_lines(source: ModelSource | None, imports: Imports) -> list[str]:
    """build_model() of a model from `source`; None: a function that says why it cannot be.

    Raises:
        EmitError: the source has no text form.
    """
    if source is None:
        return _refusal(imports)
    if odd := [key for key in source.config if not key.isidentifier() or iskeyword(key)]:
        raise EmitError(f"config {odd[0]!r} is no name of an argument")
    arguments: list[Argument] = [
        argument(value, imports, attrgetter("name"), f"{key}=")
        for key, value in source.config.items()
    ]
    library, _, name = source.spec.partition(":")
    if source.model_class:
        body = _hugging_face(source, arguments, imports)
    elif library == "torchvision":
        found = imports.name("torchvision.models", name)
        body = call_lines(f"return {found}", ["weights=None", *arguments], 4)
    elif library == "timm":
        create = f"return {imports.module('timm')}.create_model"
        body = call_lines(create, [_constant(name, imports), *arguments], 4)
    else:
        body = _own(source, arguments, imports)
    doc = '    """The model as it was compiled; its first weights are in weights.safetensors."""'
    return [_HEAD, doc, *body]


def _refusal(imports: Imports) -> list[str]:
    error = imports.name("scpl_compile.errors", "ProgramError")
    text = '"this program was compiled from a model object; compile it with source="'
    return [
        _HEAD,
        '    """Not possible: the model was given as an object, so its code is not known."""',
        *call_lines(f"raise {error}", [text], 4),
    ]


def _hugging_face(source: ModelSource, arguments: list[Argument], imports: Imports) -> list[str]:
    config_class = imports.name("transformers", source.config_class)
    model_class = imports.name("transformers", source.model_class)
    return [
        *call_lines(f"config = {config_class}", arguments, 4),
        f"    return {model_class}(config)",
    ]


def _own(source: ModelSource, arguments: list[Argument], imports: Imports) -> list[str]:
    module, name = source.spec.rsplit(":", 1)
    lines: list[str] = []
    if source.path is not None:
        loader = imports.name(RUNTIME, "load_callable")
        where = [_constant(text, imports) for text in (source.path, name, source.sha256)]
        found = "model" if source.is_object else "build"
        lines = call_lines(f"{found}: Any = {loader}", where, 4)
    else:
        first, *rest = name.split(".")
        found = ".".join([imports.name(module, first), *rest])
    if source.is_object:
        return [*lines, f"    return {imports.name('copy', 'deepcopy')}({found})"]
    return [*lines, *call_lines(f"return {found}", arguments, 4)]


def _constant(value: Any, imports: Imports) -> str:
    return constant(value, imports, attrgetter("name"))
