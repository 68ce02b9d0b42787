"""The calls of CUDA by which stages on streams of their own are kept in order.

All of them go through one object, so that the same code runs on a simulated GPU, which tells
whether every read comes after its write (tests/runtime/races.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Gpu"]


class Gpu:
    """CUDA."""

    def stream(self, device: torch.device, *, is_new: bool) -> torch.cuda.Stream | None:
        """A new stream of `device`, or the current one; None where it is no GPU."""
        if device.type != "cuda":
            return None
        return torch.cuda.Stream(device) if is_new else self.current_stream(device)

    def current_stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream on which the calling thread launches."""
        return torch.cuda.current_stream(device)

    @contextmanager
    def scope(self, device: torch.device, stream: torch.cuda.Stream) -> Iterator[None]:
        """What the calling thread launches inside goes to `stream`, which is one of `device`."""
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield

    def holds(self, value: Tensor) -> bool:
        """Whether `value` lies in the memory of a GPU."""
        return value.is_cuda

    def keep(self, value: Tensor, stream: torch.cuda.Stream) -> None:
        """When `value` is freed, `stream` may still read it: its memory is used again later."""
        value.record_stream(stream)
