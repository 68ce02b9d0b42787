"""What passes between the parts of the compiler: frozen values without torch in them.

::

    TensorMeta ─┐
    NodeCost    ├─▶ Crossing ─▶ Cut ─┐
    LocalLoss ──┴─▶ Stage ───────────┴─▶ Plan ─▶ plan.json

Every value has a JSON form (`to_json`) that reads back to an equal value (`from_json`), and the
digest of a Plan is the sha256 of its canonical JSON. Times are microseconds (`_us`), sizes bytes.
"""

import builtins
import hashlib
import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeVar

from scpl_compile.errors import ProgramError
from scpl_compile.json_form import LEFT_OUT, from_json, to_json

__all__ = [
    "MULTI_LABEL",
    "SINGLE_LABEL",
    "TASKS",
    "Crossing",
    "Cut",
    "InputSpec",
    "LocalLoss",
    "LossSource",
    "ModelSource",
    "NodeCost",
    "Plan",
    "Scalar",
    "Stage",
    "TensorMeta",
    "dtype_nbytes",
    "first_and_last",
    "from_json",
    "to_json",
]

Scalar = bool | int | float | str
"""What an option may be: JSON's scalars."""

SINGLE_LABEL = "single-label"
MULTI_LABEL = "multi-label"
TASKS = (SINGLE_LABEL, MULTI_LABEL)
"""One label per sample, or any number of them: labels (B,), or (B, num_classes) zeros and ones."""

T = TypeVar("T")

_DTYPE_NBYTES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "complex64": 8, "complex128": 16,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


def dtype_nbytes(dtype: str) -> int:
    """Bytes of one element of `dtype` ("float32", "int64", …)."""
    if dtype not in _DTYPE_NBYTES:
        raise ProgramError(f"dtype {dtype!r} is not one of {', '.join(_DTYPE_NBYTES)}")
    return _DTYPE_NBYTES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMeta:
    """Shape and dtype of a tensor, whether a gradient flows into it, and its batch dimension.

    `batch_dim` was found by comparing two batch sizes; None means that no single dimension
    grows with the batch (a constant, or windows and samples merged into one dimension).
    """

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool
    batch_dim: int | None

    def __post_init__(self) -> None:
        dtype_nbytes(self.dtype)
        if self.batch_dim is not None and not 0 <= self.batch_dim < len(self.shape):
            raise ProgramError(f"batch_dim {self.batch_dim} is not a dimension of {self.shape}")

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor at the example batch size."""
        return prod(self.shape) * dtype_nbytes(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """One input of the model without its batch dimension, as in `ids:int64:128<30000`.

    `high` bounds integer inputs (ids are drawn from 0 … high - 1). `last` is what every row ends
    with, and what stands nowhere else in it (the token that ends a sentence), as in
    `ids:int64:128<30000..2`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    high: int | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        dtype_nbytes(self.dtype)
        if not self.name.isidentifier():
            raise ProgramError(f"input name {self.name!r} is not an identifier")
        if self.last is not None and not (self.shape and 0 <= self.last < (self.high or 0) > 1):
            raise ProgramError(
                f"input {self.name!r}: rows of numbers below {self.high} cannot end in {self.last}"
            )

    def __str__(self) -> str:
        bound = "" if self.high is None else f"<{self.high}"
        end = "" if self.last is None else f"..{self.last}"
        return f"{self.name}:{self.dtype}:{'x'.join(map(str, self.shape))}{bound}{end}"

    def ended(self, values: T) -> T:
        """Random `values` of this input (B, *shape), which are written, with `last` at the end."""
        written: Any = values
        if self.last is not None:
            written[written == self.last] = 1 if self.last == 0 else self.last - 1
            written[..., -1] = self.last
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model comes from, so that an emitted program can build it again.

    spec: as the user wrote it ("torchvision:resnet18", "net.py:build", "package.module:build").
    path: the absolute file of a `file.py:callable`, and its sha256; None for installed packages.
    config: keyword arguments of the constructor, values of JSON. is_object: the spec names an
    nn.Module, not a callable that makes one. model_class, config_class: of `hf:…`, the names of
    both in transformers; there `config` goes to the configuration.
    """

    spec: str
    config: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None
    sha256: str | None = None
    is_object: bool = False
    model_class: str = ""
    config_class: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCost:
    """What one node of the graph costs per step at the example batch size."""

    name: str
    forward_us: float
    backward_us: float
    flops: int
    bytes_moved: int
    param_bytes: int
    activation_bytes: int
    source: str

    @property
    def total_us(self) -> float:
        """Forward and backward together."""
        return self.forward_us + self.backward_us


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """One tensor that crosses one cut.

    producer: the stage that computes it (-1: a raw input of the model that a later stage reads).
    consumers: the stages that read it. A value whose consumers lie further on is relayed by
    every stage between.
    alias: "" or whose storage it shares ("parameter", "buffer", "input"); such a tensor is cloned
    when it is sent, because its owner will change it while the reader still works.
    """

    name: str
    meta: TensorMeta
    producer: int
    consumers: tuple[int, ...]
    alias: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The boundary between stage `index` and stage `index + 1`, after the graph node `after`.

    detach: the gradient stops here (False for backpropagation's methods).
    """

    index: int
    after: str
    crossings: tuple[Crossing, ...]
    detach: bool

    @property
    def nbytes(self) -> int:
        """Bytes that cross per step at the example batch size."""
        return sum(crossing.meta.nbytes for crossing in self.crossings)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSource:
    """The user's own loss: the class `name` of the Python file `path`, with this content."""

    path: str
    name: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalLoss:
    """One loss of one stage.

    name: its attribute in the emitted stage and its key among the stage's losses.
    kind: "cross_entropy" (of the model's own logits), or a head of its own, a module: "local"
    (contrastive term, local classifier, or both), "predsim", "al", or "own" (that of `source`).
    reads: the tensors it reads, by the names in the stage's forward; `mask`: a padding mask or "".
    in_shapes, batch_dims: of what it reads, the batch left out of the shapes.
    options: the other arguments of that module.
    code, gives: the name of a code of the labels that it takes from the stage before, and of the
    one that it makes for the next stage ("": none).
    num_parameters: elements of the head; flops: of head and loss, forward, per step.
    """

    name: str
    kind: str
    reads: tuple[str, ...]
    mask: str = ""
    in_shapes: tuple[tuple[int, ...], ...] = ()
    batch_dims: tuple[int, ...] = ()
    options: Mapping[str, Scalar] = field(default_factory=dict)
    num_parameters: int = 0
    flops: int = 0
    source: LossSource | None = None
    code: str = ""
    gives: str = ""

    @property
    def has_head(self) -> bool:
        """Whether it is a module with a head of its own."""
        return self.kind != "cross_entropy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage: the graph nodes it runs and everything that belongs to them.

    nodes: targets of the nodes in order ("layer1.0" for a module, "torch.flatten" for a function).
    parameters, buffers: names in the original model.
    inputs, outputs: names of the tensors that its forward takes and gives.
    cost_us: forward + backward + heads + losses.
    """

    index: int
    nodes: tuple[str, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    losses: tuple[LocalLoss, ...]
    num_parameters: int
    cost_us: float

    @property
    def receives(self) -> tuple[str, ...]:
        """What its training step takes: the inputs of its forward, and codes for its losses."""
        return (*self.inputs, *(loss.code for loss in self.losses if loss.code))


def first_and_last(stage: Stage) -> tuple[str, str]:
    """The first and the last module; where there is none, function."""
    modules = [name for name in stage.nodes if not _is_function(name)]
    names = modules or stage.nodes
    return names[0], names[-1]


def _is_function(name: str) -> bool:
    return (
        name.startswith(("Tensor.", "torch.")) or hasattr(operator, name) or hasattr(builtins, name)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that was decided about a program; plan.json is a Plan.

    edges: (from stage, to stage) pairs. placement: device of each stage. inference: the steps of
    evaluation in order ("0F", "1F", "1X", "1B", "1D": forward of a stage, its exit, its bridge to a
    code of the labels, its decoder of such a code). untrained: the parameters that the method
    leaves alone. opaque: (module, why it was not opened).
    lower_bound_us: no partition of the model's leaf modules has a smaller bottleneck. task: one of
    TASKS.
    """

    method: str
    model: str
    stages: tuple[Stage, ...]
    cuts: tuple[Cut, ...]
    edges: tuple[tuple[int, int], ...]
    inputs: tuple[InputSpec, ...]
    batch_size: int
    outputs: tuple[str, ...]
    num_classes: int
    schedule: str
    placement: tuple[str, ...]
    num_microbatches: int
    threads_per_stage: int
    optimizer: Mapping[str, Scalar]
    inference: tuple[str, ...]
    untrained: tuple[str, ...]
    frontend: str
    opaque: tuple[tuple[str, str], ...]
    solver: str
    bottleneck_us: float
    lower_bound_us: float
    source: ModelSource | None
    versions: Mapping[str, str]
    task: str = field(default=SINGLE_LABEL, metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ProgramError(f"task {self.task!r} is not one of {', '.join(TASKS)}")
        indices = [stage.index for stage in self.stages]
        if not indices or indices != list(range(len(indices))):
            raise ProgramError(f"stage indices are {indices}, not 0, 1, 2 …")
        if len(self.cuts) != len(self.stages) - 1:
            raise ProgramError(f"{len(self.stages)} stages have {len(self.cuts)} cuts between them")
        if len(self.placement) != len(self.stages):
            raise ProgramError(f"{len(self.stages)} stages are placed on {len(self.placement)}")

    def sent(self, stage: int) -> tuple[str, ...]:
        """Names of what `stage` sends to the next one."""
        cuts = self.cuts[stage : stage + 1]  # none after the last stage
        return tuple(crossing.name for cut in cuts for crossing in cut.crossings)

    @property
    def num_stages(self) -> int:
        """K."""
        return len(self.stages)

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON, hexadecimal."""
        canonical = json.dumps(to_json(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()
