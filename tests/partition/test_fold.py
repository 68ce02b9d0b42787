"""What folding glues together, and that it never costs time or penalty."""

from collections.abc import Sequence

import networkx as nx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scpl_compile.errors import PartitionError
from scpl_compile.partition.chain import max_stages, solve_chain
from scpl_compile.partition.fold import PartitionProblem, fold, obstacles


def make(nodes: dict[str, float], edges: Sequence[str] = (), **given) -> PartitionProblem:
    """A problem without heads and penalties; edges as "ab" for a -> b, default a chain."""
    graph = nx.DiGraph()
    for name, cost in nodes.items():
        graph.add_node(name, cost_us=cost)
    names = list(nodes)
    graph.add_edges_from(edges or zip(names, names[1:], strict=False))
    places = len(names) - 1
    defaults = {"allowed": (True,) * places, "head_us": (0.0,) * places}
    return PartitionProblem(graph=graph, **{**defaults, "penalty": (0.0,) * places, **given})


def glued(problem: PartitionProblem) -> list[str]:
    return ["".join(names) for names in fold(problem).nodes]


def test_nodes_that_cost_stay_apart():
    problem = make({"a": 1.0, "b": 2.0, "c": 3.0})
    folded = fold(problem)
    assert folded.candidates == (0, 1)
    assert folded.nodes == (("a",), ("b",), ("c",))
    assert folded.cost_us == (1.0, 2.0, 3.0)


def test_free_nodes_join_their_producer():
    assert glued(make({"a": 1.0, "f": 0.0, "g": 0.0, "b": 2.0})) == ["afg", "b"]


def test_a_free_node_without_producer_joins_its_consumer():
    assert glued(make({"a": 1.0, "m": 0.0, "b": 2.0}, ["ab", "mb"])) == ["a", "mb"]


def test_inputs_and_outputs_are_never_a_stage():
    assert glued(make({"x": 0.0, "a": 1.0, "b": 2.0, "o": 0.0})) == ["xa", "bo"]


def test_a_free_sink_joins_its_producer():
    assert glued(make({"a": 1.0, "s": 0.0, "b": 2.0}, ["as", "ab"])) == ["as", "b"]


def test_the_cleaner_of_two_like_places_stays():
    nodes = {"a": 1.0, "f": 0.0, "b": 2.0}
    assert glued(make(nodes, penalty=(1.0, 2.0))) == ["a", "fb"]
    assert glued(make(nodes, penalty=(1.0, 1.0), head_us=(3.0, 2.0))) == ["af", "b"]


def test_a_place_with_the_cheaper_head_and_one_with_the_lesser_penalty_both_stay():
    problem = make({"a": 1.0, "f": 0.0, "b": 2.0}, penalty=(1.0, 2.0), head_us=(3.0, 2.0))
    assert fold(problem).candidates == (0, 1)


def test_a_group_joins_everything_between_its_ends():
    problem = make({"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 5.0})
    problem.graph.nodes["b"]["group"] = problem.graph.nodes["d"]["group"] = "tied"
    assert glued(problem) == ["a", "bcd", "e"]
    assert fold(problem).cost_us == (1.0, 9.0, 5.0)
    why = "'b' and 'd' belong in one stage (they share tied)"
    assert obstacles(problem) == ("", why, why, "")


def test_overlapping_groups_become_one():
    problem = make({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 1.0})
    for name, group in {"a": "p", "c": "p", "b": "q", "d": "q"}.items():
        problem.graph.nodes[name]["group"] = group
    assert glued(problem) == ["abcd", "e"]


def test_a_pinned_node_stays_with_its_producer():
    problem = make({"a": 1.0, "b": 2.0, "s": 3.0, "c": 4.0}, ["ab", "as", "bc"])
    problem.graph.nodes["s"]["pinned"] = True
    assert glued(problem) == ["abs", "c"]
    assert obstacles(problem)[0] == "'s' runs in the stage of its producer 'a'"


def test_places_that_are_not_allowed_are_told_with_their_reason():
    problem = make(
        {"a": 1.0, "b": 2.0, "c": 3.0}, allowed=(False, False), reason=("a tuple crosses", None)
    )
    assert glued(problem) == ["abc"]
    assert obstacles(problem) == ("a tuple crosses", "the captured graph allows no cut there")


whole = st.integers(0, 6).map(float)


@st.composite
def problems(draw: st.DrawFn) -> PartitionProblem:
    costs = draw(st.lists(st.just(0.0) | whole, min_size=1, max_size=14).filter(any))
    pairs = [(i, j) for j in range(len(costs)) for i in range(j)]
    edges = draw(st.lists(st.sampled_from(pairs))) if pairs else []
    per_place = {"min_size": len(costs) - 1, "max_size": len(costs) - 1}
    problem = make(
        {f"n{i}": cost for i, cost in enumerate(costs)},
        [(f"n{i}", f"n{j}") for i, j in edges],
        allowed=tuple(draw(st.lists(st.sampled_from([True, True, False]), **per_place))),
        head_us=tuple(draw(st.lists(whole, **per_place))),
        penalty=tuple(draw(st.lists(whole, **per_place))),
        tail_us=draw(whole),
    )
    for attributes in problem.graph.nodes.values():
        attributes["group"] = draw(st.sampled_from([None] * 6 + ["p", "q"]))
        attributes["pinned"] = draw(st.sampled_from([False] * 6 + [True]))
        attributes["trainable"] = draw(st.sampled_from([True, True, False]))
    assume(any(problem.trains))
    return problem


@settings(deadline=None, max_examples=300)
@given(problems(), st.sampled_from([0.0, 0.1, 0.5]))
def test_folding_loses_neither_time_nor_penalty_nor_stages(
    problem: PartitionProblem, tolerance: float
):
    unfolded = [not why for why in obstacles(problem)]
    kept = fold(problem).candidates
    folded = [position in kept for position in range(len(unfolded))]
    limit = max_stages(problem.trains, unfolded)
    assert max_stages(problem.trains, folded) == limit
    for num_stages in range(1, limit + 1):
        before, after = (
            solve_chain(
                problem.cost_us,
                trains=problem.trains,
                allowed=allowed,
                head_us=problem.head_us,
                tail_us=problem.tail_us,
                num_stages=num_stages,
                penalty=problem.penalty,
                tolerance=tolerance,
            )
            for allowed in (unfolded, folded)
        )
        assert after.optimum_us == before.optimum_us
        assert after.bottleneck_us == before.bottleneck_us
        total_penalty = [sum(problem.penalty[cut] for cut in s.cuts) for s in (before, after)]
        assert total_penalty[0] == total_penalty[1]


@settings(deadline=None, max_examples=200)
@given(problems())
def test_folded_nodes_are_the_execution_order_in_runs(problem: PartitionProblem):
    folded = fold(problem)
    assert tuple(name for names in folded.nodes for name in names) == problem.names
    ends = [problem.names.index(names[-1]) for names in folded.nodes]
    assert tuple(ends[:-1]) == folded.candidates
    assert sum(folded.cost_us) == sum(problem.cost_us)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": {}}, "the graph has no nodes"),
        ({"nodes": {"a": 0.0, "b": 0.0}}, "every node of the graph costs 0 us"),
        ({"nodes": {"a": 1.0, "b": -2.0}}, "the cost of 'b' is -2.0 us"),
        ({"nodes": {"a": 1.0, "b": float("nan")}}, "the cost of 'b' is nan us"),
        ({"nodes": {"a": 1.0, "b": None}}, "the cost of 'b' is None us"),
        ({"edges": ["ba"]}, "'a' runs before its producer 'b'"),
        ({"allowed": (True, True)}, "allowed has 2 entries for 1 positions"),
        ({"reason": ("", "")}, "reason has 2 entries for 1 positions"),
        ({"head_us": (-1.0,)}, "the head cost after 'a' is -1.0 us"),
        ({"tail_us": float("inf")}, "tail_us is inf us"),
        ({"penalty": (float("inf"),)}, "a penalty is not finite"),
    ],
)
def test_refuses_what_is_no_problem(change: dict, message: str):
    with pytest.raises(PartitionError, match=message):
        make(**{"nodes": {"a": 1.0, "b": 2.0}, **change})
