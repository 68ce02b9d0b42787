"""The frontends are tried in order, until one allows a balanced cut."""

import random
from typing import Any

import pytest
import torch
from torch import nn

import hard_models as hard
from scpl_compile.capture import FRONTENDS
from scpl_compile.cost import DEVICES
from scpl_compile.cutting import Captures, CutRequest, Cutting, cut_model
from scpl_compile.errors import CaptureError, PartitionError, TraceError
from scpl_compile.ir import InputSpec
from scpl_compile.methods import make_method


def cut(
    model: nn.Module, num_stages: int = 2, captures: Captures | None = None, **options: Any
) -> Cutting:
    request = CutRequest(
        inputs=(InputSpec(name="x", dtype="float32", shape=(6,)),), batch_size=8, output=None,
        num_classes=None, method=make_method("scpl"), device=DEVICES["cpu"], num_stages=num_stages,
        **options,
    )  # fmt: skip
    return cut_model(model, request, captures)


class Rows(nn.Module):
    """A module that fx keeps whole and record opens: it walks over a size."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
            for i in range(x.shape[1]):
                x = x + x[:, i : i + 1]
        return x


class Net(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.first, self.part, self.last = nn.Linear(6, 6), part, nn.Linear(6, 4)

    def forward(self, x):
        return self.last(self.part(torch.relu(self.first(x))))


def test_the_order() -> None:
    assert list(FRONTENDS) == ["fx", "record", "record-second-call"]


def test_an_unknown_frontend_is_an_error() -> None:
    with pytest.raises(CaptureError, match="no frontend 'export'; it is one of fx, record"):
        cut(hard.as_submodule(hard.Twice), frontend="export")


def test_the_first_that_allows_a_balanced_cut_is_taken() -> None:
    found = cut(hard.as_submodule(hard.Twice))
    assert found.capture.frontend == "fx"
    assert found.num_classes == 4


def test_a_large_module_that_fx_keeps_whole_is_opened_by_record() -> None:
    model = Net(Rows(4))
    whole = cut(model, frontend="fx")
    assert dict(whole.capture.opaque).keys() == {"part"}
    found = cut(model)
    assert found.capture.frontend == "record"
    assert found.capture.opaque == ()
    assert found.partition.bottleneck_us < whole.partition.bottleneck_us


class Sized(nn.Module):
    """Gives a size besides its tensor; fx keeps it whole, as it looks at the size."""

    def forward(self, x):
        return x, x.shape[1] if x.shape[1] > 1 else 1


def test_a_small_module_whose_size_stands_in_the_way_of_cuts_is_opened() -> None:
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sized = Sized()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(20))

        def forward(self, x):
            x, size = self.sized(x)
            for layer in self.layers:
                x = torch.relu(layer(x))
            return x.view(-1, size)

    with pytest.raises(PartitionError, match=r"is not a tensor.*'part.sized' was kept whole"):
        cut(Net(Uses()), num_stages=4, frontend="fx")
    whole = cut(Net(Uses()), frontend="fx")
    found = cut(Net(Uses()))
    assert found.capture.frontend == "record"
    assert found.partition.bottleneck_us < 0.8 * whole.partition.bottleneck_us


def test_of_two_that_keep_it_whole_the_better_is_taken() -> None:
    found = cut(Net(hard.Autocast()))
    both = [cut(Net(hard.Autocast()), frontend=name) for name in ("fx", "record")]
    assert found.partition.bottleneck_us == min(c.partition.bottleneck_us for c in both)


def test_where_fx_fails_record_is_taken() -> None:
    model = hard.as_root(hard.SliceAssignment)
    with pytest.raises(TraceError, match="item assignment"):
        cut(model, frontend="fx")
    assert cut(model).capture.frontend == "record"


def test_where_all_fail_the_last_failure_is_told() -> None:
    with pytest.raises(TraceError, match=r"AutocastNet itself cannot be traced \(autocast\)"):
        cut(hard.as_root(hard.Autocast))
    with pytest.raises(PartitionError, match="asked for 9 stages"):
        cut(hard.as_submodule(hard.Twice), num_stages=9)


def test_a_wrong_input_is_told_by_the_first() -> None:
    class Other(Net):
        def forward(self, y):
            return super().forward(y)

    with pytest.raises(CaptureError, match="--input x is not a parameter of Other.forward"):
        cut(Other(nn.ReLU()))


def test_a_named_cut_takes_the_first_frontend_that_has_the_module() -> None:
    assert cut(Net(nn.Linear(6, 6)), split_at=("part",)).capture.frontend == "fx"
    found = cut(Net(Rows(2)), split_at=("part.layers.0",))
    assert found.capture.frontend == "record"


def test_other_outputs_are_dropped_by_name() -> None:
    class Two(Net):
        def forward(self, x):
            x = torch.relu(self.first(x))
            return {"early": x.mean(1), "logits": self.last(self.part(x))}

    found = cut(Two(nn.Linear(6, 6)))
    assert found.dropped == ("early",)
    assert found.output == ("logits",)


class Drops(nn.Module):
    """Leaves itself out half of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.linear(x) if random.random() < 0.5 or not self.training else x


def test_a_module_that_drops_itself_at_random_makes_no_other_plan() -> None:
    found = []
    for seed in range(6):
        random.seed(seed)
        found.append(cut(Net(Drops()), split_at=("first", "part")).partition)
    assert all(partition == found[0] for partition in found)


# ---------------------------------------------------------------------- cut again and again


def test_a_model_that_is_cut_again_is_traced_once() -> None:
    model, captures = Net(Rows(4)), Captures()
    first, second = (cut(model, k, captures, frontend="record") for k in (2, 3))
    assert second.capture is first.capture
    assert cut(model, 2, captures, frontend="fx").capture is not first.capture


def test_what_no_frontend_can_take_fails_again_in_the_same_words() -> None:
    model, captures = hard.as_root(hard.Autocast), Captures()
    told = set()
    for num_stages in (2, 3):
        with pytest.raises(TraceError) as caught:
            cut(model, num_stages, captures)
        told.add(str(caught.value))
    assert len(told) == 1


def test_captures_are_of_one_model() -> None:
    captures = Captures()
    cut(Net(nn.Linear(6, 6)), 2, captures)
    with pytest.raises(ValueError, match="captures are of one model"):
        cut(Net(nn.Linear(6, 6)), 2, captures)
