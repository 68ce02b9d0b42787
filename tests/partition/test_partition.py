"""The partitioner against every possible partition of small graphs, and what it tells the user."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations, pairwise

import networkx as nx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scpl_compile.errors import PartitionError
from scpl_compile.partition import Partition, PartitionProblem, partition, split_at


def chain(costs: dict[str, float], **given) -> PartitionProblem:
    """The nodes one after another, every place allowed, without heads and penalties."""
    graph = nx.DiGraph()
    graph.add_nodes_from((name, {"cost_us": cost}) for name, cost in costs.items())
    nx.add_path(graph, costs)
    places = len(costs) - 1
    defaults = {"allowed": (True,) * places, "head_us": (0.0,) * places}
    return PartitionProblem(graph=graph, **{**defaults, "penalty": (0.0,) * places, **given})


LAYERS = {"stem": 1.0, "layer1": 4.0, "layer2": 3.0, "layer3": 3.0, "flatten": 0.0, "fc": 1.0}


def test_layers_in_two_stages():
    assert partition(chain(LAYERS, tail_us=2.0), 2) == Partition(
        cuts=("layer2",),
        stages=(("stem", "layer1", "layer2"), ("layer3", "flatten", "fc")),
        stage_us=(8.0, 6.0),
        bottleneck_us=8.0,
        optimum_us=8.0,
        lower_bound_us=6.0,
        solver="chain-dp",
    )


def test_one_stage_is_the_whole_model():
    found = partition(chain(LAYERS), 1)
    assert (found.cuts, found.stages, found.gap) == ((), (tuple(LAYERS),), 0.0)


def test_an_unsplittable_node_is_the_lower_bound():
    found = partition(chain({"a": 1.0, "embedding": 8.0, "b": 1.0}), 3)
    assert (found.lower_bound_us, found.bottleneck_us, found.gap) == (8.0, 8.0, 0.0)


def test_a_tied_group_is_the_lower_bound():
    problem = chain({"wte": 3.0, "block": 4.0, "lm_head": 3.0, "loss": 2.0})
    for name in ("wte", "lm_head"):
        problem.graph.nodes[name]["group"] = "wte.weight"
    found = partition(problem, 2)
    assert found.stages == (("wte", "block", "lm_head"), ("loss",))
    assert found.lower_bound_us == 10.0


def test_rounding_lifts_no_lower_bound_above_the_optimum():
    assert (0.3 + 0.6) - 0.3 < 0.6  # the solver takes differences of sums
    found = partition(chain({"a": 0.3, "b": 0.6}), 2)
    assert found.lower_bound_us == found.optimum_us == pytest.approx(0.6)
    assert found.gap == 0.0


def test_split_at_cuts_after_the_named_nodes():
    assert split_at(chain(LAYERS), ["layer3", "layer1"]) == Partition(
        cuts=("layer1", "layer3"),
        stages=(("stem", "layer1"), ("layer2", "layer3"), ("flatten", "fc")),
        stage_us=(5.0, 6.0, 1.0),
        bottleneck_us=6.0,
        optimum_us=5.0,
        lower_bound_us=4.0,
        solver="split-at",
    )


def whole(low: int, high: int) -> st.SearchStrategy[float]:
    """Whole numbers: their sums are exact, so that results can be compared with ==."""
    return st.integers(low, high).map(float)


@st.composite
def problems(draw: st.DrawFn) -> PartitionProblem:
    costs = draw(st.lists(st.just(0.0) | whole(0, 9), min_size=1, max_size=9).filter(any))
    graph = nx.DiGraph()
    for index, cost in enumerate(costs):
        group = draw(st.sampled_from([None] * 6 + ["p", "q"]))
        pinned = draw(st.sampled_from([False] * 6 + [True]))
        trainable = draw(st.sampled_from([True, True, False]))
        graph.add_node(f"n{index}", cost_us=cost, group=group, pinned=pinned, trainable=trainable)
        for producer in draw(st.sets(st.integers(0, index - 1), max_size=2)) if index else ():
            graph.add_edge(f"n{producer}", f"n{index}")
    assume(any(trainable for _, trainable in graph.nodes(data="trainable")))
    per_place = {"min_size": len(costs) - 1, "max_size": len(costs) - 1}
    return PartitionProblem(
        graph=graph,
        allowed=tuple(draw(st.lists(st.sampled_from([True, True, False]), **per_place))),
        head_us=tuple(draw(st.lists(whole(0, 9), **per_place))),
        penalty=tuple(draw(st.lists(whole(0, 9), **per_place))),
        tail_us=draw(whole(0, 9)),
    )


def keeps_the_rules(problem: PartitionProblem, stages: list[tuple[str, ...]]) -> bool:
    nodes = problem.graph.nodes
    stage_of = {name: index for index, names in enumerate(stages) for name in names}
    homes = [{stage_of[n] for n in nodes if nodes[n]["group"] == group} for group in ("p", "q")]
    for name in nodes:
        if nodes[name]["pinned"]:
            producers = problem.graph.predecessors(name)
            homes.append({stage_of[name], *(stage_of[producer] for producer in producers)})
    training = all(any(nodes[name]["trainable"] for name in names) for names in stages)
    return training and all(len(home) <= 1 for home in homes)


def every_partition(
    problem: PartitionProblem, num_stages: int
) -> dict[tuple[str, ...], tuple[float, float]]:
    """cuts -> (total penalty, bottleneck) of all partitions of the graph as it is, unfolded."""
    names, found = problem.names, {}
    for cuts in combinations(range(len(names) - 1), num_stages - 1):
        bounds = [0, *(cut + 1 for cut in cuts), len(names)]
        stages = [names[start:end] for start, end in pairwise(bounds)]
        if all(problem.allowed[cut] for cut in cuts) and keeps_the_rules(problem, stages):
            heads = [*(problem.head_us[cut] for cut in cuts), problem.tail_us]
            loads = [sum(problem.graph.nodes[name]["cost_us"] for name in s) for s in stages]
            bottleneck = max(load + head for load, head in zip(loads, heads, strict=True))
            total_penalty = sum(problem.penalty[cut] for cut in cuts)
            found[tuple(names[cut] for cut in cuts)] = (total_penalty, bottleneck)
    return found


def least_penalty(costs: Iterable[tuple[float, float]], bound_us: float) -> tuple[float, float]:
    """The (penalty, bottleneck) that wins among those within the bound."""
    return min(both for both in costs if both[1] <= bound_us)


@settings(deadline=None, max_examples=300)
@given(problems(), st.sampled_from([0.0, 0.03, 0.25, 1.0]), st.sampled_from([1.0, 2.0]))
def test_equals_brute_force(problem: PartitionProblem, tolerance: float, worth: float):
    for num_stages in range(1, len(problem.names) + 1):
        every = every_partition(problem, num_stages)
        if not every:
            with pytest.raises(PartitionError, match=f"asked for {num_stages} stages"):
                partition(problem, num_stages, tolerance=tolerance)
            continue
        optimum = min(bottleneck for _, bottleneck in every.values())
        best = least_penalty(every.values(), (1 + tolerance) * optimum)
        cleaner = least_penalty(every.values(), (1 + 2 * tolerance) * optimum)
        found = partition(problem, num_stages, tolerance=tolerance, worth=worth)
        assert found.optimum_us == optimum
        assert every[found.cuts] == (cleaner if cleaner[0] <= best[0] - worth else best)
        assert found.bottleneck_us == max(found.stage_us) == every[found.cuts][1]
        assert 0 < found.lower_bound_us <= optimum
        assert tuple(names[-1] for names in found.stages[:-1]) == found.cuts
        assert tuple(name for names in found.stages for name in names) == problem.names


@settings(deadline=None, max_examples=150)
@given(problems(), st.data())
def test_split_at_takes_what_brute_force_has_and_refuses_the_rest(
    problem: PartitionProblem, data: st.DataObject
):
    cuts = tuple(name for name in problem.names[:-1] if data.draw(st.booleans()))
    every = every_partition(problem, len(cuts) + 1)
    if cuts not in every:
        with pytest.raises(PartitionError):
            split_at(problem, cuts)
        return
    found = split_at(problem, cuts)
    assert found.cuts == cuts
    assert found.bottleneck_us == max(found.stage_us) == every[cuts][1]
    assert found.optimum_us == min(bottleneck for _, bottleneck in every.values())
    assert found.lower_bound_us <= found.optimum_us


@settings(deadline=None, max_examples=150)
@given(problems())
def test_too_many_stages_names_the_most_that_are_possible(problem: PartitionProblem):
    possible = [k for k in range(1, len(problem.names) + 1) if every_partition(problem, k)]
    with pytest.raises(PartitionError) as raised:
        partition(problem, len(problem.names) + 1)
    assert f"; ask for --stages {max(possible)}" in str(raised.value)
    partition(problem, max(possible))


def test_too_many_stages_names_what_prevents_more():
    problem = chain(
        {"wte": 1.0, "a": 1.0, "lm_head": 1.0, "b": 1.0, "lstm": 1.0, "item": 1.0, "c": 1.0},
        allowed=(True, True, True, True, False, True),
        reason=(None, None, None, None, "a tuple crosses there", None),
    )
    for name in ("wte", "lm_head"):
        problem.graph.nodes[name]["group"] = "wte.weight"
    with pytest.raises(PartitionError) as raised:
        partition(problem, 9)
    assert str(raised.value) == (
        "asked for 9 stages, but the model has only 3 places to cut "
        "(2 ruled out: 'wte' and 'lm_head' belong in one stage (they share wte.weight); "
        "1 ruled out: a tuple crosses there); ask for --stages 4 or fewer, or give what shares a "
        "parameter one of its own each"
    )


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ((True, False), "asked for 3 stages, but the model has only 1 place to cut .*2 or fewer$"),
        ((False, False), "asked for 3 stages, but the model has no place to cut .*--stages 1$"),
    ],
)
def test_few_places_are_counted_in_words(allowed: tuple[bool, ...], message: str):
    with pytest.raises(PartitionError, match=message):
        partition(chain({"a": 1.0, "b": 1.0, "c": 1.0}, allowed=allowed), 3)


def test_no_stages_are_refused():
    with pytest.raises(PartitionError, match="asked for 0 stages; ask for --stages 1 or more"):
        partition(chain(LAYERS), 0)


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf")])
def test_a_tolerance_that_is_no_share_is_refused(tolerance: float):
    with pytest.raises(PartitionError, match=f"tolerance is {tolerance}; give a share"):
        partition(chain(LAYERS), 2, tolerance=tolerance)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["layr2"], "cannot split at 'layr2', which is no node of the graph; did you mean 'layer2"),
        (["xyz"], "no node .*; cuts are possible after 'stem', 'layer1', 'layer2', 'flatten'$"),
        (["fc"], "cannot cut after 'fc': it is the last node"),
        (["layer2", "layer2"], "'layer2' is named 2 times"),
        (["layer3", "flatten"], "from 'flatten' to 'flatten' .* leave out the cut after 'layer3'"),
    ],
)
def test_split_at_refuses(names: list[str], message: str):
    with pytest.raises(PartitionError, match=message):
        split_at(chain(LAYERS), names)


def test_split_at_lists_eight_places_at_most():
    problem = chain({f"node{index}": 1.0 for index in range(12)})
    with pytest.raises(PartitionError, match="'node7' and 3 more$"):
        split_at(problem, ["xyz"])


def test_split_at_finds_no_place_in_one_node():
    with pytest.raises(PartitionError, match="the graph has no place to cut"):
        split_at(chain({"all": 1.0}), ["xyz"])


def test_split_at_a_place_that_is_ruled_out_tells_why():
    problem = chain(
        {"lstm": 1.0, "first": 1.0, "fc": 1.0},
        allowed=(False, True),
        reason=("a tuple crosses there", None),
    )
    with pytest.raises(PartitionError, match="cannot cut after 'lstm': a tuple crosses there"):
        split_at(problem, ["lstm"])


def test_a_pooling_layer_is_no_stage():
    problem = chain({"conv": 1.0, "avgpool": 9.0, "fc": 2.0})
    assert partition(problem, 3).cuts == ("conv", "avgpool")
    problem.graph.nodes["avgpool"]["trainable"] = False
    assert partition(problem, 2).stages == (("conv", "avgpool"), ("fc",))
    with pytest.raises(PartitionError) as raised:
        partition(problem, 3)
    assert str(raised.value) == (
        "asked for 3 stages, but the model has only 1 place to cut (every stage needs a parameter "
        "that trains and on which the output depends); ask for --stages 2 or fewer"
    )
    with pytest.raises(PartitionError, match="'avgpool' to 'avgpool' .* nothing to train"):
        split_at(problem, ["conv", "avgpool"])


def test_a_graph_that_does_not_train_is_refused():
    problem = chain({"conv": 1.0, "fc": 1.0})
    for facts in problem.graph.nodes.values():
        facts["trainable"] = False
    with pytest.raises(PartitionError, match="no node of the graph has a parameter that trains"):
        replace(problem)


def test_split_at_refuses_an_idle_first_stage():
    with pytest.raises(PartitionError, match="from 'x' to 'x' .* leave out the cut after 'x'"):
        split_at(chain({"x": 0.0, "a": 1.0, "b": 1.0}), ["x"])
