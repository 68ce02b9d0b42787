"""The values between the parts: their JSON reads back equal, and damage is named by its path."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir_values import a_plan, plans, values, words
from scpl_compile.errors import ProgramError
from scpl_compile.ir import (
    Crossing,
    Cut,
    InputSpec,
    LocalLoss,
    LossSource,
    ModelSource,
    NodeCost,
    Plan,
    Stage,
    TensorMeta,
    dtype_nbytes,
    from_json,
    to_json,
)

# ---------------------------------------------------------------------- there and back


@settings(max_examples=150, deadline=None)
@given(values)
def test_every_value_reads_back_equal_from_its_json(value: Any) -> None:
    text = json.dumps(to_json(value))
    assert from_json(type(value), json.loads(text)) == value


@given(plans())
def test_the_digest_is_that_of_the_content(plan: Plan) -> None:
    again = from_json(Plan, json.loads(json.dumps(to_json(plan))))
    assert again.digest == plan.digest
    assert len(plan.digest) == 64 and int(plan.digest, 16) >= 0
    assert dataclasses.replace(plan, batch_size=plan.batch_size + 1).digest != plan.digest


def test_the_digest_does_not_depend_on_the_order_of_options() -> None:
    plan = a_plan()
    turned = dict(reversed(plan.optimizer.items()))
    assert dataclasses.replace(plan, optimizer=turned).digest == plan.digest


def test_a_value_is_frozen_and_has_keyword_arguments_only() -> None:
    plan = a_plan()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.method = "bp"  # type: ignore[misc]
    with pytest.raises(TypeError):
        TensorMeta((1,), "float32", True, 0)  # type: ignore[misc]
    assert not hasattr(plan, "__dict__")


# ---------------------------------------------------------------------- every leaf of a plan


def leaves(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The places of all that is no object and no array."""
    if isinstance(data, dict):
        for key, item in data.items():
            yield from leaves(item, (*path, key))
    elif isinstance(data, list):
        for i, item in enumerate(data):
            yield from leaves(item, (*path, i))
    else:
        yield path


def nodes(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """All places, the objects and arrays included; the whole is ()."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, item in items if isinstance(data, (dict, list)) else ():
        yield from nodes(item, (*path, key)) if isinstance(item, (dict, list)) else [(*path, key)]


def replaced(data: Any, path: tuple[str | int, ...], item: Any) -> Any:
    """`data` with `item` at `path`."""
    if not path:
        return item
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = replaced(copy[path[0]], path[1:], item)
    return copy


def at(data: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def written(path: tuple[str | int, ...]) -> str:
    """`stages[0].losses[0].options.head`, as messages write it."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


PLAN = to_json(a_plan())
LEAVES = list(leaves(PLAN))
NODES = list(nodes(PLAN))


def hint_at(path: tuple[str | int, ...]) -> Any:
    """The type that stands at `path` of a plan."""
    hint: Any = Plan
    for key in path:
        hint = without_none(hint)
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin is tuple:
            hint = args[0] if args[-1] is Ellipsis else args[int(key)]
        elif origin is Mapping:
            hint = args[1]
        else:
            hint = typing.get_type_hints(hint)[str(key)]
    return hint


def without_none(hint: Any) -> Any:
    """`X` of `X | None`, else the hint itself."""
    rest = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return rest[0] if typing.get_origin(hint) is types.UnionType and len(rest) == 1 else hint


def taken_at(hint: Any) -> set[type]:
    """The JSON types that a place with this hint takes."""
    if typing.get_origin(hint) is types.UnionType:
        return set().union(*(taken_at(arg) for arg in typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return {list}
    if typing.get_origin(hint) is Mapping or dataclasses.is_dataclass(hint):
        return {dict}
    return {float, int} if hint is float else {hint}


def other(value: Any) -> Any:
    """Another value of the same JSON type."""
    if isinstance(value, bool):
        return not value
    if value is None:
        return 1
    return value + "x" if isinstance(value, str) else value + 1


@pytest.mark.parametrize("path", LEAVES, ids=written)
def test_the_digest_changes_with_every_field(path: tuple[str | int, ...]) -> None:
    plan = a_plan()
    changed = {"dtype": "float64", "batch_dim": 1}.get(str(path[-1])) or other(at(PLAN, path))
    if path[-1] == "index" and path[0] == "stages":
        with pytest.raises(ProgramError, match="stage indices"):
            from_json(Plan, replaced(PLAN, path, changed))
        return
    assert from_json(Plan, replaced(PLAN, path, changed)).digest != plan.digest


TYPED = [path for path in NODES if hint_at(path) is not Any]
"""All places but the arguments of constructors, which may be any JSON."""


@pytest.mark.parametrize("path", TYPED, ids=written)
def test_a_value_of_another_type_is_named_by_its_path(path: tuple[str | int, ...]) -> None:
    taken = taken_at(hint_at(path))
    wrong = [
        item
        for item in (None, True, 3, 2.5, "text", [], [1], {}, {"a": 1})
        if type(item) not in taken
    ]
    assert len(wrong) >= 4
    for item in wrong:
        with pytest.raises(ProgramError) as caught:
            from_json(Plan, replaced(PLAN, path, item), "plan.json")
        place = f"plan.json.{written(path)}".rstrip(".")
        assert str(caught.value).startswith(f"{place} must be ")


def test_a_value_that_is_nested_too_deeply_is_refused() -> None:
    data = to_json(a_plan())
    for depth in (40, 60, 900):
        data["source"]["config"]["width"] = json.loads("[" * depth + "]" * depth)
        if depth == 40:
            assert from_json(Plan, data).digest
        else:
            with pytest.raises(ProgramError, match="config.width is nested deeper than 50 levels"):
                from_json(Plan, data)


def test_a_number_that_no_float_holds_is_refused() -> None:
    with pytest.raises(ProgramError, match="bottleneck_us must be float, not 1000"):
        from_json(Plan, replaced(PLAN, ("bottleneck_us",), 10**400))


OBJECTS = [path for path in NODES if dataclasses.is_dataclass(without_none(hint_at(path)))]


@pytest.mark.parametrize("path", OBJECTS, ids=written)
def test_a_missing_or_unknown_field_is_named_with_its_object(path: tuple[str | int, ...]) -> None:
    place = written(path) or "Plan"
    whole = at(PLAN, path)
    for name in whole:
        rest = {key: item for key, item in whole.items() if key != name}
        with pytest.raises(ProgramError) as caught:
            from_json(Plan, replaced(PLAN, path, rest))
        assert str(caught.value) == f"{place} lacks the field {name!r}"
    with pytest.raises(ProgramError) as caught:
        from_json(Plan, replaced(PLAN, path, {**whole, "colour": 1}))
    assert str(caught.value) == f"{place} has the unknown field 'colour'"


def test_every_object_of_a_plan_was_tried() -> None:
    tried = {type(from_json_at(path)) for path in OBJECTS}
    assert tried == {
        Plan, Stage, LocalLoss, LossSource, Cut, Crossing, TensorMeta, InputSpec, ModelSource,
    }  # fmt: skip


def from_json_at(path: tuple[str | int, ...]) -> Any:
    value: Any = a_plan()
    for key in path:
        value = value[key] if isinstance(key, int) else getattr(value, key)
    return value


@pytest.mark.parametrize(
    ("path", "item", "message"),
    [
        (("edges", 0), [1], "edges[0] must have 2 items, not 1"),
        (("edges", 0), [1, 2, 3], "edges[0] must have 2 items, not 3"),
        (("opaque", 0, 1), 3, "opaque[0][1] must be str, not 3"),
        (("stages", 1, "losses", 0, "options", "head"), [1],
         "stages[1].losses[0].options.head must be bool or int or float or str, not [1]"),
        (("stages", 1, "losses", 0, "in_shapes", 0, 0), 3.0,
         "stages[1].losses[0].in_shapes[0][0] must be int, not 3.0"),
        (("method",), "x" * 100 + "y", None),
        (("bottleneck_us",), "fast", "bottleneck_us must be float, not 'fast'"),
        (("cuts", 0, "crossings", 0, "meta", "dtype"), "float31",
         "cuts[0].crossings[0].meta: dtype 'float31' is not one of float64, "),
        (("cuts", 0, "crossings", 0, "meta", "batch_dim"), 2,
         "cuts[0].crossings[0].meta: batch_dim 2 is not a dimension of (8, 3)"),
        (("inputs", 0, "dtype"), "", "inputs[0]: dtype '' is not one of "),
        (("inputs", 0, "name"), "1x", "inputs[0]: input name '1x' is not an identifier"),
        (("stages",), [], "Plan: stage indices are [], not 0, 1, 2 …"),
        (("stages", 0, "index"), 1, "Plan: stage indices are [1, 1], not 0, 1, 2 …"),
        (("cuts",), [], "Plan: 2 stages have 0 cuts between them"),
        (("placement",), ["cpu"], "Plan: 2 stages are placed on 1"),
    ],
)  # fmt: skip
def test_damage_is_told_in_one_sentence(
    path: tuple[str | int, ...], item: Any, message: str | None
) -> None:
    data = replaced(PLAN, path, item)
    if message is None:
        assert at(to_json(from_json(Plan, data)), path) == item
        return
    with pytest.raises(ProgramError) as caught:
        from_json(Plan, data)
    assert str(caught.value).startswith(message)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
), st.sampled_from(NODES))  # fmt: skip
def test_no_other_json_is_anything_but_a_plan_or_a_program_error(
    item: Any, path: tuple[str | int, ...]
) -> None:
    try:
        plan = from_json(Plan, replaced(PLAN, path, item))
    except ProgramError as error:
        assert len(str(error)) < 400
    else:
        assert isinstance(plan, Plan)


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(ProgramError) as caught:
        from_json(Plan, "x" * 1000)
    assert str(caught.value) == f"Plan must be an object, not '{'x' * 36}…"


def test_a_whole_number_is_a_float_where_a_float_is_asked_for() -> None:
    read = from_json(Plan, replaced(PLAN, ("bottleneck_us",), 2))
    assert read.bottleneck_us == 2.0 and type(read.bottleneck_us) is float
    kept = from_json(Plan, replaced(PLAN, ("optimizer", "lr"), 1))
    assert type(kept.optimizer["lr"]) is int


# ---------------------------------------------------------------------- figures


def test_bytes_are_those_of_shape_and_dtype() -> None:
    sizes = {"float32": 4, "bfloat16": 2, "int64": 8, "bool": 1, "complex128": 16}
    for dtype, nbytes in sizes.items():
        meta = TensorMeta(shape=(3, 5), dtype=dtype, requires_grad=False, batch_dim=None)
        assert meta.nbytes == 15 * nbytes == 15 * dtype_nbytes(dtype)
    scalar = TensorMeta(shape=(), dtype="float64", requires_grad=False, batch_dim=None)
    assert scalar.nbytes == 8
    with pytest.raises(ProgramError, match="dtype 'float8' is not one of float64"):
        dtype_nbytes("float8")


def test_a_cuts_bytes_are_those_of_its_crossings() -> None:
    plan = a_plan()
    (crossing,) = plan.cuts[0].crossings
    assert plan.cuts[0].nbytes == 8 * 3 * 4
    assert dataclasses.replace(plan.cuts[0], crossings=(crossing, crossing)).nbytes == 2 * 96
    assert plan.num_stages == 2


def test_a_nodes_time_is_forward_and_backward() -> None:
    cost = NodeCost(
        name="a", forward_us=1.5, backward_us=2.0, flops=1, bytes_moved=1, param_bytes=1,
        activation_bytes=1, source="model",
    )  # fmt: skip
    assert cost.total_us == 3.5


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (InputSpec(name="x", dtype="float32", shape=(3, 32, 32)), "x:float32:3x32x32"),
        (InputSpec(name="ids", dtype="int64", shape=(128,), high=30000), "ids:int64:128<30000"),
        (InputSpec(name="t", dtype="float32", shape=()), "t:float32:"),
    ],
)
def test_an_input_prints_as_the_user_writes_it(spec: InputSpec, text: str) -> None:
    assert str(spec) == text


# ---------------------------------------------------------------------- the task


def test_a_plan_of_one_label_is_written_as_before_there_were_tasks() -> None:
    plan = a_plan()
    assert "task" not in to_json(plan)
    assert from_json(Plan, to_json(plan) | {"task": "single-label"}).digest == plan.digest
    several = dataclasses.replace(plan, task="multi-label")
    assert to_json(several) == to_json(plan) | {"task": "multi-label"}
    assert from_json(Plan, to_json(several)) == several and several.digest != plan.digest


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ProgramError, match="task 'tokens' is not one of single-label, multi-label"):
        from_json(Plan, to_json(a_plan()) | {"task": "tokens"})
    with pytest.raises(
        ProgramError, match=r"Plan\.task must be str, not 1|task must be str, not 1"
    ):
        from_json(Plan, to_json(a_plan()) | {"task": 1})
