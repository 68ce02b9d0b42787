"""Objects from files and modules that a user names."""

import hashlib
import inspect
import os
import sys

import pytest

from scpl_compile.errors import SourceError
from scpl_compile.runtime.loading import file_sha256, load_callable, load_module, load_object


@pytest.fixture
def write(tmp_path):
    """write("a/net.py", source) gives the path of the file in a fresh folder."""

    def write(name, source):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        return path

    return write


NET = """
class Net:
    class Block:
        pass

def build(width=3):
    return Net()

number = 7
_hidden = build
"""


def test_a_name_in_a_file_and_a_dotted_name(write):
    path = write("net.py", NET)
    assert load_callable(path, "build")(width=2).__class__ is load_callable(str(path), "Net")
    assert load_callable(path, "Net.Block").__qualname__ == "Net.Block"
    assert load_callable(path, "number") == 7  # the caller judges whether it can be called


def test_classes_are_stable_and_their_module_is_known(write):
    path = write("net.py", NET)
    net = load_callable(path, "Net")
    assert load_callable(path, "Net") is net
    assert sys.modules[net.__module__].Net is net
    assert inspect.getsource(net).startswith("class Net:")
    assert inspect.getfile(net) == str(path)


def test_a_relative_path_is_the_same_file(write, monkeypatch):
    path = write("net.py", NET)
    monkeypatch.chdir(path.parent)
    assert load_callable("net.py", "Net") is load_callable(path, "Net")


def test_the_same_content_elsewhere_is_another_module(write):
    first, second = write("a/net.py", "HOME = __file__"), write("b/net.py", "HOME = __file__")
    assert load_module(first).HOME == str(first)
    assert load_module(second).HOME == str(second)


def test_a_changed_file_gives_its_new_content_even_within_one_tick_of_the_clock(write):
    path = write("net.py", "def f(): return 1")
    before = os.stat(path)
    assert load_callable(path, "f")() == 1
    path.write_text("def f(): return 2")  # same size, same time: Python's own cache would miss it
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_callable(path, "f")() == 2
    assert not (path.parent / "__pycache__").exists()


def test_a_file_imports_its_neighbours_and_the_path_is_left_as_it_was(write):
    write("a/helper_of_net.py", "VALUE = 'a'")
    write("a/pieces_of_net/__init__.py", "from . import inner")
    write("a/pieces_of_net/inner.py", "VALUE = 'inner a'")
    path = write("a/net.py", "import helper_of_net as h, pieces_of_net as p")
    before = list(sys.path)
    module = load_module(path)
    assert (module.h.VALUE, module.p.inner.VALUE) == ("a", "inner a")
    assert sys.path == before


def test_a_neighbour_of_another_file_never_stands_in(write):
    source = "import helper_two as h, pieces_two as p\ndef f(): return h.VALUE, p.inner.VALUE"
    for folder in "ab":
        write(f"{folder}/helper_two.py", f"VALUE = '{folder}'")
        write(f"{folder}/pieces_two/__init__.py", "from . import inner")
        write(f"{folder}/pieces_two/inner.py", f"VALUE = '{folder}'")
    first = load_callable(write("a/net.py", source), "f")
    second = load_callable(write("b/net.py", source), "f")
    assert first() == ("a", "a")
    assert second() == ("b", "b")


def test_a_file_that_is_named_like_a_loaded_library_leaves_the_library_alone(write):
    import json

    write("json.py", "raise RuntimeError('not this one')")
    assert load_module(write("net.py", "import json")).json is json


def test_sha256_is_of_the_content(write):
    path = write("net.py", NET)
    digest = hashlib.sha256(NET.encode()).hexdigest()
    assert file_sha256(path) == digest
    assert load_callable(path, "build", digest).__name__ == "build"
    path.write_text(NET + "# changed\n")
    now = file_sha256(path)
    with pytest.raises(
        SourceError, match=f"net.py has changed: .*{digest[:12]}.*{now[:12]}.*resto"
    ):
        load_callable(path, "build", digest)


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"the file .*absent/net.py is missing"):
        load_callable(tmp_path / "absent" / "net.py", "build")
    with pytest.raises(SourceError, match="absent.py is missing"):
        file_sha256(tmp_path / "absent.py")
    with pytest.raises(SourceError, match=f"{tmp_path.name} cannot be read: Is a directory"):
        load_callable(tmp_path, "build")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:", r"net.py failed with SyntaxError: .*line 1"),
        ("import absent_package_of_test", "failed with ModuleNotFoundError: No module named 'abs"),
        ("raise ValueError('no such width')", "failed with ValueError: no such width"),
        ("raise SystemExit(3)", "failed with SystemExit: 3"),
    ],
)
def test_a_file_that_fails_gives_its_error_and_leaves_no_module(write, source, message):
    path = write("net.py", source)
    before = set(sys.modules)
    with pytest.raises(SourceError, match=message) as raised:
        load_callable(path, "f")
    assert type(raised.value.__cause__).__name__ in message
    assert not [name for name in set(sys.modules) - before if name.startswith("scpl_file")]


@pytest.mark.parametrize("is_package", [True, False])
def test_a_relative_import_is_told_with_what_to_write_instead(write, tmp_path, is_package):
    path = write("outer/inner/net.py", "from .helper import VALUE")
    write("outer/inner/helper.py", "VALUE = 1")
    message = "relative import .*import its neighbours by their names, without dots"
    if is_package:
        write("outer/__init__.py", "")
        write("outer/inner/__init__.py", "")
        message = (
            "relative import .*outside of its package: write `from outer.inner import …` in place "
            f"of the dots, with {tmp_path} on PYTHONPATH"
        )
    with pytest.raises(SourceError, match=message):
        load_module(path)


def test_what_it_tells_to_write_instead_works(write, tmp_path, monkeypatch):
    write("outer_two/__init__.py", "")
    write("outer_two/helper.py", "VALUE = 1")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_module(write("outer_two/net.py", "from outer_two import helper")).helper.VALUE == 1
    write("alone/helper_three.py", "VALUE = 3")
    assert load_module(write("alone/net.py", "import helper_three as h")).h.VALUE == 3


def test_an_unknown_name_lists_the_files_callables_the_closest_first(write):
    path = write("net.py", NET.replace("def build", "from json import loads\ndef build"))
    with pytest.raises(SourceError, match="has no 'biuld'; its callables: build, Net$"):
        load_callable(path, "biuld")
    with pytest.raises(SourceError, match="has no 'Net.Blok'; its callables: Net, build$"):
        load_callable(path, "Net.Blok")
    with pytest.raises(SourceError, match="has no 'build'; it has no callable"):
        load_callable(write("empty.py", "number = 3"), "build")
    with pytest.raises(SourceError, match="has no 'load'; its callables: loads$"):
        load_callable(write("imports.py", "from json import loads"), "load")


def test_an_object_of_a_module():
    import collections.abc

    assert load_object("collections:OrderedDict.fromkeys") == collections.OrderedDict.fromkeys
    assert load_object("collections.abc:Mapping") is collections.abc.Mapping


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("collections", "'collections' is not package.module:name"),
        (":name", "is not package.module:name"),
        ("absent_package:build", "no module 'absent_package'; install it, .*file.py:build"),
        ("collections.absent:build", "there is no module 'collections.absent'"),
        ("collections:OrderedDcit", "collections has no 'OrderedDcit'; its callables: OrderedDict"),
    ],
)
def test_modules_and_names_that_are_not_there(spec, message):
    with pytest.raises(SourceError, match=message):
        load_object(spec)


def test_a_module_that_fails_is_told_from_one_that_is_missing(write, monkeypatch):
    path = write("failing_module.py", "import absent_package_of_test")
    monkeypatch.syspath_prepend(path.parent)
    with pytest.raises(SourceError, match="importing failing_module failed with ModuleNotFound"):
        load_object("failing_module:build")
