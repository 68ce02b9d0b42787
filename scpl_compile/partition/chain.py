"""The exact balance of a chain: K runs of consecutive nodes with the least possible bottleneck.

The period of SCPL is the longest stage (forward, backward, heads, losses), so min-max is the
objective itself. Dynamic program over the places to cut; b ends a stage that begins at a::

    best[s, b] = min over a < b of max(best[s - 1, a], stage(a, b))

in O(places² · stages) numpy operations. A second pass walks the same graph of stages, of which
only those within the tolerance are left, and takes the least total penalty.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scpl_compile.errors import PartitionError

__all__ = ["ChainSolution", "max_stages", "solve_chain", "stage_costs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainSolution:
    """cuts: the chosen positions, ascending (a cut at i lies after node i).

    stage_us: cost of every stage; bottleneck_us: the largest. optimum_us: the least bottleneck
    of all partitions, which the chosen one exceeds by the tolerance at most.
    """

    cuts: tuple[int, ...]
    stage_us: tuple[float, ...]
    bottleneck_us: float
    optimum_us: float


def solve_chain(
    costs: Sequence[float],
    *,
    trains: Sequence[bool],
    allowed: Sequence[bool],
    head_us: Sequence[float],
    tail_us: float,
    num_stages: int,
    penalty: Sequence[float],
    tolerance: float,
) -> ChainSolution:
    """Cut a chain of n nodes into `num_stages` stages, each with a node that trains.

    costs: n times of 0 or more. trains: n, whether a stage of this node alone could be.
    allowed, head_us, penalty: n - 1, one per position after a node.
    A stage costs the sum of its nodes and head_us at the position that ends it (the last stage:
    tail_us). Of all partitions whose bottleneck is at most (1 + tolerance) times the optimum, the
    one with the least total penalty is returned, then with the least bottleneck.

    Raises PartitionError where `num_stages` is not 1 to `max_stages`.
    """
    limit = max_stages(trains, allowed)
    if not 1 <= num_stages <= limit:
        raise PartitionError(f"the chain gives {limit} stages at most; asked for {num_stages}")
    places = _places(costs, trains, allowed, head_us, tail_us, penalty)
    optimum = _optimum_us(places, num_stages)
    chosen = _least_penalty(places, num_stages, (1 + tolerance) * optimum)
    cuts = tuple(int(places.position[place]) for place in chosen)
    stage_us = stage_costs(costs, cuts, head_us, tail_us)
    return ChainSolution(
        cuts=cuts, stage_us=stage_us, bottleneck_us=max(stage_us), optimum_us=optimum
    )


def max_stages(trains: Sequence[bool], allowed: Sequence[bool]) -> int:
    """The most stages that `allowed` can give if each has a node that trains.

    Of the positions between two neighbours among such nodes only one can be used: the result is
    1 + the number of pairs of neighbours with an allowed position between them (0 without nodes
    that train).
    """
    count = np.cumsum(np.asarray(trains, dtype=bool))
    inner = count[:-1][np.asarray(allowed, dtype=bool)]
    places = np.unique(inner[(inner > 0) & (inner < count[-1])])
    return len(places) + int(count[-1] > 0)


def stage_costs(
    costs: Sequence[float], cuts: Sequence[int], head_us: Sequence[float], tail_us: float
) -> tuple[float, ...]:
    """Cost of every stage for the given ascending cuts, with the heads each of them pays."""
    # The same differences of prefix sums as in the solver: equal cuts, equal last bits.
    prefix = _prefix(costs)
    bounds = [0, *(cut + 1 for cut in cuts), len(costs)]
    heads = [*(head_us[cut] for cut in cuts), tail_us]
    return tuple((prefix[bounds[1:]] - prefix[bounds[:-1]] + np.asarray(heads)).tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Where stages may begin and end: the start of the chain, every allowed position, the end.

    position: after which node (-1 for the start). prefix_us: cost of all nodes before the place.
    head_us, penalty: of a stage that ends there. num_starts: how many of the places leave a node
    that trains between them and this one; these are the first ones.
    """

    position: NDArray[np.int64]
    prefix_us: NDArray[np.float64]
    head_us: NDArray[np.float64]
    penalty: NDArray[np.float64]
    num_starts: NDArray[np.int64]


def _prefix(costs: Sequence[float]) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(np.asarray(costs, dtype=np.float64))])


def _places(
    costs: Sequence[float],
    trains: Sequence[bool],
    allowed: Sequence[bool],
    head_us: Sequence[float],
    tail_us: float,
    penalty: Sequence[float],
) -> _Places:
    inner = np.flatnonzero(np.asarray(allowed, dtype=bool))
    position = np.concatenate([[-1], inner, [len(costs) - 1]])
    count = np.concatenate([[0], np.cumsum(np.asarray(trains, dtype=bool))])[position + 1]
    return _Places(
        position=position,
        prefix_us=_prefix(costs)[position + 1],
        head_us=np.concatenate([[0.0], np.asarray(head_us, dtype=np.float64)[inner], [tail_us]]),
        penalty=np.concatenate([[0.0], np.asarray(penalty, dtype=np.float64)[inner], [0.0]]),
        num_starts=np.searchsorted(count, count),
    )


def _stages_ending(places: _Places, end: int) -> NDArray[np.float64]:
    """Cost of the stages that end at place `end`, by their start; it falls from start to start."""
    before_us = places.prefix_us[: places.num_starts[end]]
    cost_us: NDArray[np.float64] = places.prefix_us[end] - before_us + places.head_us[end]
    return cost_us


def _optimum_us(places: _Places, num_stages: int) -> float:
    best = np.full((num_stages + 1, len(places.position)), np.inf)
    best[0, 0] = 0.0
    for end in range(1, len(places.position)):
        stage = _stages_ending(places, end)
        if stage.size:
            best[1:, end] = np.maximum(best[:-1, : stage.size], stage).min(axis=1)
    return float(best[-1, -1])


def _least_penalty(places: _Places, num_stages: int, bound_us: float) -> list[int]:
    """The places to cut: least penalty, then least bottleneck, of stages within the bound."""
    shape = (num_stages + 1, len(places.position))
    penalty, bottleneck = np.full(shape, np.inf), np.full(shape, np.inf)
    begin = np.zeros(shape, dtype=np.int64)
    penalty[0, 0] = bottleneck[0, 0] = 0.0
    for end in range(1, len(places.position)):
        stage = _stages_ending(places, end)
        first = int(np.count_nonzero(stage > bound_us))
        if first == stage.size:
            continue
        window = slice(first, stage.size)
        total = penalty[:-1, window]
        least = total.min(axis=1, keepdims=True)
        longest = np.maximum(bottleneck[:-1, window], stage[window])
        longest = np.where(total == least, longest, np.inf)
        begin[1:, end] = first + longest.argmin(axis=1)
        bottleneck[1:, end] = longest.min(axis=1)
        penalty[1:, end] = least[:, 0] + places.penalty[end]
    chosen = []
    place = len(places.position) - 1
    for stages in range(num_stages, 1, -1):
        place = int(begin[stages, place])
        chosen.append(place)
    return chosen[::-1]
