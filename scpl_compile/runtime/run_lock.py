"""One process at a time in a run directory: a lock on the file `.NAME.lock` beside it.

The system lets go of the lock when its process ends, however it ends, so the file of a killed run
blocks nobody.
"""

import errno
import fcntl
import os
from pathlib import Path

from scpl_compile.errors import ProgramError

__all__ = ["RunLock"]

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system answers that has no locks; then there is none."""


class RunLock:
    """Held from its making until `release`, or until the process ends.

    Raises:
        ProgramError: another process holds it, or its file cannot be written.
    """

    def __init__(self, run: Path) -> None:
        resolved = run.resolve()
        self._path = resolved.parent / f".{resolved.name}.lock"
        parents = self._path.parents
        self._made = [parent for parent in parents if not parent.exists()]
        try:
            self._file: int | None = self._acquire()
        except BlockingIOError:
            raise ProgramError(
                f"{run} is in use by another process; wait for it, or choose another --run-dir"
            ) from None
        except OSError as error:
            self._remove_made()
            raise ProgramError(
                f"{run} cannot be written ({error}); make room, or choose another --run-dir"
            ) from error

    def _acquire(self) -> int:
        while True:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # who had made the parent has just removed it
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(file)
                    raise
            if self._is_at_path(file):
                return file
            os.close(file)  # its owner has removed it since it was opened

    def _is_at_path(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the file and let go; nothing more the second time.

        In this order: who has opened the file meanwhile sees that it is gone and makes a new one.
        """
        if self._file is None:
            return
        self._path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None
        self._remove_made()

    def _remove_made(self) -> None:
        for parent in self._made:
            try:
                parent.rmdir()
            except OSError:  # there is a run in it
                return
