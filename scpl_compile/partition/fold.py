"""What is to be cut, and which places to cut are worth a look.

A graph of n nodes in execution order has n - 1 positions; position i lies after node i. A stage
is a run of consecutive nodes, so a partition is a set of positions. `fold` glues nodes together by
dropping positions, and no partition that is better in time or penalty is lost:

- groups (tied parameters) and pinned nodes rule out every position between their ends;
- nodes that cost nothing and train nothing join a neighbour: positions with only such nodes between
  them load the stages alike, so one that another equals or beats in both head cost and penalty is
  dropped.

A stage must contain a node that trains. A stage of reshapes or of pooling has nothing to train.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import fsum, isfinite

import networkx as nx

from scpl_compile.errors import PartitionError

__all__ = ["Folded", "PartitionProblem", "fold", "obstacles"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartitionProblem:
    """A graph, and per position (after node i) what a cut there means.

    graph: nodes are names, inserted in execution order, with the attributes `cost_us` (forward and
    backward, microseconds), optionally `group` (str; equal groups share a stage: tied parameters)
    and `pinned` (bool; runs in the stage of its producers: side effects such as counters), and
    `trainable` (bool; has a parameter that needs a gradient; absent: if it costs something).
    allowed: whether a cut may be there at all; reason: where not, why (optional).
    head_us: heads and local losses of a stage that ends there; tail_us: those of the last stage.
    penalty: ugliness and traffic of that cut, in any unit.

    Raises PartitionError for an order that is not topological, and for wrong lengths or numbers.
    """

    graph: nx.DiGraph
    allowed: tuple[bool, ...]
    head_us: tuple[float, ...]
    penalty: tuple[float, ...]
    tail_us: float = 0.0
    reason: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.graph:
            raise PartitionError("the graph has no nodes")
        for field in ("allowed", "head_us", "penalty", *(("reason",) if self.reason else ())):
            found, expected = len(getattr(self, field)), len(self.graph) - 1
            if found != expected:
                raise PartitionError(f"{field} has {found} entries for {expected} positions")
        place = {name: index for index, name in enumerate(self.graph)}
        for producer, consumer in self.graph.edges:
            if place[producer] >= place[consumer]:
                raise PartitionError(f"{consumer!r} runs before its producer {producer!r}")
        for name, value in zip(self.graph, self.cost_us, strict=True):
            _check_time(value, f"the cost of {name!r}")
        for name, value in zip(self.graph, self.head_us, strict=False):
            _check_time(value, f"the head cost after {name!r}")
        _check_time(self.tail_us, "tail_us")
        if not any(self.cost_us):
            raise PartitionError("every node of the graph costs 0 us; there is nothing to balance")
        if not any(self.trains):
            raise PartitionError("no node of the graph has a parameter that trains")
        if not all(map(isfinite, self.penalty)):
            raise PartitionError("a penalty is not finite; give large numbers instead")

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes in execution order."""
        return tuple(self.graph)

    @property
    def cost_us(self) -> tuple[float, ...]:
        """Cost of every node in execution order."""
        return tuple(cost for _, cost in self.graph.nodes(data="cost_us"))

    @property
    def trains(self) -> tuple[bool, ...]:
        """Whether a stage of this node alone could be, for every node in execution order.

        Its cost says nothing about that: a module that drops itself at random may have cost nothing
        when it was looked at.
        """
        flags = self.graph.nodes(data="trainable")
        return tuple(
            cost > 0 if flag is None else flag
            for (_, flag), cost in zip(flags, self.cost_us, strict=True)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """What is left to decide: the nodes that stay together, and the positions between them.

    candidates: positions in the original order, ascending; candidates[i] lies after nodes[i].
    nodes: the original nodes of every folded node; their concatenation is the original order.
    cost_us: cost of every folded node; the largest bounds every bottleneck from below.
    """

    candidates: tuple[int, ...]
    nodes: tuple[tuple[str, ...], ...]
    cost_us: tuple[float, ...]


def fold(problem: PartitionProblem) -> Folded:
    """Glue together what need not be parted; time and penalty of the best partitions stay."""
    names, cost_us = problem.names, problem.cost_us
    # Nodes that matter up to each position: between equal counts lie only free ones.
    matters = (cost > 0 or trains for cost, trains in zip(cost_us, problem.trains, strict=True))
    work = list(accumulate(matters))
    runs: dict[int, list[int]] = {}
    for position, why in enumerate(obstacles(problem)):
        if not why and 0 < work[position] < work[-1]:
            runs.setdefault(work[position], []).append(position)
    crossing = _values_crossing(problem.graph)
    kept = (p for run in runs.values() for p in _undominated(problem, run, crossing))
    candidates = tuple(sorted(kept))
    bounds = (0, *(position + 1 for position in candidates), len(names))
    return Folded(
        candidates=candidates,
        nodes=tuple(names[start:end] for start, end in pairwise(bounds)),
        cost_us=tuple(fsum(cost_us[start:end]) for start, end in pairwise(bounds)),
    )


def obstacles(problem: PartitionProblem) -> tuple[str, ...]:
    """For every position why no cut can be there, as the end of a sentence; "" where one can."""
    given = problem.reason or ("",) * len(problem.allowed)
    why = [
        "" if ok else text or "the captured graph allows no cut there"
        for ok, text in zip(problem.allowed, given, strict=True)
    ]
    for first, last, text in _bonds(problem):
        for position in range(first, last):
            why[position] = why[position] or text
    return tuple(why)


def _bonds(problem: PartitionProblem) -> list[tuple[int, int, str]]:
    """(first, last, why): no cut between these nodes. Whatever runs between them joins them."""
    names, nodes = problem.names, problem.graph.nodes
    place = {name: index for index, name in enumerate(names)}
    bonds = []
    groups: dict[str, list[int]] = {}
    for name, group in nodes(data="group"):
        if group is not None:
            groups.setdefault(group, []).append(place[name])
    for group, members in groups.items():
        first, last = members[0], members[-1]
        text = f"{names[first]!r} and {names[last]!r} belong in one stage (they share {group})"
        bonds.append((first, last, text))
    for name, pinned in nodes(data="pinned"):
        producers = [place[producer] for producer in problem.graph.predecessors(name)]
        if pinned and producers:
            first = min(producers)
            text = f"{name!r} runs in the stage of its producer {names[first]!r}"
            bonds.append((first, place[name], text))
    return bonds


def _undominated(problem: PartitionProblem, run: list[int], crossing: list[int]) -> list[int]:
    """The positions of a run that no other one equals or beats in both head cost and penalty.

    Of equals the one that fewest values cross stays, then the last: a free node thus joins its
    single producer, or its consumer if it has no producer, and a sink joins its producer.
    """
    head, penalty = problem.head_us, problem.penalty
    kept: list[int] = []
    for position in sorted(run, key=lambda p: (head[p], penalty[p], crossing[p], -p)):
        if not kept or penalty[position] < penalty[kept[-1]]:
            kept.append(position)
    return kept


def _values_crossing(graph: nx.DiGraph) -> list[int]:
    """How many nodes before each position have a consumer after it."""
    place = {name: index for index, name in enumerate(graph)}
    change = [0] * (len(place) + 1)
    for name, index in place.items():
        last = max((place[consumer] for consumer in graph.successors(name)), default=index)
        change[index] += 1
        change[last] -= 1
    return list(accumulate(change))


def _check_time(value: float | None, what: str) -> None:
    if value is None or not isfinite(value) or value < 0:
        raise PartitionError(f"{what} is {value} us, not a time of 0 or more")
