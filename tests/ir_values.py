"""Values of every kind that passes between the parts, drawn by hypothesis; and one full plan."""

import dataclasses
from typing import Any

from hypothesis import strategies as st

from scpl_compile.ir import (
    TASKS,
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
)

DTYPES = ("float32", "bfloat16", "int64", "bool", "complex128")

words = st.text(max_size=6)
names = st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True)
numbers = st.floats(allow_nan=False, allow_infinity=False)
sizes = st.integers(0, 10**6)
shapes = st.lists(sizes, max_size=4).map(tuple)
scalars = st.booleans() | st.integers() | numbers | words
mappings = st.dictionaries(words, scalars, max_size=3)


def few(items: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(items, max_size=2).map(tuple)


@st.composite
def metas(draw: st.DrawFn) -> TensorMeta:
    shape = draw(shapes)
    dims = st.none() | st.integers(0, len(shape) - 1) if shape else st.none()
    return TensorMeta(
        shape=shape,
        dtype=draw(st.sampled_from(DTYPES)),
        requires_grad=draw(st.booleans()),
        batch_dim=draw(dims),
    )


specs = st.builds(
    InputSpec, name=names, dtype=st.sampled_from(DTYPES), shape=shapes, high=st.none() | sizes
)
arguments = st.recursive(
    st.none() | scalars,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
sources = st.builds(
    ModelSource, spec=words, config=st.dictionaries(words, arguments, max_size=3),
    path=st.none() | words, sha256=st.none() | words, is_object=st.booleans(),
    model_class=words, config_class=words,
)  # fmt: skip
costs = st.builds(
    NodeCost, name=words, forward_us=numbers, backward_us=numbers, flops=sizes, bytes_moved=sizes,
    param_bytes=sizes, activation_bytes=sizes, source=words,
)  # fmt: skip
crossings = st.builds(
    Crossing, name=words, meta=metas(), producer=st.integers(-1, 9), consumers=few(sizes),
    alias=st.sampled_from(("", "parameter", "buffer", "input")),
)  # fmt: skip
loss_sources = st.builds(LossSource, path=words, name=words, sha256=words)
losses = st.builds(
    LocalLoss, name=words, kind=words, reads=few(words), mask=words, in_shapes=few(shapes),
    batch_dims=few(sizes), options=mappings, num_parameters=sizes, flops=sizes,
    source=st.none() | loss_sources,
)  # fmt: skip


def stages(index: int) -> st.SearchStrategy[Stage]:
    return st.builds(
        Stage, index=st.just(index), nodes=few(words), parameters=few(words), buffers=few(words),
        inputs=few(words), outputs=few(words), losses=few(losses), num_parameters=sizes,
        cost_us=numbers,
    )  # fmt: skip


def cuts(index: int) -> st.SearchStrategy[Cut]:
    return st.builds(
        Cut, index=st.just(index), after=words, crossings=few(crossings), detach=st.booleans()
    )


@st.composite
def plans(draw: st.DrawFn, max_stages: int = 3) -> Plan:
    num_stages = draw(st.integers(1, max_stages))
    return Plan(
        method=draw(words),
        model=draw(words),
        stages=tuple(draw(stages(k)) for k in range(num_stages)),
        cuts=tuple(draw(cuts(k)) for k in range(num_stages - 1)),
        edges=draw(few(st.tuples(sizes, sizes))),
        inputs=draw(few(specs)),
        batch_size=draw(sizes),
        outputs=draw(few(words)),
        num_classes=draw(sizes),
        schedule=draw(words),
        placement=tuple(draw(words) for _ in range(num_stages)),
        num_microbatches=draw(sizes),
        threads_per_stage=draw(sizes),
        optimizer=draw(mappings),
        inference=draw(few(words)),
        untrained=draw(few(words)),
        frontend=draw(words),
        opaque=draw(few(st.tuples(words, words))),
        solver=draw(words),
        bottleneck_us=draw(numbers),
        lower_bound_us=draw(numbers),
        source=draw(st.none() | sources),
        versions=draw(st.dictionaries(words, words, max_size=2)),
        task=draw(st.sampled_from(TASKS)),
    )


values = st.one_of(
    metas(), specs, sources, costs, crossings, losses, stages(3), cuts(1), plans(max_stages=2)
)


def a_plan() -> Plan:
    """A plan in which nothing is empty, so that every kind of field can be damaged or changed."""
    meta = TensorMeta(shape=(8, 3), dtype="float32", requires_grad=True, batch_dim=0)
    loss = LocalLoss(
        name="local_loss", kind="local", reads=("h",), mask="mask", in_shapes=((3,),),
        batch_dims=(0,), options={"head": "mlp", "hidden": 64, "norm": True, "scale": 0.5},
        num_parameters=10, flops=20, source=LossSource(path="/own.py", name="Own", sha256="0f"),
    )  # fmt: skip
    first = Stage(
        index=0, nodes=("a", "b"), parameters=("a.weight",), buffers=("b.mean",), inputs=("x",),
        outputs=("h",), losses=(loss,), num_parameters=12, cost_us=1.5,
    )  # fmt: skip
    crossing = Crossing(name="h", meta=meta, producer=0, consumers=(1,), alias="parameter")
    return Plan(
        method="scpl",
        model="net.py:build",
        stages=(first, dataclasses.replace(first, index=1)),
        cuts=(Cut(index=0, after="b", crossings=(crossing,), detach=True),),
        edges=((0, 1),),
        inputs=(InputSpec(name="x", dtype="int64", shape=(3,), high=7),),
        batch_size=8,
        outputs=("logits",),
        num_classes=4,
        schedule="stream",
        placement=("cpu", "cpu"),
        num_microbatches=1,
        threads_per_stage=1,
        optimizer={"name": "adam", "lr": 1e-3},
        inference=("0F", "1F"),
        untrained=("a.bias",),
        frontend="fx",
        opaque=(("c", "autocast"),),
        solver="chain",
        bottleneck_us=2.5,
        lower_bound_us=2.25,
        source=ModelSource(spec="net.py:build", config={"width": 3}, path="/net.py", sha256="ab"),
        versions={"torch": "2"},
    )
