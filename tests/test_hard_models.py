"""No model is compiled into something that silently trains differently.

Each hard model compiles, and then verify found its forward in train and eval and its gradients by
name to be the eager model's, the streamed training is the sequential one bit for bit, and every
parameter moves; or it is refused, by a message that says what stands in the way.
"""

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hard_models as hard
import hard_nets as nets
from scpl_compile import Program, compile_model
from scpl_compile.errors import CaptureError, PartitionError
from scpl_compile.sources import example_inputs
from scpl_compile.verify.compare import RTOL

BATCH = 6
FRONTENDS = ("fx", "record")


def compiled(model: nn.Module, inputs: str = "6", **options: Any) -> Program:
    if "split_at" not in options:
        options.setdefault("num_stages", 2)
    return compile_model(model, inputs, batch_size=BATCH, threads_per_stage=1, **options)


def opaque(program: Program) -> dict[str, str]:
    return dict(program.plan.opaque)


def trained_eagerly(model: nn.Module, program: Program) -> set[str]:
    """Names of the parameters that get a gradient in ordinary training."""
    model = copy.deepcopy(model).train()
    output = model(**dict(zip((s.name for s in program.plan.inputs), batch(program), strict=True)))
    logits = output["logits"] if isinstance(output, dict) else output
    F.cross_entropy(logits, torch.arange(BATCH) % 4).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def batch(program: Program, seed: int = 0) -> tuple[Tensor, ...]:
    return example_inputs(program.plan.inputs, BATCH, seed)


def trained(program: Program, schedule: str) -> dict[str, Tensor]:
    """The state after two steps."""
    with program.trainer(lr=0.1, schedule=schedule, seed=1) as trainer:
        for step in range(2):
            trainer.step(batch(program, step), torch.arange(BATCH) % 4)
        return trainer.state_dict()


def check(
    program: Program, model: nn.Module, schedules: Sequence[str] = ("stream", "sequential")
) -> None:
    """Verified, exact, and all of it trains."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = trained_eagerly(model, program)
    found = program.verification
    assert found.is_verified
    for name in ("forward_eval", "forward_train", "gradients"):
        assert 0 <= float(found.checks[name]) <= RTOL, name
    assert found.checks["parameters"] == len(expected)
    state, *others = [trained(program, schedule) for schedule in schedules]
    for other in others:
        assert [name for name in state if not torch.equal(state[name], other[name])] == []
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    moved = {name for name in trainable if not torch.equal(state[name], before[name])}
    assert moved == expected
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------- constructs

UNREGISTERED = "neither parameter nor buffer"
TRAINING = "depends on self.training"
RANDOM = "random numbers drawn in Python"
DATA = "looks at the values of a tensor"

CONSTRUCTS: Mapping[type[hard.Part], tuple[str, str]] = {
    hard.Autocast: ("autocast", "autocast"),
    hard.NoGrad: ("no_grad", ""),
    hard.CustomFunction: ("custom autograd.Function", "custom autograd.Function"),
    hard.Checkpointed: ("checkpoint()", "checkpoint()"),
    hard.FunctionalDropout: ("", ""),  # a constant that depends on the mode
    hard.TrainingBranch: (TRAINING, TRAINING),
    hard.TrainingOnly: (TRAINING, TRAINING),
    hard.LayerDrop: (RANDOM, RANDOM),
    hard.NumpyNoise: (RANDOM, RANDOM),
    hard.DataBranch: ("control flow", DATA),
    hard.DataScale: ("float() argument", DATA),
    hard.BatchBranch: ("control flow", "depends on the batch size (batch > 4)"),
    hard.BatchLoop: ("cannot be iterated", "depends on the batch size (batch)"),
    hard.SizeLoop: ("cannot be interpreted as an integer", ""),
    hard.Routing: ("", "a tensor whose size depends on values"),
    hard.MakesSure: ("control flow", DATA),
    hard.KeepsTable: (UNREGISTERED, ""),
    hard.CountsInPlainTensor: (UNREGISTERED, "writes 'part.seen' in place"),
    hard.Rank: ("control flow", "size depends on values"),
    hard.Rows: ("cannot be iterated", "size depends on values"),
    hard.NoGradBlock: ("no_grad", ""),
    hard.NoGradInPlace: ("no_grad", "in place under no_grad"),
    hard.TensorOrNumber: (TRAINING, TRAINING),
    hard.Siamese: ("", ""),
    hard.Recovers: ("control flow", DATA),
    hard.AnyOf: ("control flow", DATA),
    hard.SliceAssignment: ("does not support item assignment", ""),
    hard.AssignsData: ("'data' is assigned", "assigns the attribute 'data' of a tensor"),
    hard.CountsCalls: ("writes 'part.calls' in place", "writes 'part.calls' in place"),
    hard.KeepsLast: ("changes its attribute 'last_seen'", "changes its attribute 'last_seen'"),
    hard.PlainTensor: (UNREGISTERED, ""),
    hard.MadeInForward: ("is not installed as a submodule", ""),
    hard.BatchScale: ("", ""),
    hard.Views: ("", ""),
    hard.Aliases: ("", ""),
    hard.Swapped: ("", ""),
    hard.Fourier: ("", ""),
    hard.Padded: ("", ""),
    hard.ParametersAsArguments: ("", ""),
    hard.Keywords: ("", ""),
    hard.Dataclasses: ("", ""),
    hard.Dicts: ("", ""),
    hard.Twice: ("", ""),
    hard.WeightNorm: ("", ""),
    hard.SpectralNorm: ("", ""),
    hard.CumulativeNorm: ("", ""),
    hard.Device: ("", ""),
    hard.Hooked: ("", ""),
}
"""Why the module that has the construct stays whole in fx and in record, "" where it is opened."""

IN_ROOT: Mapping[type[hard.Part], tuple[str, str]] = {
    hard.CountsCalls: ("changes its attribute 'calls'", "writes 'calls' in place"),
    hard.CountsInPlainTensor: (UNREGISTERED, "writes 'seen' in place"),
    hard.MakesSure: ("control flow", ""),
    hard.Rank: ("control flow", DATA),
    hard.Rows: ("cannot be iterated", DATA),
    hard.Routing: ("", ""),  # where most of the model is inside, numbers from data are followed
}
"""Why the model's own forward is refused, where that is not why a submodule stays whole."""


@pytest.fixture(autouse=True)
def random_states() -> Any:
    """Python's and numpy's, put back."""
    states = random.getstate(), np.random.get_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("part", CONSTRUCTS, ids=lambda part: part.__name__)
def test_a_construct_in_a_submodule_trains_as_it_did(part: type[hard.Part], frontend: str) -> None:
    model = hard.as_submodule(part)
    program = compiled(model, frontend=frontend)
    assert program.plan.frontend == frontend
    reason = CONSTRUCTS[part][FRONTENDS.index(frontend)]
    assert list(opaque(program)) == ["part"] * bool(reason)
    assert reason in opaque(program).get("part", "")
    check(program, model)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("part", CONSTRUCTS, ids=lambda part: part.__name__)
def test_a_construct_in_the_models_own_forward_trains_as_it_did_or_is_refused(
    part: type[hard.Part], frontend: str
) -> None:
    model = hard.as_root(part)
    reason = {**CONSTRUCTS, **IN_ROOT}[part][FRONTENDS.index(frontend)]
    if not reason:
        program = compiled(model, frontend=frontend)
        assert opaque(program) == {}
        check(program, model)
        return
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CaptureError) as raised:
        compiled(model, frontend=frontend)
    message = str(raised.value)
    assert reason in message
    assert "the forward of" in message and "itself" in message
    assert message.endswith("move that code into a submodule, which is then kept whole")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_other_frontend_is_tried_where_the_first_fails() -> None:
    for part, reasons in CONSTRUCTS.items():
        if {**CONSTRUCTS, **IN_ROOT}[part][0] and not reasons[1]:
            model = hard.as_root(part)
            program = compiled(model)
            assert program.plan.frontend == "record"
            assert program.verification.is_verified


# ---------------------------------------------------------------------- networks


@dataclass(frozen=True, kw_only=True)
class Hard:
    """A network, its inputs, how it is compiled, and parts of the messages by which it is refused.

    refused: frontend -> a part of the message.
    """

    build: Callable[[], nn.Module]
    inputs: str = "6"
    options: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


IDS = "ids:int64:5<11"
PACKED = "x:5x6,lengths:int64:<6"
THREE = {"num_stages": 3}
ASSIGNS = {"fx": "does not support item assignment"}

NETWORKS = {
    "three_skips": Hard(build=nets.ThreeSkips, inputs="1x8x8"),
    "three_skips_in_4": Hard(build=nets.ThreeSkips, inputs="1x8x8", options={"num_stages": 4}),
    "two_towers": Hard(build=nets.TwoTowers, inputs="x:6,context:5"),
    "two_towers_in_3": Hard(build=nets.TwoTowers, inputs="x:6,context:5", options=THREE),
    "gru": Hard(build=partial(nets.Recurrent, nn.GRU), inputs="5x6"),
    "lstm": Hard(build=partial(nets.Recurrent, nn.LSTM), inputs="5x6"),
    "packed": Hard(build=nets.Packed, inputs=PACKED),
    "packed_itself": Hard(
        build=nets.PackedItself,
        inputs=PACKED,
        refused={"record": "itself cannot be traced at hard_nets.py:"},
    ),
    "one_table": Hard(build=nets.OneTable, inputs=IDS, options=THREE),
    "encoder": Hard(build=nets.Encoder, inputs=IDS),
    "encoder_in_3": Hard(build=nets.Encoder, inputs=IDS, options=THREE),
    "attention": Hard(build=nets.Attention, inputs="5x8", options=THREE),
    "position_crosses": Hard(build=nets.PositionCrosses, inputs=IDS, options=THREE),
    "expanded_parameter": Hard(build=nets.Expanded, options=THREE),
    "views_of_a_buffer": Hard(build=nets.BufferCrosses, options=THREE),
    "transposed": Hard(
        build=nets.Transposed, inputs="4x6", options={"split_at": ("transpose",)}
    ),
    "in_place_first": Hard(
        build=nets.InPlaceFirst, options={"split_at": ("tanh",)}, refused=ASSIGNS
    ),
    "skips_a_stage": Hard(build=nets.SkipsAStage, options=THREE),
    "tied_in_one_stage": Hard(build=partial(nets.TiedEnds, is_cuttable=True), inputs=IDS),
    "shared_layer": Hard(build=nets.Shared, options=THREE),
    "early_output": Hard(build=nets.EarlyOutputs),
    "no_meta_device": Hard(build=nets.NoMeta),
    "frozen": Hard(build=nets.frozen_stem),
    "float64": Hard(build=nets.double, inputs="x:float64:6"),
    "odd_names": Hard(build=nets.OddNames),
    "loop_over_time": Hard(build=nets.DepthByInput, inputs="5x6"),
}  # fmt: skip


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_trains_as_it_did(name: str, frontend: str) -> None:
    case = NETWORKS[name]
    model = case.build()
    if message := case.refused.get(frontend):
        with pytest.raises(CaptureError) as raised:
            compiled(model, case.inputs, frontend=frontend, **case.options)
        assert message in str(raised.value)
        return
    program = compiled(model, case.inputs, frontend=frontend, **case.options)
    check(program, model)


@pytest.mark.parametrize("name", ["three_skips", "gru", "attention", "in_place_first", "float64"])
def test_backpropagation_over_the_cuts_is_the_models(name: str) -> None:
    case = NETWORKS[name]
    model = case.build()
    check(compiled(model, case.inputs, method="bp", **case.options), model, ["bp"])


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_ties_that_no_stage_can_hold_are_named(frontend: str) -> None:
    with pytest.raises(PartitionError) as raised:
        compiled(nets.TiedEnds(), IDS, frontend=frontend)
    assert "'embedding' and 'head' belong in one stage" in str(raised.value)
    assert "they share embedding.weight = head.weight" in str(raised.value)


def test_a_frozen_stem_and_a_dropped_output_do_not_move() -> None:
    for model, fixed in [
        (nets.frozen_stem(), {"layers.0.weight", "layers.0.bias"}),
        (nets.EarlyOutputs(), {"early.weight", "early.bias"}),
    ]:
        state = trained(compiled(model), "stream")
        same = {n for n, p in model.named_parameters() if torch.equal(p, state[n])}
        assert same == fixed
