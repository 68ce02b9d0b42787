"""A model's graph and where it is cut: the frontends are tried until one allows a balanced cut."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import fsum

from torch import nn

from scpl_compile.capture import FRONTENDS, Capture, capture
from scpl_compile.capture.outputs import keep_output, outputs_of
from scpl_compile.cost import DeviceSpec, node_costs
from scpl_compile.errors import CaptureError, OwnCodeError, PartitionError, TraceError
from scpl_compile.ir import SINGLE_LABEL, InputSpec, NodeCost
from scpl_compile.methods.base import Method
from scpl_compile.methods.cuts import cut_problem, split_nodes
from scpl_compile.partition import Partition, partition, split_at
from scpl_compile.sources import (
    OutputPath,
    check_output,
    choose_output,
    output_name,
    output_tensors,
)

__all__ = ["Captures", "CutRequest", "Cutting", "cut_model"]

_SMALL = 0.25
"""Of a stage's even share: an opaque module up to this cost stands in nobody's way."""
_BALANCED = 1.05
"""Of a stage's even share: a bottleneck that no other frontend could lower by much."""
_FAR = 1.2
"""Of a stage's even share: a bottleneck for which even small opaque modules may be the reason: what
they give besides tensors (a height, a width) cannot cross a cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CutRequest:
    """What is asked for.

    output, num_classes: None where the model tells. split_at: modules after which to cut, instead
    of balancing `num_stages` stages. frontend: a key of FRONTENDS, or None to choose.
    """

    inputs: tuple[InputSpec, ...]
    batch_size: int
    output: str | None
    num_classes: int | None
    method: Method
    device: DeviceSpec
    num_stages: int
    split_at: tuple[str, ...] = ()
    frontend: str | None = None
    task: str = SINGLE_LABEL


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Logits:
    """A graph that gives the logits alone.

    output: where the model gives them; dropped: names of its other outputs.
    """

    capture: Capture
    output: OutputPath
    dropped: tuple[str, ...]
    num_classes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cutting(_Logits):
    """Such a graph and its partition."""

    partition: Partition


class Captures:
    """What each frontend made of one model, kept so that the model can be cut again and again.

    The model must stay as it is meanwhile, but for the values of its parameters and buffers.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._found: dict[object, _Logits | CaptureError] = {}

    def of(self, model: nn.Module, request: CutRequest, frontend: str) -> _Logits:
        """The graph of `model`, captured at the first call for these inputs.

        Raises:
            CaptureError: as at the first call.
            ValueError: the model is another one than at the first call.
        """
        if self._model is None:
            self._model = model
        if model is not self._model:
            raise ValueError("captures are of one model: make new ones for another model")
        key = (frontend, request.inputs, request.batch_size, request.output, request.num_classes)
        if key not in self._found:
            try:
                self._found[key] = _captured(model, request, frontend)
            except CaptureError as error:
                self._found[key] = error
        found = self._found[key]
        if isinstance(found, CaptureError):
            raise found
        return found


def cut_model(model: nn.Module, request: CutRequest, captures: Captures | None = None) -> Cutting:
    """Capture and cut `model` by the first frontend that allows a balanced cut, else by the best.

    captures: of this model, for further cuts of it.

    Raises:
        CaptureError: no frontend can take the graph, or the inputs do not fit.
        PartitionError: no graph has such a cut.
        MethodError: the method cannot be applied; its own code fails wherever a cut could be.
    """
    captures = captures or Captures()
    best: Cutting | None = None
    reasons: list[str] = []  # why modules were kept whole, or the model refused
    failure: CaptureError | PartitionError | OwnCodeError | None = None
    for frontend in [request.frontend] if request.frontend else FRONTENDS:
        is_last_resort = frontend == "record-second-call" and not request.frontend
        if is_last_resort and not any("changes its attribute" in text for text in reasons):
            break
        try:
            found, is_balanced = _cut(captures.of(model, request, frontend), request)
        except (CaptureError, PartitionError, OwnCodeError) as error:
            # Of inputs that do not fit, the first frontend tells the most; of code, the second.
            is_told = isinstance(failure, (CaptureError, OwnCodeError))
            is_told = is_told and not isinstance(failure, TraceError)
            failure = failure if is_told or is_last_resort else error
            reasons.append(str(error))
            continue
        reasons += [reason for _, reason in found.capture.opaque]
        if best is None or found.partition.bottleneck_us < best.partition.bottleneck_us:
            best = found
        if is_balanced:
            break
    if best is None:
        assert failure is not None, "every frontend cuts or fails"
        raise failure
    return best


def _captured(model: nn.Module, request: CutRequest, frontend: str) -> _Logits:
    """What a frontend makes of the model."""
    fine = capture(model, request.inputs, request.batch_size, frontend)
    outputs = outputs_of(fine)
    size = fine.batch_size
    path = choose_output(
        outputs, name=request.output, num_classes=request.num_classes, batch_size=size
    )
    tensors = output_tensors(outputs)
    num_classes = check_output(
        tensors[path].shape, num_classes=request.num_classes, batch_size=size
    )
    return _Logits(
        capture=keep_output(fine, path),
        output=path,
        dropped=tuple(output_name(other) for other in tensors if other != path),
        num_classes=num_classes,
    )


def _cut(logits: _Logits, request: CutRequest) -> tuple[Cutting, bool]:
    """The cut of one frontend's graph, and whether no other could do much better."""
    fine = logits.capture
    costs = node_costs(fine, request.device)
    problem = cut_problem(
        fine, costs, request.method, logits.num_classes, request.device, request.task
    )
    with _telling_opaque(fine, costs):
        if request.split_at:
            found = split_at(problem, split_nodes(fine, request.split_at))
        else:
            found = partition(problem, request.num_stages)
    cutting = Cutting(
        capture=fine,
        output=logits.output,
        dropped=logits.dropped,
        num_classes=logits.num_classes,
        partition=found,
    )
    return cutting, bool(request.split_at) or _is_balanced(fine, costs, found.stage_us)


@contextmanager
def _telling_opaque(fine: Capture, costs: Mapping[str, NodeCost]) -> Iterator[None]:
    """Adds to a PartitionError why the costliest module that was kept whole was not opened."""
    try:
        yield
    except PartitionError as error:
        reasons = dict(fine.opaque)
        whole = [n for n in fine.compute_nodes if n.op == "call_module" and n.target in reasons]
        if not whole:
            raise
        path = str(max(whole, key=lambda node: costs[node.name].total_us).target)
        raise PartitionError(
            f"{error}; {path or 'the model'!r} was kept whole: {reasons[path]}"
        ) from error


def _is_balanced(fine: Capture, costs: Mapping[str, NodeCost], stage_us: Sequence[float]) -> bool:
    """Whether the modules that were kept whole leave the stages balanced."""
    share = fsum(stage_us) / len(stage_us)
    opaque = {path for path, _ in fine.opaque}
    whole = [costs[n.name].total_us for n in fine.compute_nodes if n.target in opaque]
    limit = _FAR if max(whole, default=0.0) <= _SMALL * share else _BALANCED
    return not whole or max(stage_us) <= limit * share
