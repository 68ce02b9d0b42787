"""Which values cross which cut, once every node has its stage."""

import torch
from planning import BATCH, staged
from torch import Tensor, nn

from golden_models import LateInput, LstmClassifier, UNet
from scpl_compile.ir import TensorMeta
from scpl_compile.methods.flow import Flow, find_flow, meta_of, value_name


def flow_of(model: nn.Module, inputs: str, *cuts: str, **extra_reads: set[int]) -> Flow:
    found = staged(model, inputs, *cuts)
    return find_flow(found.capture, found.stage_of, extra_reads)


def table(flow: Flow) -> list[list[tuple[str, int, tuple[int, ...], str]]]:
    """(name, producer, consumers, alias) of what crosses, per cut."""
    return [[(c.name, c.producer, c.consumers, c.alias) for c in cut] for cut in flow.crossings]


def test_a_value_that_skips_a_stage_is_relayed_by_it() -> None:
    flow = flow_of(UNet(), "1x8x8", "relu", "middle")
    assert table(flow) == [
        [("relu", 0, (1, 2), "")],
        [("relu", 0, (2,), ""), ("middle", 1, (2,), "")],
    ]
    assert flow.output == "fc"
    assert flow.num_stages == 3
    assert [flow.inputs(k, ("x",)) for k in range(3)] == [("x",), ("relu",), ("relu", "middle")]
    assert [flow.sent(k) for k in range(3)] == [("relu",), ("relu", "middle"), ()]


def test_the_state_of_an_lstm_crosses_as_tensors_with_their_batch_dimensions() -> None:
    flow = flow_of(LstmClassifier(), "ids:int64:5<11,mask:int64:5<2", "lstm1")
    (crossings,) = flow.crossings
    names = [c.name for c in crossings]
    assert names[0] == "mask" and len(names) == 4
    shapes = {c.meta.shape: c.meta.batch_dim for c in crossings[1:]}
    assert shapes == {(BATCH, 5, 6): 0, (1, BATCH, 6): 1}
    assert all(c.meta.requires_grad for c in crossings[1:])


def test_an_input_that_is_read_later_crosses_from_the_start_and_is_cloned() -> None:
    flow = flow_of(LateInput(), "x:6,context:6", "tanh", "mul")
    assert table(flow)[0] == [
        ("context", -1, (1,), "input"),
        ("first", 0, (1,), ""),
        ("tanh", 0, (2,), ""),
    ]
    assert table(flow)[1] == [("tanh", 0, (2,), ""), ("mul", 1, (2,), "")]


def test_a_value_that_only_a_loss_reads_crosses_too() -> None:
    flow = flow_of(UNet(), "1x8x8", "relu", "middle", x={1})
    assert table(flow)[0] == [("x", -1, (1,), "input"), ("relu", 0, (1, 2), "")]
    assert [name for name, *_ in table(flow)[1]] == ["relu", "middle"]


class Sizes(nn.Module):
    """Sizes and dtypes are asked in stage 0 and used in stage 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        batch, width = x.shape
        x = torch.relu(x)
        return self.second(x.view(batch, 2, width // 2).mean(1))


def test_sizes_do_not_cross() -> None:
    flow = flow_of(Sizes(), "6", "relu")
    assert table(flow) == [[("relu", 0, (1,), "")]]


class Aliases(nn.Module):
    """What crosses is memory of a parameter, of a buffer, and a view of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("offset", torch.zeros(6))
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.detach()
        offset = self.offset.view(1, 6)
        head = x[:, :3]
        y = self.norm(self.first(x) * self.scale)
        return self.second(y * scale + offset) + head.sum(1, keepdim=True)


def test_aliases_are_named() -> None:
    flow = flow_of(Aliases(), "6", "norm")
    found = {c.name: c.alias for c in flow.crossings[0]}
    assert found == {"detach": "parameter", "view": "buffer", "getitem": "input", "norm": ""}


def test_one_stage_has_no_crossings() -> None:
    flow = flow_of(UNet(), "1x8x8")
    assert flow.crossings == ()
    assert flow.inputs(0, ("x",)) == ("x",)
    assert flow.sent(0) == ()


class Builtin(nn.Module):
    """Its inputs have names that torch.fx does not give to nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 4)

    def forward(self, input: Tensor, input_1: Tensor) -> Tensor:
        return self.second(self.first(input) * input_1)


def test_inputs_keep_the_names_of_forward() -> None:
    found = staged(Builtin(), "input:6,input_1:6", "first")
    placeholders = found.capture.graph.find_nodes(op="placeholder")
    assert [value_name(node) for node in placeholders] == ["input", "input_1"]
    flow = find_flow(found.capture, found.stage_of, {})
    assert table(flow) == [[("input_1", -1, (1,), "input"), ("first", 0, (1,), "")]]


def test_meta_of_a_node_that_gives_no_tensor_is_none() -> None:
    found = staged(LstmClassifier(), "ids:int64:5<11,mask:int64:5<2")
    assert meta_of(found.node("lstm1")) is None
    assert meta_of(found.node("embedding")) == TensorMeta(
        shape=(BATCH, 5, 6), dtype="float32", requires_grad=True, batch_dim=0
    )
