"""Python objects from the files and modules that a user names.

A file is loaded under a module name that is unique to its absolute path and its content. So the
same file gives the same classes however often it is named, and a changed file never gives the old
ones (Python's own cache of compiled files compares times in whole seconds, and is not used here).
"""

import hashlib
import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.abc import SourceLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from scpl_compile.errors import SourceError

__all__ = ["file_sha256", "load_callable", "load_module", "load_object"]

_LISTED = 8
"""How many names an error message lists."""


def load_callable(path: str | Path, name: str, sha256: str | None = None) -> Any:
    """The attribute `name` (dots allowed) of the Python file `path`.

    sha256: what `file_sha256` gave when the file was last looked at. Whether the attribute is
    callable is left to the caller, who can say what the call must return.

    Raises:
        SourceError: the file is missing, has changed, fails while it is imported, or lacks `name`.
    """
    path = Path(path).expanduser().resolve()
    if sha256 is not None and (found := file_sha256(path)) != sha256:
        raise SourceError(
            f"{path} has changed: its sha256 was {sha256[:12]}… and is {found[:12]}…; restore the "
            "file, or compile again"
        )
    return _attribute(load_module(path), name, str(path))


def load_object(spec: str) -> Any:
    """The object that `package.module:name` names (dots allowed in name).

    Raises:
        SourceError: the module is missing, fails while it is imported, or lacks the name.
    """
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise SourceError(f"{spec!r} is not package.module:name")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise SourceError(
                f"there is no module {missing!r}; install it, put its folder on PYTHONPATH, or "
                f"name the file: path/to/file.py:{name}"
            ) from error
        raise _import_failure(module_name, error) from error
    return _attribute(module, name, module_name)


def load_module(path: str | Path, prefix: str = "scpl_file") -> ModuleType:
    """The Python file `path` as a module whose name is `prefix` and a digest of path and content.

    The file's folder is importable while it loads, so the file can import its neighbours.

    Raises:
        SourceError: the file is missing or fails while it is imported.
    """
    path = Path(path).expanduser().resolve()
    content = _read(path)
    digest = hashlib.sha256(f"{path}\0".encode() + content).hexdigest()
    name = f"{prefix}_{re.sub(r'[^0-9A-Za-z]', '_', path.stem)}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path, loader=_Source(path, content))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _importable(path.parent):
            spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, (Exception, SystemExit)):
            raise _import_failure(str(path), error, _relative_hint(path, error)) from error
        raise
    return module


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's content, hexadecimal.

    Raises:
        SourceError: the file cannot be read.
    """
    return hashlib.sha256(_read(Path(path))).hexdigest()


class _Source(SourceLoader):
    """Loads exactly the bytes that were digested, never a cached compiled file."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self._content = content

    def get_filename(self, fullname: str) -> str:
        return str(self.path)

    def get_data(self, path: str | bytes) -> bytes:
        if path != str(self.path):  # importlib asks for the compiled file first
            raise OSError(f"{path!r} is not {self.path}")
        return self._content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise SourceError(f"the file {path} is missing") from None
    except OSError as error:
        raise SourceError(f"the file {path} cannot be read: {error.strerror}") from error


def _import_failure(place: str, error: BaseException, hint: str = "") -> SourceError:
    return SourceError(f"importing {place} failed with {type(error).__name__}: {error}{hint}")


def _relative_hint(path: Path, error: BaseException) -> str:
    """What to write in place of `from .neighbour import …`."""
    if not isinstance(error, ImportError) or "relative import" not in str(error):
        return ""
    root, package = path.parent, ""
    while (root / "__init__.py").is_file():
        root, package = root.parent, f"{root.name}.{package}"
    if not package:
        return "; a file is loaded by itself, so import its neighbours by their names, without dots"
    return (
        f"; a file is loaded by itself, outside of its package: write `from {package[:-1]} import "
        f"…` in place of the dots, with {root} on PYTHONPATH"
    )


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    _forget_other_neighbours(folder)
    importlib.invalidate_caches()  # a neighbour may be younger than the folder's cached listing
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _forget_other_neighbours(folder: Path) -> None:
    """Drop helper.py of another loaded file from sys.modules, where `folder` has a helper.py too.

    Else the second file would silently get the first one's neighbour.
    """
    known = [(name, getattr(module, "__dict__", {})) for name, module in sys.modules.items()]
    homes = {names["__loader__"].path.parent for _, names in known if _is_loaded_here(names)}
    tops = {item.stem for item in folder.iterdir() if item.suffix == ".py" or item.is_dir()}
    for name, names in known:
        top = name.partition(".")[0]
        if top in tops and _home(top) in homes - {folder} and not _is_loaded_here(names):
            del sys.modules[name]


def _is_loaded_here(names: dict[str, Any]) -> bool:
    return isinstance(names.get("__loader__"), _Source)


def _home(top: str) -> Path | None:
    """The folder that the top-level module or package lies in."""
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is None:
        return None
    path = Path(file)
    return path.parent.parent if path.name == "__init__.py" else path.parent


def _attribute(module: ModuleType, name: str, place: str) -> Any:
    value: Any = module
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            names = _public_callables(module)
            close = get_close_matches(name, names, n=_LISTED)
            listed = (close + [other for other in names if other not in close])[:_LISTED]
            known = f"its callables: {', '.join(listed)}" if listed else "it has no callable"
            raise SourceError(f"{place} has no {name!r}; {known}") from None
    return value


def _public_callables(module: ModuleType) -> list[str]:
    """Own ones where there are any, else also what the module has imported."""
    public = {n: v for n, v in vars(module).items() if not n.startswith("_") and callable(v)}
    own = [n for n, v in public.items() if getattr(v, "__module__", None) == module.__name__]
    return sorted(own or public)
