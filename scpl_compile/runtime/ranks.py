"""The ranks of a run under torchrun: who runs which stage, and what they agree on.

::

    mesh (replica, stage)      stage 0   stage 1   stage 2
                   replica 0   rank 0    rank 1    rank 2      activations go along a row,
                   replica 1   rank 3    rank 4    rank 5      gradients of replicas along a column

torchrun (or whoever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) starts the processes, and
torch.distributed connects them. Small facts travel through its store: which program each rank runs,
losses for the log, the files of a checkpoint, and the first failure.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from scpl_compile.errors import MethodError, ScplError, TrainingError

__all__ = ["Ranks", "join", "leads", "wants_ranks"]

TIMEOUT_S = 600.0
"""How long a rank waits for another one that says nothing."""
_FAILURE, _TOLD = "scpl/failure", "scpl/told"
_POLL_S = 0.2
_PATIENCE_S = 10.0
"""How long a failed rank waits until rank 0 has told it."""
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Store(Protocol):
    """torch.distributed's store of small facts."""

    def set(self, key: str, value: str) -> None:
        """Put `value` where every rank finds it."""

    def get(self, key: str) -> bytes:
        """The value, once it is there."""

    def check(self, keys: list[str]) -> bool:
        """Whether all are there."""

    def add(self, key: str, amount: int) -> int:
        """The sum of all that was added."""

    def delete_key(self, key: str) -> bool:
        """Remove it."""


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


def leads() -> bool:
    """Whether this process is the one that speaks and writes: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


class _Watch:
    """Ends this process when another rank has failed: its own thread may wait for that rank in
    torch.distributed, where no exception reaches it.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watch")
        self._thread.start()

    def stop(self) -> None:
        """The run is over; a thread that is inside torch when a process ends would abort it."""
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(_POLL_S):
            try:
                if not self._store.check([_FAILURE]):
                    continue
                _tell(self._store, self._rank)
                _wait_told(self._store)
            except (dist.DistError, RuntimeError):  # the store is gone, and rank 0 with it
                pass
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This rank's place, and the store.

    rank, world_size: of torch.distributed. columns: for every stage its place in a row of ranks
    (schedules.stage_columns). device: where this rank's tensors live. mesh: DeviceMesh (replica,
    stage). prefix: of the keys of this meeting in the store. watch: ends this process when another
    rank fails. owns_group: whether the process group was made here.
    """

    rank: int
    world_size: int
    columns: tuple[int, ...]
    device: torch.device
    mesh: DeviceMesh
    store: Store
    prefix: str
    watch: _Watch
    owns_group: bool

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

    # ------------------------------------------------------------------ facts

    def post(self, key: str, value: Any) -> None:
        """Put a JSON value where every rank finds it."""
        self.store.set(f"{self.prefix}/{key}", json.dumps(value))

    def find(self, key: str) -> Any:
        """The value that a rank has posted under `key`; None where there is none yet."""
        name = f"{self.prefix}/{key}"
        return json.loads(self.store.get(name)) if self.store.check([name]) else None

    def forget(self, key: str) -> None:
        """Remove what was posted under `key`."""
        self.store.delete_key(f"{self.prefix}/{key}")

    def wait_for(self, key: str) -> Any:
        """The value under `key`, once it is there.

        Raises:
            TrainingError: nobody posted it.
        """
        end = time.monotonic() + TIMEOUT_S
        while (value := self.find(key)) is None:
            if time.monotonic() > end:
                raise TrainingError(f"rank {self.rank} has waited {TIMEOUT_S:.0f} s for {key!r}")
            time.sleep(_POLL_S / 10)
        return value

    def agree(self, facts: Mapping[str, Any], remedy: str) -> None:
        """All ranks must give the same JSON values.

        Raises:
            MethodError: a rank has another one than rank 0; remedy: what to do then.
        """
        names = sorted(facts)
        self.post(f"{names}/{self.rank}", facts)
        everyone = [self.wait_for(f"{names}/{rank}") for rank in range(self.world_size)]
        for rank, theirs in enumerate(everyone):
            for name in names:
                if theirs[name] != everyone[0][name]:
                    raise MethodError(
                        f"rank {rank} has {name} {theirs[name]}, rank 0 has {everyone[0][name]}; "
                        f"{remedy}"
                    )

    def from_leader(self, key: str, value: Any) -> Any:
        """The JSON value of rank 0, on every rank; not None."""
        if self.rank == 0:
            self.post(key, value)
        return self.wait_for(key)

    # ------------------------------------------------------------------ the end

    def fail(self, error: BaseException) -> None:
        """Tell rank 0's user, and end every rank; the first failure is the one that is told."""
        where = f"stage {', '.join(map(str, self.stages))}"
        place = "" if self.rank == 0 else f"rank {self.rank} ({where}): "
        text = f"{error}" if isinstance(error, ScplError) else f"{type(error).__name__}: {error}"
        if self.store.add("scpl/failures", 1) == 1:
            self.store.set(_FAILURE, f"{place}{text}")
        self.watch.stop()
        _tell(self.store, self.rank)
        _wait_told(self.store)

    def leave(self) -> None:
        """Close the connections that `join` has made, once all ranks are here.

        They meet in the store, not in a barrier: gloo's thread lets go of a barrier's tensors after
        its end, and if Python ends meanwhile, the process is aborted.
        """
        self.post(f"left/{self.rank}", True)
        for rank in range(self.world_size):
            self.wait_for(f"left/{rank}")
        self.watch.stop()
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()


def _tell(store: Store, rank: int) -> None:
    """Rank 0 prints the first failure, once."""
    if rank == 0 and store.add("scpl/tellers", 1) == 1:
        print(f"error: {store.get(_FAILURE).decode()}", file=sys.stderr, flush=True)
        store.set(_TOLD, "")


def _wait_told(store: Store) -> None:
    end = time.monotonic() + _PATIENCE_S
    while not store.check([_TOLD]) and time.monotonic() < end:
        time.sleep(_POLL_S / 10)


def join(columns: tuple[int, ...], devices: Sequence[str], digest: str) -> Ranks:
    """Connect this process with the other ranks.

    columns: for every stage its place in a row of ranks. devices: of the stages, as Trainer takes
    them; "auto" alone stands for the GPU with the local rank, or the CPU. digest: of the program,
    the same on all.

    Raises:
        MethodError: another number of ranks than the stages need; a backend that torch lacks; ranks
            with different programs.
        TrainingError: the ranks do not find each other.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    width = 1 + max(columns)
    if world_size % width:
        raise MethodError(
            f"{world_size} ranks for {len(columns)} stages on {width} ranks; start {width} of "
            f"them, or a multiple for replicas: torchrun --nproc-per-node {width} train.py"
        )
    device = _device_of(devices, columns.index(rank % width), len(columns))
    backend = _backend(device)
    owns_group = not dist.is_initialized()
    if owns_group:
        _init_group(backend, device)
    store = dist.distributed_c10d._get_default_store()
    mesh = init_device_mesh(
        device.type, (world_size // width, width), mesh_dim_names=("replica", "stage")
    )
    ranks = Ranks(
        rank=rank,
        world_size=world_size,
        columns=columns,
        device=device,
        mesh=mesh,
        store=store,
        prefix=f"scpl/{store.add(f'scpl/joins/{rank}', 1)}",  # the same number on every rank
        watch=_Watch(store.clone(), rank),
        owns_group=owns_group,
    )
    try:
        ranks.agree({"program": digest[:12]}, "copy the same directory to every host")
    except ScplError as error:
        ranks.fail(error)
        raise SystemExit(1) from None
    return ranks


def _device_of(devices: Sequence[str], stage: int, num_stages: int) -> torch.device:
    """The device of `stage` on this host."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if list(devices) == ["auto"]:
        has_gpu = torch.cuda.device_count() > local_rank
        return torch.device(f"cuda:{local_rank}" if has_gpu else "cpu")
    return torch.device(devices[stage * len(devices) // num_stages])


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


def _init_group(backend: str, device: torch.device) -> None:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S))
    except (dist.DistError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        hint = (
            "the port is in use: give another one, torchrun --master-port PORT"
            if "EADDRINUSE" in str(error) or "address already in use" in str(error)
            else "see that every rank was started, and that they reach this address"
        )
        raise TrainingError(f"the ranks do not meet at {address} ({reason}); {hint}") from error
