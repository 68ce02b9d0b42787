"""The ranks of a run under torchrun: who runs which stage.

::

    mesh (replica, stage)      stage 0   stage 1   stage 2
                   replica 0   rank 0    rank 1    rank 2      activations go along a row,
                   replica 1   rank 3    rank 4    rank 5      gradients of replicas along a column

torchrun (or whoever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) starts the processes, and
torch.distributed connects them. Small facts travel through its store (meeting.py): which program
each rank runs, losses for the log, the files of a checkpoint, and the first failure.
"""

import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from scpl_compile.errors import MethodError, ScplError, TrainingError
from scpl_compile.runtime.lane import resolve_devices
from scpl_compile.runtime.meeting import TIMEOUT_S, Meeting, meet, reason
from scpl_compile.runtime.ring import Ring

__all__ = ["Ranks", "join", "rank_options", "wants_ranks"]

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def wants_ranks(engine: str) -> bool:
    """Whether this process is one of several: "ranks", or "auto" under torchrun.

    Raises:
        MethodError: another engine; ranks without a launcher; threads in several processes.
    """
    if engine not in ("auto", "threads", "ranks"):
        raise MethodError(f"engine {engine!r} is not one of auto, threads, ranks")
    missing = [name for name in _NEEDED if name not in os.environ]
    if engine == "ranks" and missing:
        raise MethodError(
            f"engine ranks needs a launcher ({missing[0]} is not set); start with: torchrun "
            "--standalone --nproc-per-node STAGES train.py, or: scpl train DIR --engine ranks"
        )
    is_launched = not missing
    if engine == "threads" and is_launched and int(os.environ["WORLD_SIZE"]) > 1:
        raise MethodError(
            f"engine threads runs all stages in one process, and {os.environ['WORLD_SIZE']} were "
            "started; leave out torchrun, or --engine threads"
        )
    return is_launched and engine != "threads"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks(Meeting):
    """This rank's place among the stages.

    columns: for every stage its place in a row of ranks (schedules.stage_columns). device: where
    this rank's tensors live. mesh: DeviceMesh (replica, stage). ring: notices ranks that end.
    """

    columns: tuple[int, ...]
    device: torch.device
    mesh: DeviceMesh
    ring: Ring

    @property
    def place(self) -> str:
        """What stands before a failure of this rank."""
        stages = ", ".join(map(str, self.stages))
        return f"rank {self.rank} (stage {stages}): " if self.rank else ""

    @property
    def num_columns(self) -> int:
        """Ranks in a row."""
        return 1 + max(self.columns)

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages of this rank."""
        mine = self.rank % self.num_columns
        return tuple(k for k, column in enumerate(self.columns) if column == mine)

    @property
    def replica(self) -> int:
        """The replica that this rank belongs to: its row."""
        return self.rank // self.num_columns

    @property
    def num_replicas(self) -> int:
        """Rows of the mesh."""
        return self.world_size // self.num_columns

    def rank_of(self, stage: int) -> int:
        """The rank that runs `stage` in this rank's replica."""
        return self.replica * self.num_columns + self.columns[stage]

    @property
    def replica_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same stage."""
        return self.mesh.get_group("replica")

    @property
    def stage_group(self) -> dist.ProcessGroup:
        """The ranks of one replica."""
        return self.mesh.get_group("stage")

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def part(self) -> None:
        """Say goodbye: from now on a rank may end."""
        self.ring.close()

    def apart(self) -> Self:
        """The same ranks, whose facts are found by those alone who call this as often."""
        count = self.store.add(f"apart/{self.rank}", 1)
        return replace(self, store=PrefixStore(f"apart/{count}", self.store))


def join(
    columns: tuple[int, ...] | Callable[[], tuple[int, ...]],
    devices: Sequence[str],
    digest: str | Callable[[], str],
    options: Mapping[str, Any] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Ranks:
    """Connect this process with the other ranks.

    columns: for every stage its place in a row of ranks. devices: of the stages, as Trainer takes
    them; "auto" alone stands for the GPU with the local rank, or the CPU. digest: of the program,
    and options: what else must be the same on all. Columns and digest may be what gives them: it is
    called when the ranks have met, so that all of them hear of an error on one. timeout_s: how long
    a rank waits for another one that says nothing.

    Raises:
        TrainingError: the ranks do not find each other.
        SystemExit: rank 0 has told why they cannot work together: another number of ranks than the
            stages need; a backend or a device that torch lacks; other programs or options.
    """
    meeting = meet(timeout_s)
    try:
        program = digest if isinstance(digest, str) else digest()
        meeting.agree({"program": program[:12]}, "copy the same directory to every host")
        meeting.agree(options or {}, "start every rank with the same options")
        return _place(meeting, columns if isinstance(columns, tuple) else columns(), devices)
    except Exception as error:  # whatever it is: the others would wait for this rank
        if not isinstance(error, ScplError):
            traceback.print_exception(error)
        meeting.fail(error)
        raise SystemExit(1) from None


def _place(meeting: Meeting, columns: tuple[int, ...], devices: Sequence[str]) -> Ranks:
    width = 1 + max(columns)
    if meeting.world_size % width:
        raise MethodError(
            f"{meeting.world_size} ranks for {len(columns)} stages on {width} ranks; start {width} "
            f"of them, or a multiple for replicas: torchrun --nproc-per-node {width} train.py"
        )
    device = _device_of(devices, columns.index(meeting.rank % width), len(columns))
    meeting.agree(
        {"devices of kind": device.type},
        "start no more ranks on a host than it has GPUs, or give --devices cpu",
    )
    if meeting.owns_group:
        _init_group(meeting, _backend(device), device)
    ring = Ring(meeting.rank, meeting.world_size, partial(_tell_ended, meeting), meeting.timeout_s)
    mesh = init_device_mesh(
        device.type, (meeting.world_size // width, width), mesh_dim_names=("replica", "stage")
    )
    for group in mesh.get_all_groups():  # torch makes them with half an hour
        dist.set_timeout(timedelta(seconds=meeting.timeout_s), group)
    return Ranks(
        rank=meeting.rank,
        world_size=meeting.world_size,
        store=meeting.store,
        watch=meeting.watch,
        owns_group=meeting.owns_group,
        timeout_s=meeting.timeout_s,
        columns=columns,
        device=device,
        mesh=mesh,
        ring=ring,
    )


def _tell_ended(meeting: Meeting, rank: int) -> None:
    with suppress(dist.DistError, RuntimeError):  # the store is gone: the watch ends this rank
        meeting.watch.accuse(
            f"rank {rank} has ended without a word: it was killed, as where memory is short, or "
            "interrupted; see what its host says"
        )


def _device_of(devices: Sequence[str], stage: int, num_stages: int) -> torch.device:
    """The device of `stage` on this host."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if list(devices) == ["auto"]:
        has_gpu = torch.cuda.device_count() > local_rank
        return torch.device(f"cuda:{local_rank}" if has_gpu else "cpu")
    (device,) = resolve_devices((devices[stage * len(devices) // num_stages],), 1)
    return device


def _backend(device: torch.device) -> str:
    """Payloads on the device's own backend; headers and small numbers on gloo."""
    needed = ["gloo", *(["nccl"] if device.type == "cuda" else [])]
    for name in needed:
        if not dist.is_available() or not dist.is_backend_available(name):
            raise MethodError(
                f"ranks on {device} need torch's {name} backend, which this torch "
                f"({torch.__version__}) lacks; install a torch that has it, or train with "
                "--engine threads"
            )
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _init_group(meeting: Meeting, backend: str, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("group", meeting.store),
            rank=meeting.rank,
            world_size=meeting.world_size,
            timeout=timedelta(seconds=meeting.timeout_s),
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise TrainingError(
            f"rank {meeting.rank} cannot connect to the others ({reason(error)}); see "
            "that the hosts reach each other (GLOO_SOCKET_IFNAME names the network interface)"
        ) from error


def rank_options(ranks: Ranks | None, options: Any) -> dict[str, Any]:
    """What the trainer of a rank takes beside the options of every trainer; options: of a run."""
    if ranks is None:
        return {}
    return {
        "ranks": ranks,
        "contrast": options.contrast,
        "replicate": options.replicate,
        "microbatches": getattr(options, "microbatches", 1),
        "batch_size": options.batch_size // ranks.num_replicas,
    }
