"""Which values each stage takes, computes and gives, once every node has its stage.

A value that is computed in stage p and read in stage q is relayed by every stage between, so each
stage speaks with its two neighbours only::

    stage 0      stage 1      stage 2
    h, mask ──▶  h2, mask ──▶ …            mask: a raw input that stage 2 reads

Parameters do not cross (their readers share a stage), nor do sizes that any stage can compute again
(node.meta["recipe"]).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from scpl_compile.capture import Capture
from scpl_compile.ir import Crossing, TensorMeta

__all__ = ["Flow", "find_flow", "meta_of", "value_name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """crossings[i]: what crosses cut i, in the order of computation. output: the model's output."""

    num_stages: int
    stage_of: Mapping[str, int]
    crossings: tuple[tuple[Crossing, ...], ...]
    output: str

    def inputs(self, stage: int, model_inputs: tuple[str, ...]) -> tuple[str, ...]:
        """Names that the stage's forward takes."""
        if stage == 0:
            return model_inputs
        return tuple(crossing.name for crossing in self.crossings[stage - 1])

    def sent(self, stage: int) -> tuple[str, ...]:
        """Names that the stage sends on."""
        if stage == self.num_stages - 1:
            return ()
        return tuple(crossing.name for crossing in self.crossings[stage])


def meta_of(node: fx.Node) -> TensorMeta | None:
    """The TensorMeta of a tensor-valued node."""
    meta: TensorMeta | None = node.meta.get("tensor")
    return meta


def value_name(node: fx.Node) -> str:
    """The name of what `node` gives; torch.fx renames an input that is called `input`."""
    return str(node.target) if node.op == "placeholder" else node.name


def find_flow(
    capture: Capture, stage_of: Mapping[str, int], extra_reads: Mapping[str, set[int]]
) -> Flow:
    """The flow of `capture` when node n runs in stage_of[n].

    extra_reads: stages that read a value for their losses only (a padding mask).
    """
    num_stages = 1 + max(stage_of.values())
    readers: dict[str, set[int]] = {name: set(stages) for name, stages in extra_reads.items()}
    output = ""
    for node in capture.graph.nodes:
        stage = num_stages - 1 if node.op == "output" else stage_of.get(node.name)
        if node.op == "output":
            output = value_name(node.all_input_nodes[0])
        if stage is None:
            continue
        for source in node.all_input_nodes:
            if source.op != "get_attr" and "recipe" not in source.meta:
                readers.setdefault(value_name(source), set()).add(stage)
    crossings: list[list[Crossing]] = [[] for _ in range(num_stages - 1)]
    for node in capture.graph.nodes:
        name = value_name(node)
        if name not in readers:
            continue
        is_input = node.op == "placeholder"
        producer = -1 if is_input else stage_of[node.name]
        last = max(readers[name])
        meta = meta_of(node)
        for i in range(max(producer, 0), last):
            assert meta is not None, f"{node.name} crosses a cut and is no tensor"
            crossings[i].append(
                Crossing(
                    name=name,
                    meta=meta,
                    producer=producer,
                    consumers=tuple(sorted(k for k in readers[name] if k > i)),
                    alias="input" if is_input else node.meta.get("alias", ""),
                )
            )
    return Flow(
        num_stages=num_stages,
        stage_of=dict(stage_of),
        crossings=tuple(tuple(items) for items in crossings),
        output=output,
    )
