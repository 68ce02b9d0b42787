"""The import lines of an emitted file, gathered while its code is written."""

import builtins
import importlib
import keyword
import sys
from collections.abc import Iterable, Set
from contextlib import suppress
from typing import Any

from scpl_compile.emit.layout import WIDTH
from scpl_compile.errors import EmitError

__all__ = ["RUNTIME", "Imports"]

RUNTIME = "scpl_compile.runtime"

_OF_RUNTIME = (
    "Association", "LocalLoss", "Part", "PredSim", "StopGradient", "Trainer", "assemble",
    "binary_cross_entropy", "cross_entropy", "cut", "load_callable", "take",
)  # fmt: skip
_OF_FILE = ("F", "HERE", "STAGES", "build_model", "build_trainer", "operator", "torch")


class Imports:
    """What the file imports; no name means two things in it."""

    def __init__(self, own: Iterable[str] = ()) -> None:
        """own: more names that the file itself defines."""
        self._modules: set[str] = set()
        self._used: set[str] = set()
        self._meaning = {name: (RUNTIME, name) for name in _OF_RUNTIME}
        self._meaning |= {name: ("", name) for name in (*_OF_FILE, *own)}

    @property
    def names(self) -> Set[str]:
        """Names that the file has, or may have, at its top."""
        return self._meaning.keys()

    def module(self, name: str) -> str:
        """The text for an imported module of torch or the standard library."""
        if name == "torch.nn.functional":
            self._modules.add(name)
            return "F"
        self._modules.add(name.split(".")[0])
        return name

    def name(self, module: str, name: str) -> str:
        """The text for `name` of `module`: the name, with a _ where it means something else.

        Raises:
            EmitError: these are no names that an import could have.
        """
        for part in (*module.split("."), name):
            if not part.isidentifier() or keyword.iskeyword(part):
                raise EmitError(f"{name!r} of {module!r} cannot be imported by an import statement")
        local = name
        while hasattr(builtins, local) or self._means_another(local, (module, name)):
            local += "_"
        self._used.add(local)
        return local

    def _means_another(self, local: str, meaning: tuple[str, str]) -> bool:
        return self._meaning.setdefault(local, meaning) != meaning

    def function(self, target: Any) -> str:
        """The text for a function, which must be what its module has under its name.

        Raises:
            EmitError: it is not, or a new process would not find the module.
        """
        module, name = getattr(target, "__module__", None), getattr(target, "__name__", "")
        if module and _is_found(module):
            with suppress(ImportError):
                if getattr(importlib.import_module(module), name, None) is target:
                    return self.name(module, name)
        raise EmitError(
            f"function {name or repr(target)!r} of {module} cannot be imported by name; move the "
            "code that calls it into a submodule, or the function into an installed module"
        )

    def lines(self) -> list[str]:
        """The lines in isort's order: the standard library, an empty line, everything else."""
        return [*self._group(is_standard=True), "", *self._group(is_standard=False)]

    def _group(self, *, is_standard: bool) -> list[str]:
        def belongs(module: str) -> bool:
            return (module.split(".")[0] in sys.stdlib_module_names) == is_standard

        modules = sorted(filter(belongs, self._modules))
        lines = [f"import {name}" + " as F" * (name == "torch.nn.functional") for name in modules]
        grouped: dict[str, list[tuple[str, str]]] = {}
        for local in self._used:
            module, name = self._meaning[local]
            if belongs(module):
                grouped.setdefault(module, []).append((name, local))
        for module in sorted(grouped):
            lines += _import_lines(module, grouped[module])
        return lines


def _is_found(module: str) -> bool:
    """Whether a new process would find the module: not one that was loaded from a named file."""
    top = module.split(".")[0]
    finders = [f.find_spec for f in sys.meta_path if hasattr(f, "find_spec")]
    return top != "__main__" and any(find(top, None) is not None for find in finders)


def _import_lines(module: str, names: list[tuple[str, str]]) -> list[str]:
    """One statement for the plain names, one for each that gets another."""
    plain = sorted((n for n, local in names if n == local), key=_isort_key)
    renamed = [f"from {module} import {n} as {local}" for n, local in names if n != local]
    line = f"from {module} import {', '.join(plain)}"
    if len(line) > WIDTH:
        line = f"from {module} import (\n" + "".join(f"    {name},\n" for name in plain) + ")"
    return [*([line] if plain else []), *sorted(renamed)]


def _isort_key(name: str) -> tuple[bool, bool, str]:
    return (not name.isupper(), not name[0].isupper(), name)
