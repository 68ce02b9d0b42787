"""`file.py:name` and `package.module:name`: the user's own callables and models."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from scpl_compile.errors import SourceError
from scpl_compile.ir import ModelSource, Scalar
from scpl_compile.runtime.loading import file_sha256, load_callable, load_object
from scpl_compile.sources.building import build

__all__ = ["load_own"]


def load_own(spec: str, config: Mapping[str, Scalar]) -> tuple[nn.Module, ModelSource]:
    """The model that `spec` names, and where it comes from; a model object is copied.

    Raises:
        SourceError: the file or the module is missing or fails; `spec` names no model.
    """
    home, _, name = spec.rpartition(":")
    if home.endswith(".py"):
        path = Path(home).expanduser().resolve()
        target = load_callable(path, name)
        source = ModelSource(spec=spec, config=config, path=str(path), sha256=file_sha256(path))
    else:
        target = load_object(spec)
        source = ModelSource(spec=spec, config=config)
    if not isinstance(target, nn.Module):
        return build(spec, target, config), source
    if config:
        raise SourceError(
            f"{spec} is a model already and takes no config ({', '.join(config)}); name a "
            "function that builds it"
        )
    return copy.deepcopy(target), replace(source, is_object=True)
