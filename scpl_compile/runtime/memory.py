"""What to do when a stage does not fit into memory."""

import torch

__all__ = ["remedy"]

_SAID = ("out of memory", "can't allocate memory", "cannot allocate memory")
"""What an allocator says that raises a plain RuntimeError."""


def remedy(error: BaseException) -> str:
    """What to append to the message of `error`; nothing where memory is not what is missing."""
    is_missing = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _SAID)
    )
    if not is_missing:
        return ""
    return (
        "; there is not enough memory: give a smaller --batch-size, other --devices, or compile "
        "into more --stages"
    )
