"""Checkpoints: one safetensors file per stage, and a manifest that makes the set complete.

::

    RUN/step-00000050/stage-0.safetensors   parameters, both kinds of buffers, optimizer,
                      stage-1.safetensors   random state
                      manifest.json         step, plan, sha256 of each file; written last

A set without a manifest does not exist; a file whose sha256 differs is refused. Nothing is
unpickled: numbers that are no tensors lie as JSON in the header of their safetensors file.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scpl_compile.errors import ProgramError

__all__ = [
    "complete",
    "latest",
    "load_some",
    "load_stage",
    "load_tensors",
    "read_manifest",
    "read_metadata",
    "read_names",
    "save_stage",
    "save_tensors",
    "sha256_of",
    "step_directory",
]

_KEPT = 2
"""Complete checkpoints that stay; older ones are removed when a newer one is complete."""

_MOST_STEPS = 2**53
"""A checkpoint that says more is damaged; steps are counted in 64 bits."""

_STEP = re.compile(r"step-(\d{8,16})")
"""A checkpoint's directory; what somebody has put beside them under another name is none."""


def step_directory(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return run / f"step-{step:08d}"


def _file_name(stage: int) -> str:
    return f"stage-{stage}.safetensors"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` to `path` in one act: a reader sees the old file or the new one.

    A tensor that occurs under several names is written once; the metadata's "aliases" (JSON) maps
    the other names to it.

    Raises:
        OSError: the file cannot be written.
    """
    seen: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    unique: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        # The key is of the caller's tensor, which stays: a copy's address may be used again.
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        unique[name] = _own_storage(value.detach().cpu().contiguous(), storages)
    # An order of several keys is not kept in the file, so one key less makes equal files equal.
    stored = {**metadata, **({"aliases": json.dumps(aliases)} if aliases else {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        save_file(unique, temporary, metadata=stored or None)
        temporary.chmod(0o644)
        _settle(temporary)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    os.replace(temporary, path)


def _own_storage(tensor: Tensor, taken: set[int]) -> Tensor:
    """`tensor`, or its clone if its storage holds more or was taken by another view of it."""
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.nbytes or storage.data_ptr() in taken:
        tensor = tensor.clone()
    taken.add(tensor.untyped_storage().data_ptr())
    return tensor


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file that `save_tensors` or any other tool wrote.

    Raises:
        ProgramError: the file is missing, torn, or no safetensors file.
    """
    with _opened(path) as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, original in _aliases(path, metadata.pop("aliases", "{}")).items():
        if original not in tensors:
            raise ProgramError(
                f"{path} is damaged: {name!r} stands for {original!r}, which is not there"
            )
        tensors[name] = tensors[original]
    return tensors, metadata


def load_some(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of `names` in such a file, those that are there; the others are not read.

    Raises:
        ProgramError: the file is missing, torn, or no safetensors file.
    """
    with _opened(path) as file:
        aliases = _aliases(path, (file.metadata() or {}).get("aliases", "{}"))
        stored = set(file.keys())
        places = {name: aliases.get(name, name) for name in names}
        return {name: file.get_tensor(place) for name, place in places.items() if place in stored}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, to read from; what is wrong with it as ours."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise ProgramError(f"{path} is missing") from None
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: sizes of more than 63 bits
        raise ProgramError(f"{path} is damaged: {error}") from error


def read_names(path: Path) -> set[str]:
    """All names in such a file, those of shared tensors too; no tensor is read.

    Raises:
        ProgramError: the file is missing, torn, or no safetensors file.
    """
    with _opened(path) as file:
        aliases = _aliases(path, (file.metadata() or {}).get("aliases", "{}"))
        return {*file.keys(), *aliases}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata alone of such a file.

    Raises:
        ProgramError: the file is missing, torn, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ProgramError(f"{path} is damaged: {error}") from error


def _read_header(path: Path, text: str) -> dict[str, Any]:
    """The JSON object in a file's header."""
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise ProgramError(f"{path} is damaged: its header holds {text[:40]!r}") from error
    return value


def _aliases(path: Path, text: str) -> dict[str, str]:
    """The other names of tensors."""
    found = _read_header(path, text)
    if not all(isinstance(original, str) for original in found.values()):
        raise ProgramError(f"{path} is damaged: its header holds {text[:40]!r}")
    return found


def save_stage(
    directory: Path, stage: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Write one stage's state into the checkpoint `directory`."""
    path = directory / _file_name(stage)
    save_tensors(path, tensors, {"values": json.dumps(values)})


def load_stage(directory: Path, stage: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_stage` wrote.

    Raises:
        ProgramError: the file is missing, damaged, or another one.
    """
    path = directory / _file_name(stage)
    tensors, metadata = load_tensors(path)
    return tensors, _read_header(path, metadata.get("values", ""))


def complete(directory: Path, facts: Mapping[str, Any], num_stages: int) -> None:
    """Write the manifest: from now on the checkpoint exists. Removes those that are too old.

    facts: what a resuming run compares: step, plan (digest), and so on.

    Raises:
        OSError: it cannot be written, or a stage's file is not here.
    """
    for name in map(_file_name, range(num_stages)):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory / name} is not on this host; give ranks of several hosts a --run-dir "
                "on a file system that all of them see"
            )
    files = {name: sha256_of(directory / name) for name in map(_file_name, range(num_stages))}
    manifest = {**facts, "files": files}
    temporary = directory / ".manifest.part"
    temporary.write_text(json.dumps(manifest, indent=2))
    _settle(temporary)
    os.replace(temporary, directory / "manifest.json")
    _settle(directory)
    for old in _complete_directories(directory.parent)[:-_KEPT]:
        (old / "manifest.json").unlink()  # first: half a checkpoint is none
        shutil.rmtree(old)


def _settle(path: Path) -> None:
    """Wait until the disk holds a file, or a directory's names, even if the power fails now."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run directory."""
    directories = _complete_directories(run)
    return directories[-1] if directories else None


def _complete_directories(run: Path) -> list[Path]:
    found = [path.parent for path in run.glob("step-*/manifest.json")]
    steps = {path: int(name[1]) for path in found if (name := _STEP.fullmatch(path.name))}
    return sorted(steps, key=steps.__getitem__)


def read_manifest(
    directory: Path, num_stages: int, own: Collection[int] | None = None
) -> dict[str, Any]:
    """The manifest, after the sha256 of every stage's file was compared.

    own: the stages whose files are compared here, where other ranks do so with the others.

    Raises:
        ProgramError: a file is missing or differs from what was written.
    """
    path = directory / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        names = [_file_name(stage) for stage in range(num_stages)]
        hashes = [manifest["files"][name] for name in names]
        if type(manifest["step"]) is not int or not 0 <= manifest["step"] < _MOST_STEPS:
            raise ValueError("step")
        told = _STEP.fullmatch(directory.name)
        if told and int(told[1]) != manifest["step"]:
            raise ValueError("another step than its directory's")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProgramError(f"{path} is damaged; remove {directory} to resume earlier") from error
    for stage, (name, expected) in enumerate(zip(names, hashes, strict=True)):
        file = directory / name
        if not file.is_file():
            raise ProgramError(f"{file} is missing; remove {directory} to resume earlier")
        if (own is None or stage in own) and sha256_of(file) != expected:
            raise ProgramError(f"{file} is damaged (sha256); remove {directory} to resume earlier")
    return manifest


def sha256_of(path: Path) -> str:
    """Of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
