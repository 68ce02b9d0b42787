"""A checkpoint that is interrupted anywhere is the one before it, or complete; never half of it."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from scpl_compile.errors import ProgramError
from scpl_compile.runtime import checkpoint

NUM_STAGES = 2
STEPS = (4, 8, 12)
"""Of the checkpoints: when the last is complete, the first is removed."""


class Interrupted(BaseException):
    """The process ends here."""


class Boundaries:
    """Counts the moments at which a process can end, and ends it at one of them."""

    def __init__(self, last: int, error: Callable[[], BaseException] = Interrupted) -> None:
        self.count = 0
        self._last = last
        self._error = error

    def reach(self) -> None:
        if self.count == self._last:
            raise self._error()
        self.count += 1

    def around(self, function: Callable[..., Any], tear: Callable[..., None]) -> Callable[..., Any]:
        """`function` with a moment before it, one after it, and one when it has done half."""

        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.reach()
            if self.count == self._last:
                tear(*arguments)
            self.reach()
            result = function(*arguments, **options)
            self.reach()
            return result

        return wrapped


def half_file(tensors: Any, path: Path, *rest: Any) -> None:
    path.write_bytes(b"\x40" * 100)


def half_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text[: len(text) // 2])


def half_tree(path: Path) -> None:
    (path / "stage-0.safetensors").unlink()


def nothing(*arguments: Any) -> None:
    """A rename is done or not."""


@contextmanager
def bounded(moments: Boundaries) -> Iterator[None]:
    wrapped = (
        (checkpoint, "save_file", half_file),
        (os, "replace", nothing),
        (shutil, "rmtree", half_tree),
        (Path, "unlink", nothing),
        (Path, "write_text", half_text),
    )
    patches = [
        mock.patch.object(owner, name, moments.around(getattr(owner, name), tear))
        for owner, name, tear in wrapped
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def save(run: Path, step: int) -> None:
    directory = checkpoint.step_directory(run, step)
    for stage in range(NUM_STAGES):
        tensors = {"w": torch.full((3,), float(10 * step + stage))}
        checkpoint.save_stage(directory, stage, tensors, {"step": step})
    checkpoint.complete(directory, {"step": step}, NUM_STAGES)


def loaded(run: Path) -> int:
    """The step of the newest checkpoint, all of whose parts must be of that step."""
    newest = checkpoint.latest(run)
    assert newest is not None
    step = checkpoint.read_manifest(newest, NUM_STAGES)["step"]
    for stage in range(NUM_STAGES):
        tensors, values = checkpoint.load_stage(newest, stage)
        assert tensors["w"].tolist() == [10.0 * step + stage] * 3
        assert values == {"step": step}
    assert newest == checkpoint.step_directory(run, step)
    return int(step)


@pytest.mark.parametrize(
    "error", [Interrupted, lambda: OSError(errno.ENOSPC, "No space left on device")]
)
def test_interrupted_anywhere_the_newest_checkpoint_is_whole(
    error: Callable[[], BaseException], tmp_path: Path
) -> None:
    """And the next one is written as if nothing had happened."""
    found = []
    for last in range(1000):
        run = tmp_path / str(last)
        for step in STEPS[:-1]:
            save(run, step)
        moments = Boundaries(last, error)
        try:
            with bounded(moments):
                save(run, STEPS[-1])
        except (Interrupted, OSError):
            found.append(loaded(run))
            save(run, 16)
            assert loaded(run) == 16
            continue
        assert moments.count == last  # no moment is left
        break
    # Two files, a manifest and a removal; before the manifest is there it is the older one.
    assert len(found) > 15
    assert found == sorted(found) and set(found) == {8, 12}


def test_an_older_checkpoint_that_is_half_removed_is_none(tmp_path: Path) -> None:
    for step in STEPS[:-1]:
        save(tmp_path, step)
    with (
        mock.patch.object(shutil, "rmtree", side_effect=Interrupted),
        pytest.raises(Interrupted),
    ):
        save(tmp_path, STEPS[-1])
    assert not (checkpoint.step_directory(tmp_path, STEPS[0]) / "manifest.json").exists()
    assert loaded(tmp_path) == STEPS[-1]


def test_parts_of_two_checkpoints_are_refused(tmp_path: Path) -> None:
    for step in STEPS[:2]:
        save(tmp_path, step)
    first, second = (checkpoint.step_directory(tmp_path, step) for step in STEPS[:2])
    shutil.copy(first / "stage-1.safetensors", second / "stage-1.safetensors")
    with pytest.raises(ProgramError, match=r"stage-1\.safetensors is damaged \(sha256\)"):
        checkpoint.read_manifest(second, NUM_STAGES)
