"""Where to cut a graph into stages: balanced by the solver, or as the user names it.

Plain numbers in and out: fold.py holds the problem and glues together what stays together,
chain.py balances exactly, this file chooses and explains.
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import fsum

from scpl_compile.errors import PartitionError
from scpl_compile.partition.chain import ChainSolution, max_stages, solve_chain, stage_costs
from scpl_compile.partition.fold import Folded, PartitionProblem, fold, obstacles

__all__ = ["Partition", "PartitionProblem", "partition", "split_at"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A graph cut into stages.

    cuts: the node after which each cut lies. stages: the nodes of every stage in execution order.
    stage_us: cost of every stage with its heads; bottleneck_us: the largest.
    optimum_us: the least bottleneck of as many stages. lower_bound_us: what no partition can
    undercut, heads left out: an even share, or the costliest nodes that cannot be parted.
    solver: "chain-dp" or "split-at".
    """

    cuts: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    stage_us: tuple[float, ...]
    bottleneck_us: float
    optimum_us: float
    lower_bound_us: float
    solver: str

    @property
    def gap(self) -> float:
        """How far the bottleneck lies above the lower bound: 0.05 is 5 %."""
        return self.bottleneck_us / self.lower_bound_us - 1


def partition(
    problem: PartitionProblem,
    num_stages: int,
    *,
    tolerance: float = 0.03,
    worth: float = 2.0,
) -> Partition:
    """Cut into `num_stages` stages, the bottleneck at most 1 + `tolerance` times the optimum.

    Within the tolerance the cuts with the least total penalty win, so that a clean place (between
    blocks, one tensor, few bytes) is preferred to a slightly better balance. Where `worth` less
    penalty (a tensor fewer, two modules fewer that are cut open) can be had, the tolerance is
    doubled. Every stage has a node that trains.

    Raises PartitionError where the graph cannot give so many stages, with the most it can give.
    """
    if not 0 <= tolerance < float("inf"):
        raise PartitionError(f"tolerance is {tolerance}; give a share of 0 or more, such as 0.03")
    folded = fold(problem)
    solution = _solve(problem, folded, num_stages, tolerance)
    cleaner = _solve(problem, folded, num_stages, 2 * tolerance)
    if _penalty(problem, cleaner) <= _penalty(problem, solution) - worth:
        solution = cleaner
    return _partition(problem, folded, solution.cuts, solution.optimum_us, "chain-dp")


def split_at(problem: PartitionProblem, names: Sequence[str]) -> Partition:
    """Cut after each of the named nodes, in whatever order they are named.

    Raises PartitionError for a name that is no node, or named twice, and for a cut that the graph
    does not allow or that leaves a stage without a node that trains.
    """
    ruled_out = obstacles(problem)
    cuts = tuple(sorted(_position(problem, name) for name in names))
    for name, count in Counter(names).items():
        if count > 1:
            raise PartitionError(f"{name!r} is named {count} times; one cut lies after it")
    for cut in cuts:
        if ruled_out[cut]:
            raise PartitionError(f"cannot cut after {problem.names[cut]!r}: {ruled_out[cut]}")
    for start, end in pairwise((-1, *cuts, len(problem.names) - 1)):
        if not any(problem.trains[start + 1 : end + 1]):
            raise PartitionError(_idle_stage(problem, start, end))
    folded = fold(problem)
    optimum_us = _solve(problem, folded, len(cuts) + 1, 0.0).optimum_us
    return _partition(problem, folded, cuts, optimum_us, "split-at")


def _solve(
    problem: PartitionProblem, folded: Folded, num_stages: int, tolerance: float
) -> ChainSolution:
    allowed = [False] * len(problem.allowed)
    for position in folded.candidates:
        allowed[position] = True
    limit = max_stages(problem.trains, allowed)
    if num_stages < 1:
        raise PartitionError(f"asked for {num_stages} stages; ask for --stages 1 or more")
    if num_stages > limit:
        raise PartitionError(_too_many(problem, num_stages, limit))
    return solve_chain(
        problem.cost_us,
        trains=problem.trains,
        allowed=allowed,
        head_us=problem.head_us,
        tail_us=problem.tail_us,
        num_stages=num_stages,
        penalty=problem.penalty,
        tolerance=tolerance,
    )


def _penalty(problem: PartitionProblem, solution: ChainSolution) -> float:
    return fsum(problem.penalty[cut] for cut in solution.cuts)


def _partition(
    problem: PartitionProblem,
    folded: Folded,
    cuts: tuple[int, ...],
    optimum_us: float,
    solver: str,
) -> Partition:
    names = problem.names
    stage_us = stage_costs(problem.cost_us, cuts, problem.head_us, problem.tail_us)
    bound_us = max(fsum(problem.cost_us) / len(stage_us), *folded.cost_us)
    bounds = (0, *(cut + 1 for cut in cuts), len(names))
    return Partition(
        cuts=tuple(names[cut] for cut in cuts),
        stages=tuple(names[start:end] for start, end in pairwise(bounds)),
        stage_us=stage_us,
        bottleneck_us=max(stage_us),
        optimum_us=optimum_us,
        lower_bound_us=min(bound_us, optimum_us),  # they may differ in the last bit when equal
        solver=solver,
    )


def _position(problem: PartitionProblem, name: str) -> int:
    names = problem.names
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {_listed(close)}?" if close else _places_to_cut(problem)
        raise PartitionError(f"cannot split at {name!r}, which is no node of the graph; {hint}")
    if name == names[-1]:
        raise PartitionError(f"cannot cut after {name!r}: it is the last node")
    return names.index(name)


def _places_to_cut(problem: PartitionProblem) -> str:
    places = [problem.names[position] for position in fold(problem).candidates]
    if not places:
        return "the graph has no place to cut"
    more = f" and {len(places) - 8} more" if len(places) > 8 else ""
    return f"cuts are possible after {_listed(places[:8])}{more}"


def _too_many(problem: PartitionProblem, num_stages: int, limit: int) -> str:
    only = {1: "no place", 2: "only 1 place"}.get(limit, f"only {limit - 1} places")
    remedy = "1" if limit == 1 else f"{limit} or fewer"
    if any(group is not None for _, group in problem.graph.nodes(data="group")):
        remedy += ", or give what shares a parameter one of its own each"
    reasons = Counter(why for why in obstacles(problem) if why).most_common(3)
    told = "; ".join(f"{count} ruled out: {why}" for why, count in reasons)
    places = [not why for why in obstacles(problem)]
    if max_stages([cost > 0 for cost in problem.cost_us], places) > limit:
        told += "; " if told else ""
        told += "every stage needs a parameter that trains and on which the output depends"
    because = f" ({told})" if told else ""
    return (
        f"asked for {num_stages} stages, but the model has {only} to cut{because}; "
        f"ask for --stages {remedy}"
    )


def _idle_stage(problem: PartitionProblem, start: int, end: int) -> str:
    names = problem.names
    cut = names[end if start < 0 else start]
    return (
        f"the stage from {names[start + 1]!r} to {names[end]!r} would have nothing to train "
        f"(no parameter in it needs a gradient, or the output depends on none of them); "
        f"leave out the cut after {cut!r}"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
