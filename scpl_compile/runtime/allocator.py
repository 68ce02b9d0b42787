"""What becomes of memory that is freed.

In training it stays with the process, for the next step needs it again: glibc gives every large
block back to the system when it is freed, and the system clears its pages when they are taken
again, in every step. Between two large runs that have little in common it is given back.
"""

import ctypes
import os

__all__ = ["give_back_freed_memory", "keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_MOST = 2**31 - 1
_TOP_PAD = 64 * 2**20


def keep_freed_memory() -> bool:
    """Tell glibc so, for this whole process; whether it was done.

    Not where there is no glibc, or where the user has set a MALLOC_ variable: he knows better.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MOST), (_M_TOP_PAD, _TOP_PAD))
    return all(mallopt(name, value) == 1 for name, value in settings)


def give_back_freed_memory() -> None:
    """Return to the system what glibc holds of freed blocks, pages between live ones too; nothing
    where there is no glibc.
    """
    if (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)
