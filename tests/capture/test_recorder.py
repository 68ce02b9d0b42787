"""The record frontend: a model runs once on fake tensors, and its calls are written down.

test_tracer.py holds the constructs that every frontend must keep whole; test_hard_models.py the
models that both must compile.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import test_tracer as fx
from capture_nets import Nested, floats, ids, node_of, run, same_result, targets
from scpl_compile.capture import Capture, Switch, capture
from scpl_compile.errors import CaptureError


def record(model: nn.Module, *specs: Any) -> Capture:
    return capture(model, specs or (floats(4),), frontend="record")


def text(captured: Capture) -> list[str]:
    """The nodes that compute something, as Python would write them."""
    lines = []
    for node in captured.compute_nodes:
        target = node.target if isinstance(node.target, str) else node.target.__name__
        given = [*map(repr, node.args), *(f"{k}={v!r}" for k, v in node.kwargs.items())]
        lines.append(f"{node.name} = {target}({', '.join(given)})")
    return lines


RECORDED = {fx.SliceAssignment, fx.NoGrad, fx.NoGradHelper, fx.EnableGrad, fx.SetGradEnabled}
"""What fx keeps whole and this frontend opens."""

REASONS = {
    **fx.ODD,
    fx.AssignsData: "assigns the attribute 'data' of a tensor",
    fx.AssignsDataInPlace: "assigns the attribute 'data' of a tensor",
    fx.TorchRandom: "neither parameter nor buffer",
    fx.WritesBufferUnseen: "writes 'odd.count' in place",
    fx.DataDependent: "looks at the values of a tensor",
}


@pytest.mark.parametrize("kind", REASONS, ids=lambda kind: kind.__name__)
def test_a_module_that_would_be_changed_stays_whole(kind: type[fx.Odd]) -> None:
    model = fx.Net(kind())
    before = fx.snapshot(model)
    captured = record(model)
    assert fx.snapshot(model) == before
    if kind in RECORDED:
        assert captured.opaque == ()
    else:
        ((path, reason),) = captured.opaque
        assert (path, targets(captured)) == ("odd", ["before.linear", "odd", "after.linear"])
        assert REASONS[kind] in reason
    same_result(model, [captured], torch.randn(3, 4))


@pytest.mark.parametrize(
    "kind",
    [fx.TrainingBranch, fx.EvalBranch, fx.TrainingWiring, fx.EvalOnlyFails],
)
def test_code_that_reads_training_stays_whole(kind: type[fx.Odd]) -> None:
    model = fx.Net(fx.Net(kind()))
    captured = record(model)
    assert [path for path, _ in captured.opaque] == ["odd.odd"]
    same_result(model, [captured], torch.randn(3, 4))


def test_constants_of_the_model_itself_may_depend_on_training() -> None:
    class Switches(fx.Odd):
        def forward(self, x):
            y = F.dropout(self.linear(x), 0.5, training=self.training)
            return y * (2.0 if self.training else 0.5)

    model = Switches()
    captured = record(model)
    dropout = node_of(captured, F.dropout)
    assert dropout.kwargs["training"] == Switch(training=True, evaluation=False)
    same_result(model, [captured], torch.randn(3, 4))


def test_the_graph_says_what_the_user_wrote() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = 1 - self.linear(x)
            z = torch.softmax(y.view(x.size(0) * 2, -1), dim=-1)
            return torch.cat([z, z + 1], dim=1)[:, 0]

    assert text(record(Writes())) == [
        "batch_size = size(x, 0)",
        "linear = linear(x)",
        "sub = sub(1, linear)",
        "mul = mul(batch_size, 2)",
        "view = view(sub, mul, -1)",
        "softmax = softmax(view, dim=-1)",
        "add = add(softmax, 1)",
        "cat = cat([softmax, add], dim=1)",
        "getitem = getitem(cat, (slice(None, None, None), 0))",
    ]


def test_scopes_and_calls() -> None:
    captured = record(fx.Net(fx.Net(fx.Plain())))
    assert node_of(captured, "odd.odd.linear").meta["scope"] == ("odd", "odd.odd")
    assert node_of(captured, "x").meta["scope"] == ()
    assert set(captured.calls) == {
        "before", "odd", "odd.before", "odd.odd", "odd.after", "after",
    }  # fmt: skip
    call = captured.calls["odd.odd"]
    assert call.path == "odd.odd"
    assert [n.name for n in call.args] == [captured.calls["odd.before"].result.name]
    assert captured.calls["odd.after"].args == (call.result,)


def test_a_module_called_twice_has_two_scopes() -> None:
    class Twice(fx.Net):
        def forward(self, x):
            return self.after(self.before(self.before(x)))

    captured = record(Twice(fx.Plain()))
    scopes = [n.meta["scope"] for n in captured.compute_nodes if n.op == "call_module"]
    assert scopes == [("before",), ("before@1",), ("after",)]


def test_both_frontends_give_the_same_modules() -> None:
    model = Nested()
    spec = floats(3, 8, 8)
    captured = record(model, spec)
    assert targets(captured) == targets(capture(model, (spec,)))
    assert set(captured.calls) == set(capture(model, (spec,)).calls)
    same_result(model, [captured], torch.randn(3, 3, 8, 8))


class Uses(fx.Odd):
    """Runs one function of (itself, x)."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.dropout = nn.Dropout(0.5)
        self.bias = nn.Parameter(torch.randn(4))
        self._function = function

    def forward(self, x):
        return self._function(self, x)


def keywords(module: nn.Module, x: Tensor) -> Tensor:
    def inner(**kwargs: Any) -> Tensor:
        return F.linear(**kwargs)

    return inner(input=x, weight=module.linear.weight, bias=module.bias)


def written_views(module: nn.Module, x: Tensor) -> Tensor:
    y = module.linear(x)
    part = y[:, :2]
    part += 1
    part *= 2
    part **= 2
    y[:, 3] = x[:, 0]
    y[0] = 1
    y[..., -1] += 2
    return y


def aliases(module: nn.Module, x: Tensor) -> Tensor:
    y = module.linear(x)
    z = module.dropout(y)
    y += 1
    return y * z


def skip(module: nn.Module, x: Tensor) -> Tensor:
    skip = y = module.linear(x)
    y.add_(1).mul_(2)
    return y * skip + torch.relu_(y)


def swapped(module: nn.Module, x: Tensor) -> Tensor:
    y = module.linear(x)
    return (1 - y) + 2 / (y + 10) + 2**y + 7 // (y.abs() + 1) + 7 % (y.abs() + 1) + (1 < y)


def many(module: nn.Module, x: Tensor) -> Tensor:
    values, indices = module.linear(x).topk(4)
    first, second = values.chunk(2, dim=1)
    best = x.max(dim=1, keepdim=True)
    return torch.cat([second, first], 1) + indices + best.values - best.indices


OPENED = {
    "keywords": keywords,
    "written views": written_views,
    "aliases": aliases,
    "skip": skip,
    "swapped": swapped,
    "many results": many,
    "made in forward": lambda m, x: nn.ReLU()(nn.LayerNorm(4, elementwise_affine=False)(x)),
    "parameters": lambda m, x: x @ m.linear.weight.T + m.bias + m.linear.weight.mT[0] + m.count,
    "loop over a size": lambda m, x: sum((x[:, i : i + 1] * i for i in range(x.shape[1])), x),
    "unpacked shape": lambda m, x: m.linear(x).view(*x.shape).view(x.shape[:1] + (2, 2)).flatten(1),
    "assert": lambda m, x: m.linear(x) if x.shape[0] > 0 and x.ndim == 2 else 1 / 0,
    "floor division": lambda m, x: torch.cat([x, m.linear(x)])[(x.shape[0] * 2) // 2 :],
    "root of the batch": lambda m, x: m.linear(x) * x.shape[0] ** -0.5,
    "mean over the batch": lambda m, x: m.linear(x) / x.shape[0] + x.size(0) / 4,
    "elements": lambda m, x: m.linear(x).sum() / x.numel() + x,
    "padding": lambda m, x: F.pad(m.linear(x), (1, 1))[:, 1:-1].view(x.shape[0], -1),
    "padding of the batch": lambda m, x: F.pad(m.linear(x), (0, 0, 1, 0))[:-1],
    "constants": lambda m, x: x * torch.tensor([1.0, 2, 3, 4]) + torch.arange(4) + torch.rand(4),
    "batch of ones": lambda m, x: x * torch.ones(x.shape[0], 1, dtype=x.dtype) + x.new_zeros(4),
    "spectrum": lambda m, x: torch.fft.irfft(torch.fft.rfft(m.linear(x), dim=1), n=4),
}


@pytest.mark.parametrize("name", OPENED)
def test_what_it_records_gives_what_the_model_gives(name: str) -> None:
    """At other batch sizes than the one that it saw, too."""
    model = fx.Net(Uses(OPENED[name]))
    captured = record(model)
    assert captured.opaque == ()
    for batch in (2, 5, 8):
        same_result(model, [captured], torch.randn(batch, 4))


KEPT = {
    "more than 4": (lambda m, x: m.linear(x) if x.shape[0] > 4 else x, "(batch > 4)"),
    "loop": (lambda m, x: torch.stack([m.linear(row) for row in x]), "(batch)"),
    "range": (lambda m, x: sum((m.linear(x)[:1] for _ in range(len(x))), x), "(batch)"),
    "unbind": (lambda m, x: torch.stack(x.unbind(0)), "(batch)"),
    "math": (lambda m, x: m.linear(x) / math.sqrt(x.shape[0]), "(batch)"),
    "split": (lambda m, x: torch.cat(m.linear(x).split(2)), "batch"),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_module_that_depends_on_the_batch_size_stays_whole(name: str) -> None:
    """And what comes after it is still open to any batch size."""
    function, question = KEPT[name]
    model = fx.Net(Uses(function))
    captured = record(model)
    ((path, reason),) = captured.opaque
    assert path == "odd" and reason.startswith("depends on the batch size")
    assert question in reason
    for batch in (2, 5, 8):
        same_result(model, [captured], torch.randn(batch, 4))


def test_a_whole_modules_result_is_of_any_batch_size() -> None:
    """It runs on data at two batch sizes where fake tensors would fix its sizes."""

    class Then(fx.Net):
        def forward(self, x):
            y = self.odd(x)
            return self.after(y.view(y.shape[0] * 2, -1).view(y.shape[0], -1))

    model = Then(Uses(lambda m, x: torch.stack([m.linear(row) for row in x])))
    captured = record(model)
    assert [path for path, _ in captured.opaque] == ["odd"]
    same_result(model, [captured], torch.randn(5, 4))


def test_the_device_is_the_inputs() -> None:
    model = fx.Net(Uses(lambda m, x: m.linear(x) + torch.zeros(4, device=m.bias.device)))
    captured = record(model)
    zeros = node_of(captured, torch.zeros)
    device = zeros.kwargs["device"]
    assert (device.target, device.args[1]) == (getattr, "device")
    assert device.args[0].op == "placeholder"


@dataclass
class Result:
    value: Tensor
    extra: Tensor | None


class GivesResult(fx.Odd):
    def forward(self, x):
        return Result(self.linear(x), x + 1)


@pytest.mark.parametrize("form", ["dataclass", "dict", "tuple", "list"])
def test_what_modules_and_models_give(form: str) -> None:
    class Gives(fx.Odd):
        def __init__(self) -> None:
            super().__init__()
            self.inner = GivesResult()

        def forward(self, x):
            given = self.inner(x)
            value, extra = given.value, given.extra
            made = {
                "dict": {"a": value, "b": extra}, "tuple": (value, extra), "list": [value, extra],
                "dataclass": Result(value, extra),
            }  # fmt: skip
            return made[form]

    captured = record(Gives())
    assert len(captured.outputs) == 2
    assert captured.calls["inner"].result["value"].target == "inner.linear"


def test_several_inputs_and_one_that_is_not_fed() -> None:
    captured = record(fx.Plain(), floats(4), floats(4, name="bias"))
    assert [n.name for n in captured.graph.find_nodes(op="placeholder")] == ["x", "bias"]
    assert len(record(fx.Plain()).graph.find_nodes(op="placeholder")) == 1


def test_a_single_module_and_ids() -> None:
    assert targets(record(nn.Linear(4, 3), floats(4, name="input"))) == [""]
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    captured = record(model, ids(5, 9, name="input"))
    same_result(model, [captured], torch.randint(0, 9, (3, 5)))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (fx.Counter, "changes its attribute 'calls'"),
        (fx.PythonRandom, "random numbers"),
        (fx.DataDependent, r"\(looks at the values of a tensor at test_tracer.py:\d+\): move"),
        (fx.TrainingBranch, r"depends on self.training \(at .+\): move"),
    ],
)
def test_the_model_itself_must_be_traceable(kind: type[fx.Odd], message: str) -> None:
    model = kind()
    before = fx.snapshot(model)
    with pytest.raises(CaptureError, match=message):
        record(model)
    assert fx.snapshot(model) == before


def test_a_module_that_is_no_submodule_is_refused() -> None:
    hidden = nn.Linear(4, 4)
    captured = record(fx.Net(Uses(lambda m, x: hidden(x))))
    assert captured.opaque == (("odd", "calls a Linear that is no submodule of the model"),)


def test_modules_are_called_as_before_afterwards() -> None:
    call = nn.Module.__call__
    record(fx.Net(fx.Plain()))
    with pytest.raises(CaptureError):
        record(fx.DataDependent())
    assert nn.Module.__call__ is call


class LogsItself(nn.Module):
    """The model's own forward logs, and cannot be kept whole for it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        logging.getLogger("a model").error("called")
        return self.linear(x)


@pytest.mark.parametrize("frontend", ["fx", "record"])
def test_a_log_record_of_the_model_itself_is_no_reason_to_refuse_it(frontend: str) -> None:
    found = capture(LogsItself(), (floats(4),), frontend=frontend)
    assert found.opaque == ()


class ChecksSelection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[x[:, 0] > 0]
        if rows.shape[0] < 2:
            raise ValueError("too few")
        return self.linear(x) + rows.sum(0)


def test_a_check_of_a_size_from_data_is_kept() -> None:
    model = ChecksSelection()
    captured = record(model)
    assert node_of(captured, torch._assert).args[1].endswith("makes sure of does not hold")
    same_result(model, [captured], torch.rand(3, 4) + 0.1)
    with pytest.raises(AssertionError, match="test_recorder.py"):
        run(captured, -torch.rand(3, 4))


def test_a_squeeze_by_name_is_recorded() -> None:
    class Squeezes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.squeeze(input=self.linear(x).unsqueeze(1))

    model = Squeezes()
    same_result(model, [record(model)], torch.randn(3, 4))
