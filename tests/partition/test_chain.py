"""The chain solver against every possible set of cuts."""

from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scpl_compile.errors import PartitionError
from scpl_compile.partition.chain import ChainSolution, max_stages, solve_chain, stage_costs


@dataclass(frozen=True)
class Chain:
    costs: list[float]
    allowed: list[bool]
    head_us: list[float]
    tail_us: float
    penalty: list[float]
    free: frozenset[int] = frozenset()
    """Nodes that do not train, beside those that cost nothing."""

    @property
    def trains(self) -> list[bool]:
        return [cost > 0 and i not in self.free for i, cost in enumerate(self.costs)]

    def solve(self, num_stages: int, tolerance: float = 0.0) -> ChainSolution:
        return solve_chain(
            self.costs,
            trains=self.trains,
            allowed=self.allowed,
            head_us=self.head_us,
            tail_us=self.tail_us,
            num_stages=num_stages,
            penalty=self.penalty,
            tolerance=tolerance,
        )

    def every_partition(self, num_stages: int) -> dict[tuple[int, ...], tuple[float, float]]:
        """cuts -> (total penalty, bottleneck) of all partitions, from plain sums."""
        found = {}
        places = [position for position, ok in enumerate(self.allowed) if ok]
        for cuts in combinations(places, num_stages - 1):
            bounds = [0, *(cut + 1 for cut in cuts), len(self.costs)]
            loads = [sum(self.costs[start:end]) for start, end in pairwise(bounds)]
            heads = [*(self.head_us[cut] for cut in cuts), self.tail_us]
            if all(any(self.trains[start:end]) for start, end in pairwise(bounds)):
                bottleneck = max(load + head for load, head in zip(loads, heads, strict=True))
                found[cuts] = (sum(self.penalty[cut] for cut in cuts), bottleneck)
        return found


def whole(low: int, high: int) -> st.SearchStrategy[float]:
    """Whole numbers: their sums are exact, so that results can be compared with ==."""
    return st.integers(low, high).map(float)


@st.composite
def chains(draw: st.DrawFn, number: st.SearchStrategy[float] | None = None) -> Chain:
    size = draw(st.integers(1, 10))
    number = whole(0, 9) if number is None else number
    per_place = {"min_size": size - 1, "max_size": size - 1}
    return Chain(
        costs=draw(st.lists(st.just(0.0) | number, min_size=size, max_size=size)),
        allowed=draw(st.lists(st.sampled_from([True, True, True, False]), **per_place)),
        head_us=draw(st.lists(number, **per_place)),
        tail_us=draw(number),
        penalty=draw(st.lists(number, **per_place)),
        free=frozenset(draw(st.sets(st.integers(0, size - 1)))),
    )


def test_four_nodes_in_two_stages():
    chain = Chain([1.0, 2.0, 3.0, 4.0], [True] * 3, [0.0] * 3, 0.0, [0.0] * 3)
    assert chain.solve(2) == ChainSolution(
        cuts=(2,), stage_us=(6.0, 4.0), bottleneck_us=6.0, optimum_us=6.0
    )


def test_heads_and_tail_move_the_cut():
    costs, allowed, free = [2.0, 2.0, 2.0, 2.0], [True] * 3, [0.0] * 3
    assert Chain(costs, allowed, free, 0.0, free).solve(2).cuts == (1,)
    assert Chain(costs, allowed, free, 5.0, free).solve(2).cuts == (2,)
    assert Chain(costs, allowed, [0.0, 3.0, 3.0], 0.0, free).solve(2).cuts == (0,)


def test_within_the_tolerance_the_cleaner_cut_wins():
    chain = Chain([10.0, 1.0, 1.0, 10.0], [True] * 3, [0.0] * 3, 0.0, [0.0, 7.0, 0.0])
    assert chain.solve(2, tolerance=0.05).cuts == (1,)
    cleaner = chain.solve(2, tolerance=0.1)
    assert (cleaner.cuts, cleaner.bottleneck_us, cleaner.optimum_us) == ((0,), 12.0, 11.0)


def test_every_stage_has_a_node_that_trains():
    costs, free = [3.0, 3.0, 3.0, 3.0], [0.0] * 3
    assert Chain(costs, [True] * 3, free, 0.0, free).solve(4).bottleneck_us == 3.0
    pooled = Chain(costs, [True] * 3, free, 0.0, free, free=frozenset({2}))
    assert pooled.solve(3).stage_us in {(3.0, 6.0, 3.0), (3.0, 3.0, 6.0)}
    with pytest.raises(PartitionError, match="gives 3 stages at most; asked for 4"):
        pooled.solve(4)


@settings(deadline=None, max_examples=300)
@given(chains(), st.sampled_from([0.0, 0.03, 0.25, 1.0]))
def test_equals_brute_force_for_every_number_of_stages(chain: Chain, tolerance: float):
    for num_stages in range(1, len(chain.costs) + 1):
        every = chain.every_partition(num_stages)
        if not every:
            with pytest.raises(PartitionError, match=f"asked for {num_stages}$"):
                chain.solve(num_stages, tolerance)
            continue
        optimum = min(bottleneck for _, bottleneck in every.values())
        within = [both for both in every.values() if both[1] <= (1 + tolerance) * optimum]
        solution = chain.solve(num_stages, tolerance)
        assert solution.optimum_us == optimum
        assert solution.bottleneck_us == max(solution.stage_us) == every[solution.cuts][1]
        assert every[solution.cuts] == min(within)


@settings(deadline=None, max_examples=100)
@given(chains(st.floats(1e-3, 1e6)), st.floats(0.0, 0.5))
def test_equals_brute_force_on_real_numbers_up_to_rounding(chain: Chain, tolerance: float):
    for num_stages in range(1, max_stages(chain.trains, chain.allowed) + 1):
        every = chain.every_partition(num_stages)
        optimum = min(bottleneck for _, bottleneck in every.values())
        solution = chain.solve(num_stages, tolerance)
        assert solution.optimum_us == pytest.approx(optimum, rel=1e-9)
        assert solution.optimum_us <= solution.bottleneck_us
        assert solution.bottleneck_us <= (1 + tolerance) * solution.optimum_us
        surely_within = [p for p, b in every.values() if b <= (1 + tolerance - 1e-9) * optimum]
        found = every[solution.cuts][0]
        assert found <= min(surely_within, default=found) * (1 + 1e-9)


@settings(deadline=None, max_examples=200)
@given(chains())
def test_max_stages_is_the_most_that_brute_force_finds(chain: Chain):
    sizes = range(1, len(chain.costs) + 1)
    possible = [num_stages for num_stages in sizes if chain.every_partition(num_stages)]
    assert max_stages(chain.trains, chain.allowed) == max(possible, default=0)


@pytest.mark.parametrize("num_stages", [-1, 0, 4])
def test_refuses_numbers_of_stages_outside_the_limit(num_stages: int):
    chain = Chain([1.0, 1.0, 1.0], [True, True], [0.0] * 2, 0.0, [0.0] * 2)
    with pytest.raises(PartitionError, match=f"gives 3 stages at most; asked for {num_stages}"):
        chain.solve(num_stages)


def test_stage_costs_are_the_solvers_last_bits():
    rng = np.random.default_rng()
    costs, heads = rng.lognormal(size=50).tolist(), rng.random(49).tolist()
    solution = Chain(costs, [True] * 49, heads, 0.5, [0.0] * 49).solve(6)
    assert stage_costs(costs, solution.cuts, heads, 0.5) == solution.stage_us
    assert max(solution.stage_us) == solution.optimum_us


def test_three_thousand_nodes_in_sixteen_stages():
    rng = np.random.default_rng()
    costs, penalty = rng.lognormal(size=3000), rng.random(2999)
    chain = Chain(costs.tolist(), [True] * 2999, rng.random(2999).tolist(), 1.0, penalty.tolist())
    exact, relaxed = chain.solve(16), chain.solve(16, tolerance=0.03)
    assert exact.optimum_us == exact.bottleneck_us == relaxed.optimum_us
    # With nodes this small, balance costs at most about one node and one head more than the share.
    assert costs.sum() / 16 <= exact.optimum_us <= costs.sum() / 16 + costs.max() + 1
    assert relaxed.bottleneck_us <= 1.03 * exact.optimum_us
    assert penalty[list(relaxed.cuts)].sum() < penalty[list(exact.cuts)].sum()
    assert chain.solve(16, tolerance=0.03) == relaxed
