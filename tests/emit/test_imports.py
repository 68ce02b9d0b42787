"""The import lines of an emitted file."""

import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

from scpl_compile.emit.imports import RUNTIME, Imports
from scpl_compile.errors import EmitError


def test_lines_are_in_isorts_order() -> None:
    imports = Imports()
    imports.name("torch", "nn")
    imports.name("torch", "Tensor")
    imports.name(RUNTIME, "take")
    imports.name(RUNTIME, "cut")
    imports.name(RUNTIME, "Trainer")
    imports.name("typing", "Any")
    imports.name("pathlib", "Path")
    imports.module("torch.nn.functional")
    imports.module("torch")
    imports.module("operator")
    assert imports.lines() == [
        "import operator",
        "from pathlib import Path",
        "from typing import Any",
        "",
        "import torch",
        "import torch.nn.functional as F",
        "from scpl_compile.runtime import Trainer, cut, take",
        "from torch import Tensor, nn",
    ]


def test_a_submodule_of_torch_is_read_through_torch() -> None:
    imports = Imports()
    assert imports.module("torch.linalg") == "torch.linalg"
    assert imports.lines() == ["", "import torch"]


def test_a_name_that_means_something_else_gets_an_underscore() -> None:
    imports = Imports(own=("Stage0",))
    assert imports.name("net", "helper") == "helper"
    assert imports.name("net", "helper") == "helper"
    assert imports.name("other", "helper") == "helper_"
    assert imports.name("net", "build_model") == "build_model_"
    assert imports.name("net", "cut") == "cut_"
    assert imports.name("net", "Stage0") == "Stage0_"
    assert imports.name("net", "print") == "print_"
    assert imports.name(RUNTIME, "cut") == "cut"
    assert imports.lines()[1:] == [
        "from net import helper",
        "from net import Stage0 as Stage0_",
        "from net import build_model as build_model_",
        "from net import cut as cut_",
        "from net import print as print_",
        "from other import helper as helper_",
        "from scpl_compile.runtime import cut",
    ]


def test_a_long_line_is_folded() -> None:
    imports = Imports()
    names = [f"name_number_{i}" for i in range(10, 18)]
    for name in names:
        imports.name("package.module", name)
    lines = "\n".join(imports.lines()[1:]).splitlines()
    assert lines[0] == "from package.module import (" and lines[-1] == ")"
    assert lines[1:-1] == [f"    {name}," for name in names]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("my-package.models", "build"),
        ("net", "a b"),
        ("net", "class"),
        ("a.lambda", "b"),
        ("net;import os", "x"),
    ],
)
def test_what_no_import_statement_could_say_is_an_error(module: str, name: str) -> None:
    with pytest.raises(EmitError, match="cannot be imported by an import statement"):
        Imports().name(module, name)


def test_functions_are_imported_from_where_they_are_defined() -> None:
    imports = Imports()
    assert imports.function(math.sqrt) == "sqrt"
    assert imports.function(Path) == "Path"
    assert imports.lines()[:2] == ["from math import sqrt", "from pathlib import Path"]


def test_a_module_that_only_this_process_has_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("made_here_only")

    def helper() -> None: ...

    helper.__module__ = "made_here_only"
    module.helper = helper
    monkeypatch.setitem(sys.modules, "made_here_only", module)
    with pytest.raises(EmitError, match="'helper' of made_here_only cannot be imported by name"):
        Imports().function(helper)
    helper.__module__ = "__main__"
    with pytest.raises(EmitError, match="'helper' of __main__ cannot be imported by name"):
        Imports().function(helper)
    helper.__module__ = "torch.no_such_part"
    with pytest.raises(EmitError, match="cannot be imported by name"):
        Imports().function(helper)


def test_names_are_all_that_variables_must_not_hide() -> None:
    imports = Imports(own=("Stage0",))
    imports.name("net", "helper")
    assert {"helper", "Stage0", "cut", "HERE", "F", "torch", "build_model"} <= imports.names
