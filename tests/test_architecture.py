"""The rules of the source that keep it simple, read from its syntax trees.

Import order, left never imports right: see ORDER. No cycles; sorted `__all__`; short functions and
files; imports on top; and the command line answers `--help` without torch.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "scpl_compile"

ORDER = (
    "errors", "version", "json_form", "ir", "actions", "kernels", "runtime", "inputs", "sources",
    "capture",
    "cost", "partition", "methods", "cutting", "emit", "verify", "report", "demo_net",
    "api", "demo", "bench", "train_command", "cli",
)  # fmt: skip
"""Left never imports right."""

LAZY = {"torchvision", "timm", "transformers", "sklearn", "rich", "tensorboard", "PIL"}
"""Optional or slow packages, which a function may import."""

TORCH_FREE = ("errors", "version", "json_form", "ir", "actions")
MAX_FUNCTION_LINES, MAX_FILE_LINES = 60, 400


@cache
def sources() -> dict[str, Path]:
    """Every module of the package by name, those of kernels/ as scpl_compile.kernels."""
    found = {}
    for path in [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "kernels":
            parts = (PACKAGE, *parts)
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text(encoding="utf-8"))


def functions(module: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(module)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """The modules that these nodes import; of `from package import name` the module `name`."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in sources() else node.module)
    return found


def part_of(module: str) -> str:
    """`runtime` of scpl_compile.runtime.lane; "" of the package itself."""
    return module.split(".")[1] if "." in module else ""


def is_ours(module: str) -> bool:
    return module.split(".")[0] == PACKAGE


modules = pytest.mark.parametrize("module", sorted(sources()))

# ---------------------------------------------------------------------- imports


def test_every_part_has_its_place_in_the_order() -> None:
    parts = {part_of(module) for module in sources()} - {""}
    assert parts == set(ORDER)
    assert len(sources()) > 40 and "scpl_compile.kernels.supcon" in sources()


@modules
def test_no_part_imports_a_part_to_its_right(module: str) -> None:
    if module == PACKAGE:
        return  # the public names, loaded when they are used
    place = ORDER.index(part_of(module))
    for other in filter(is_ours, imported(ast.walk(tree(module)))):
        assert part_of(other), f"{module} imports {other}: the package's own names are for users"
        assert ORDER.index(part_of(other)) <= place, f"{module} imports {other}"


def test_modules_import_each_other_in_no_circle() -> None:
    """What an import statement on top runs; a package's own file runs before its modules do."""
    graph = {
        module: {
            other
            for other in filter(is_ours, imported(iter(tree(module).body)))
            if other in sources()
        }
        for module in sources()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@modules
def test_nothing_imports_kernels_by_the_name_of_another_package(module: str) -> None:
    roots = {name.split(".")[0] for name in imported(ast.walk(tree(module)))}
    assert "kernels" not in roots, "PyPI has another package `kernels`: use scpl_compile.kernels"


@pytest.mark.parametrize(
    ("parts", "allowed"),
    [
        (TORCH_FREE, set()),
        (("kernels",), {"torch", "triton"}),
        (("runtime",), {"torch", "numpy", "safetensors", *LAZY}),
    ],
)
def test_a_part_imports_only_these_packages(parts: tuple[str, ...], allowed: set[str]) -> None:
    for module in sources():
        if part_of(module) in parts:
            roots = {name.split(".")[0] for name in imported(ast.walk(tree(module)))}
            foreign = roots - set(sys.stdlib_module_names) - {PACKAGE}
            assert foreign <= allowed, module


@modules
def test_functions_import_optional_packages_only(module: str) -> None:
    if module == f"{PACKAGE}.cli":
        return  # so that --help answers at once
    for function in functions(module):
        inner = {name.split(".")[0] for name in imported(ast.walk(function))}
        assert inner <= LAZY, f"{module}.{function.name} imports {inner - LAZY}"


# ---------------------------------------------------------------------- names, length


def names_in_all(module: str) -> list[str]:
    """`__all__`; version.py has the one name that every module may have."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    assert module == f"{PACKAGE}.version", f"{module} has no __all__"
    return []


def kind_and_name(name: str) -> tuple[bool, bool, str]:
    """CONSTANTS, then Classes, then functions, as ruff's RUF022 sorts."""
    return not name.isupper(), not name[0].isupper(), name


@modules
def test_all_is_sorted_and_every_name_in_it_is_there(module: str) -> None:
    names = names_in_all(module)
    assert names == sorted(set(names), key=kind_and_name)
    defined: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            defined |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {ast.unparse(target) for target in targets}
    assert set(names) <= defined


@modules
def test_every_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(tree(module))


@modules
def test_functions_are_short(module: str) -> None:
    for function in functions(module):
        body = function.body
        if ast.get_docstring(function) is not None:
            body = body[1:]
        if body:
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{module}.{function.name} has {lines} lines"


@modules
def test_files_are_short(module: str) -> None:
    assert len(sources()[module].read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


# ---------------------------------------------------------------------- what is loaded


@pytest.mark.parametrize(
    "program",
    [
        "import scpl_compile; assert scpl_compile.__version__ and scpl_compile.ScplError",
        "import scpl_compile.actions, scpl_compile.ir",
        "from scpl_compile.cli import main; main(['--help'], standalone_mode=False)",
        "from scpl_compile.cli import main; main(['compile', '--help'], standalone_mode=False)",
    ],
)
def test_what_answers_at_once_loads_no_torch(program: str) -> None:
    check = "import sys; print('loaded:', sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{check}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded: []\n")
