"""From a captured graph with a stage for every node to a Plan."""

import json
from pathlib import Path

import pytest
import torch
from planning import BATCH, NUM_CLASSES, Staged, staged
from torch import Tensor, nn

from golden_models import ClassToken, LstmClassifier, NestedCnn, UNet
from own_files import layers, own_file
from scpl_compile.cost import DEVICES
from scpl_compile.errors import MethodError
from scpl_compile.ir import InputSpec, Plan, from_json, to_json
from scpl_compile.methods import make_method
from scpl_compile.methods.base import Mask, loss_us
from scpl_compile.methods.plan import candidate_view, find_mask, last_view, stage_paths
from scpl_compile.runtime.losses import LocalLoss

IDS = "ids:int64:5<11,mask:int64:5<2"


@pytest.fixture(scope="module")
def unet() -> Staged:
    return staged(UNet(), "1x8x8", "relu", "middle")


@pytest.fixture(scope="module")
def lstm() -> Staged:
    return staged(LstmClassifier(), IDS, "lstm1")


# ---------------------------------------------------------------------- the plan


def test_every_stage_has_its_part_of_the_model(unet: Staged) -> None:
    plan = unet.plan()
    assert [stage.nodes for stage in plan.stages] == [
        ("down", "torch.nn.functional.relu"),
        ("middle",),
        ("torch.cat", "up", "getattr", "getitem", "getitem", "Tensor.view", "Tensor.amax", "fc"),
    ]
    assert [stage.inputs for stage in plan.stages] == [("x",), ("relu",), ("relu", "middle")]
    assert [stage.outputs for stage in plan.stages] == [("relu",), ("relu", "middle"), ("fc",)]
    owned = [name for stage in plan.stages for name in stage.parameters]
    model = unet.capture.model
    assert sorted(owned) == sorted(name for name, _ in model.named_parameters())
    counts = [sum(model.get_parameter(n).numel() for n in s.parameters) for s in plan.stages]
    assert [stage.num_parameters for stage in plan.stages] == counts
    assert plan.outputs == ("fc",)
    assert [(cut.index, cut.after) for cut in plan.cuts] == [(0, "relu"), (1, "middle")]
    assert plan.edges == ((0, 1), (1, 2))
    assert plan.inference == ("0F", "1F", "2F")


def test_buffers_go_with_their_module() -> None:
    plan = staged(NestedCnn(), "3x8x8", "layers.0").plan()
    assert plan.stages[0].buffers == tuple(
        f"layers.0.norm{i}.{name}"
        for i in (1, 2)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    )
    assert all(name.startswith("layers.1.") for name in plan.stages[1].buffers)


def test_a_plan_reads_back_from_json_to_the_same_digest(lstm: Staged) -> None:
    plan = lstm.plan()
    again = from_json(Plan, json.loads(json.dumps(to_json(plan))))
    assert again == plan
    assert again.digest == plan.digest
    assert lstm.plan(num_classes=5).digest != plan.digest


def test_facts_are_recorded(unet: Staged) -> None:
    plan = unet.plan(stage_us=(1.0, 4.0, 2.0), opaque=(("middle", "checkpoint()"),))
    assert plan.bottleneck_us == 4.0
    assert [stage.cost_us for stage in plan.stages] == [1.0, 4.0, 2.0]
    assert plan.opaque == (("middle", "checkpoint()"),)
    assert plan.batch_size == BATCH
    assert plan.frontend == "fx"


def test_the_cost_of_losses_that_differ_by_stage_is_that_of_the_stage(tmp_path: Path) -> None:
    """Balanced as the first stage's, which alone are known then, and told as they are."""
    width = "self.wide = nn.Linear(8, options['width'])"
    body = "self.wide(x)"
    plans = [
        staged(layers(), "8", "0", "2").plan(
            own_file(tmp_path, init=width, body=body, options=options), stage_us=(5.0, 6.0, 7.0)
        )
        for options in ("{'width': 8}", "{'width': 80_000 if view.index else 8}")
    ]
    same, differ = ([stage.cost_us for stage in plan.stages] for plan in plans)
    assert same == [5.0, 6.0, 7.0] and plans[0].bottleneck_us == 7.0
    heads = [plan.stages[1].losses[0] for plan in plans]
    more_us = loss_us(heads[1], DEVICES["cpu"]) - loss_us(heads[0], DEVICES["cpu"])
    assert differ == [5.0, pytest.approx(6.0 + more_us), 7.0] and more_us > 1.0
    assert plans[1].bottleneck_us == differ[1]


def test_only_methods_without_cuts_let_gradients_cross(unet: Staged) -> None:
    assert [cut.detach for cut in unet.plan("scpl").cuts] == [True, True]
    assert [cut.detach for cut in unet.plan("bp").cuts] == [False, False]


class TiedByName(nn.Module):
    """The first name of the shared weight belongs to a module that forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(6, 6, bias=False)
        self.first = nn.Linear(6, 6, bias=False)
        self.first.weight = self.unused.weight
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_a_shared_parameter_is_counted_once_under_whatever_name() -> None:
    plan = staged(TiedByName(), "6", "relu").plan()
    assert plan.stages[0].num_parameters == 36
    assert plan.stages[0].parameters == ("first.weight",)


class SideBranch(nn.Module):
    """A stage between `second` and `third` computes nothing with a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        z = x.cumsum(1).sigmoid()
        return self.third(y * z)


def test_a_stage_that_nothing_could_train_is_refused_by_its_index() -> None:
    found = staged(SideBranch(), "6", "second", "sigmoid")
    with pytest.raises(MethodError, match=r"stage 1: no tensor that carries a gradient"):
        found.plan()


# ---------------------------------------------------------------------- local losses


def test_a_local_loss_reads_what_its_stage_computes_not_what_it_relays(unet: Staged) -> None:
    reads = [[loss.reads for loss in stage.losses] for stage in unet.plan().stages]
    assert reads == [[("relu",)], [("middle",)], [("fc",)]]


def test_the_loss_at_an_lstm_cut_reads_output_and_state_by_their_batch(lstm: Staged) -> None:
    plan = lstm.plan()
    (loss,) = plan.stages[0].losses
    assert len(loss.reads) == 3 and loss.mask == "mask"
    assert dict(zip(loss.in_shapes, loss.batch_dims, strict=True)) == {(5, 6): 0, (1, 6): 1}
    head = LocalLoss(
        num_classes=plan.num_classes, in_shapes=loss.in_shapes, batch_dims=loss.batch_dims,
        **loss.options,
    )  # fmt: skip
    assert sum(p.numel() for p in head.parameters()) == loss.num_parameters
    assert loss.flops > 0


def test_the_mask_crosses_to_the_stages_whose_losses_read_it() -> None:
    found = staged(LstmClassifier(), IDS, "embedding", "lstm1")
    plan = found.plan()
    assert [stage.losses[0].mask for stage in plan.stages] == ["mask", "mask", ""]
    assert "mask" in plan.stages[1].inputs and "mask" in plan.stages[1].outputs


@pytest.mark.parametrize(
    ("inputs", "mask"),
    [
        ("ids:int64:5<11,mask:int64:5<2", Mask(name="mask", length=5)),
        ("ids:int64:5<11,attention_mask:bool:5", Mask(name="attention_mask", length=5)),
        ("mask:int64:5<2,other_mask:int64:5<2", Mask(name="mask", length=5)),
        ("ids:int64:5<11,padding_mask:bool:5", None),  # nonzero where a token does not count
        ("ids:int64:5<11,mask:float32:5", None),  # added to the scores, perhaps
        ("ids:int64:5<11,masked_positions:int64:5<30", None),
        ("image:float32:3x8x8,mask:int64:8x8<2", None),
    ],
)
def test_the_mask_is_found_by_name_type_and_shape(inputs: str, mask: Mask | None) -> None:
    assert find_mask(specs(inputs)) == mask


def specs(text: str) -> list[InputSpec]:
    found = []
    for piece in text.split(","):
        name, dtype, rest = piece.split(":")
        shape, _, high = rest.partition("<")
        sizes = tuple(map(int, shape.split("x")))
        bound = int(high) if high else None
        found.append(InputSpec(name=name, dtype=dtype, shape=sizes, high=bound))
    return found


class Prefixed(nn.Module):
    """A class token makes the sequence one longer than the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.token = nn.Parameter(torch.zeros(1, 1, 6))
        self.mix = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids) * mask.unsqueeze(-1)
        x = torch.cat([self.token.expand(ids.shape[0], -1, -1), x], 1)
        return self.fc(self.mix(x)[:, 0])


def test_a_mask_of_another_length_is_not_applied() -> None:
    plan = staged(Prefixed(), IDS, "embedding", "mix").plan()
    assert [(s.losses[0].in_shapes, s.losses[0].mask) for s in plan.stages[:2]] == [
        (((5, 6),), "mask"),
        (((6, 6),), ""),
    ]


class Swin(nn.Module):
    """Feature maps with the channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.first(x).mean((1, 2)))


def test_channels_last_maps_are_told_to_the_head() -> None:
    plan = staged(Swin(), "8x8x3", "first").plan()
    assert plan.stages[0].losses[0].options["layout"] == "nhwc"
    assert "layout" not in staged(UNet(), "1x8x8", "relu").plan().stages[0].losses[0].options


class NoBatch(nn.Module):
    """Windows and samples are one dimension where the stages could be parted."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.first(x.view(-1, 3)).view(-1, 6))


def test_a_candidate_without_a_batch_dimension_has_no_local_loss() -> None:
    found = staged(NoBatch(), "6")
    view = candidate_view(("first",), found.capture, NUM_CLASSES)
    with pytest.raises(MethodError, match=r"'first' \(8, 3\).*no batch dimension.*--split-at"):
        make_method("scpl").losses(view)


# ---------------------------------------------------------------------- the classifier's feature


class Head(nn.Module):
    """An encoder and, behind it, whatever `head` does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x)


class LogSoftmax(Head):
    def head(self, x: Tensor) -> Tensor:
        return self.fc(x).log_softmax(1)


class LearnedScale(Head):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


class BufferScale(Head):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(4))

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


class TwoReaders(Head):
    def head(self, x: Tensor) -> Tensor:
        return self.fc(x) + x.mean(1, keepdim=True)


class TwoPaths(Head):
    """The other path to the output has parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(8, 4)

    def head(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(x)) + self.fc(torch.sigmoid(x))


class TwoInputs(Head):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Bilinear(8, 8, 4)

    def head(self, x: Tensor) -> Tensor:
        return self.both(torch.tanh(x), torch.sigmoid(x))


@pytest.mark.parametrize(
    ("model", "feature"),
    [
        (Head, "relu_1"),
        (LogSoftmax, "relu_1"),
        (LearnedScale, "relu_1"),
        (BufferScale, "relu_1"),
        (TwoReaders, ""),
        (TwoPaths, ""),
        (TwoInputs, ""),
    ],
)
def test_the_feature_is_what_the_classifier_alone_reads(model: type[Head], feature: str) -> None:
    found = staged(model(), "6", "relu")
    plan = found.plan(options={"last": "released"})
    stops = [loss.options.get("stop_at", "") for loss in plan.stages[1].losses]
    assert stops == (["", feature] if feature else [""])
    view = last_view(found.capture, NUM_CLASSES)
    assert (view.feature.name if view.feature else "") == feature


def test_there_is_no_feature_where_the_classifier_is_all_of_the_last_stage() -> None:
    plan = staged(Head(), "6", "relu_1").plan(options={"last": "released"})
    assert [(loss.kind, loss.options) for loss in plan.stages[1].losses] == [("cross_entropy", {})]


# ---------------------------------------------------------------------- paths


def test_paths_are_the_modules_and_attributes_of_a_stage() -> None:
    found = staged(ClassToken(), "1x8x8", "blocks.0")
    nodes = list(found.capture.graph.nodes)
    first = [n for n in nodes if found.stage_of.get(n.name) == 0]
    assert stage_paths(first) == ("patches", "token", "blocks.0")


class ReadsInside(nn.Module):
    """The weight of a module is read beside a call of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.first.weight)
        return self.second(self.first(y))


def test_what_lies_in_a_module_of_the_stage_is_no_path_of_its_own() -> None:
    found = staged(ReadsInside(), "6")
    assert stage_paths(found.capture.compute_nodes) == ("first", "second")
    assert found.plan().stages[0].parameters == ("first.weight", "second.weight", "second.bias")


def test_a_model_that_is_one_module_is_one_path() -> None:
    found = staged(nn.Linear(6, 4), "input:6")
    plan = found.plan()
    assert stage_paths(found.capture.compute_nodes) == ("",)
    assert plan.stages[0].nodes == ("model",)
    assert plan.stages[0].parameters == ("weight", "bias")
