"""A stage's device and, on CUDA, its own stream there; on CPU the same calls do nothing."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from scpl_compile.errors import MethodError
from scpl_compile.runtime.gpu import Gpu

__all__ = ["Lane", "Mark", "caller_mark", "default_threads", "resolve_devices", "split_devices"]

Mark = torch.cuda.Event | None
"""The point in the sender's stream after which its tensors are there; None on CPU."""

GPU = Gpu()
"""What every lane calls; a test puts a simulated one in its place."""


class Lane:
    """Where one stage runs.

    Two stages on one GPU have two streams, so their kernels may overlap. A tensor that is handed
    over carries a Mark: the receiver's stream waits for it (the host does not), and the caching
    allocator is told that a second stream reads the tensor.

    has_own_stream: False where no other stage is at work in this process: then all is launched on
    the caller's stream, and nothing has to wait for anything.
    """

    def __init__(self, device: torch.device, *, has_own_stream: bool = True) -> None:
        self.device = device
        self.stream = GPU.stream(device, is_new=has_own_stream)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Everything inside is launched on this lane's stream."""
        if self.stream is None:
            yield
        else:
            with GPU.scope(self.device, self.stream):
                yield

    def mark(self) -> Mark:
        """The present end of this lane's stream."""
        return None if self.stream is None else self.stream.record_event()

    def receive(self, values: Mapping[str, Tensor], mark: Mark) -> dict[str, Tensor]:
        """The tensors of a sender on this lane's device, safe to read on this lane's stream.

        From a GPU to the CPU the host waits: it is the host that reads them.
        """
        if mark is not None and self.stream is None:
            mark.synchronize()
        elif mark is not None and self.stream is not None:
            self.stream.wait_event(mark)
        self.keep(values.values())
        is_async = self.stream is not None
        return {
            name: value.to(self.device, non_blocking=is_async) for name, value in values.items()
        }

    def keep(self, values: Iterable[Tensor]) -> None:
        """These were made on another stream; freed, they stay as they are until this one is done.

        Without it their memory would at once be the other stream's, to be written again, while
        this lane's kernels that read it are still to run.
        """
        for value in values:
            if self.stream is not None and GPU.holds(value):
                GPU.keep(value, self.stream)

    def follow(self) -> None:
        """What is launched on this lane from now on comes after what the caller has launched."""
        if self.stream is not None:
            self.stream.wait_stream(GPU.current_stream(self.device))

    def synchronize(self) -> None:
        """The host waits for everything launched on this lane."""
        if self.stream is not None:
            self.stream.synchronize()


def caller_mark(values: Iterable[Tensor]) -> Mark:
    """The present end of the caller's streams on all GPUs that hold `values`; None without any."""
    devices = dict.fromkeys(value.device for value in values if GPU.holds(value))
    if not devices:
        return None
    first, *others = (GPU.current_stream(device) for device in devices)
    for other in others:
        first.wait_stream(other)  # one mark stands for all of them
    mark: Mark = first.record_event()
    return mark


def resolve_devices(names: tuple[str, ...], num_stages: int) -> tuple[torch.device, ...]:
    """The device of each stage: consecutive stages share a device where there are fewer devices.

    Example: 4 stages on ("cuda:0", "cuda:1") give 0, 0, 1, 1: one hop between GPUs, not three.

    Raises:
        MethodError: more devices than stages, an unknown device, or a GPU that is not there.
    """
    if not 0 < len(names) <= num_stages:
        raise MethodError(
            f"{len(names)} devices for {num_stages} stages; name at most one device per stage"
        )
    devices = []
    for name in names:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise MethodError(f"{name!r} is no device; write cpu, cuda:0, …") from error
        if device.type not in ("cpu", "cuda"):
            raise MethodError(f"{name!r} is no device that stages run on; write cpu, cuda:0, …")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise MethodError(
                f"device {name!r} is not there ({torch.cuda.device_count()} GPUs are visible); "
                "run with --devices cpu, or on the machine that it was planned for"
            )
        devices.append(device)
    return tuple(devices[k * len(devices) // num_stages] for k in range(num_stages))


def split_devices(text: str, num_stages: int) -> tuple[str, ...]:
    """The names in "cpu,cuda:0"; for "auto" one visible GPU per stage, or the CPU without any."""
    if text != "auto":
        return tuple(name.strip() for name in text.split(",") if name.strip())
    num_gpus = min(torch.cuda.device_count(), num_stages)
    return tuple(f"cuda:{i}" for i in range(num_gpus)) or ("cpu",)


def default_threads(num_workers: int) -> int:
    """Intra-op threads that `num_workers` workers on this machine's cores can have each."""
    return max(1, (os.cpu_count() or 1) // num_workers)
