"""What tracing would lose without an error stays inside one call of the user's module."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, rnn
from torch.utils.checkpoint import checkpoint

from capture_nets import floats, node_of, same_result, targets
from scpl_compile.capture import Switch, capture
from scpl_compile.errors import CaptureError


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


straight_through = StraightThrough.apply


class Odd(nn.Module):
    """A submodule with one construct that a plain trace would lose."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0
        self.seen: list[Tensor] = []
        self.register_buffer("count", torch.zeros(()))
        self.buffers_too = [self.count]


class CustomFunction(Odd):
    def forward(self, x):
        return straight_through(self.linear(x))


class CustomFunctionByName(Odd):
    def forward(self, x):
        return StraightThrough.apply(self.linear(x))


class Autocast(Odd):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return y.float()


class AutocastDecorator(Odd):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        return self.linear(x)


class NoGrad(Odd):
    def forward(self, x):
        with torch.no_grad():
            return self.linear(x)


class NoGradHelper(Odd):
    @torch.no_grad()
    def _scale(self, x):
        return x.abs().amax()

    def forward(self, x):
        return self.linear(x) / self._scale(x)


class EnableGrad(Odd):
    def forward(self, x):
        with torch.enable_grad():
            return self.linear(x)


class SetGradEnabled(Odd):
    def forward(self, x):
        with torch.set_grad_enabled(False):
            return self.linear(x)


class InferenceMode(Odd):
    def forward(self, x):
        with torch.inference_mode():
            y = self.linear(x)
        return y.clone()


class Checkpointed(Odd):
    def forward(self, x):
        return checkpoint(self.linear, x, use_reentrant=False)


class PythonRandom(Odd):
    def forward(self, x):
        return self.linear(x) if random.random() < 2 else x


class NumpyRandom(Odd):
    def forward(self, x):
        return self.linear(x) * float(np.random.rand() < 2)


class TorchRandom(Odd):
    def forward(self, x):
        return self.linear(x) * float(torch.Tensor([0.0]).uniform_())


class Counter(Odd):
    def forward(self, x):
        self.calls += 1
        return self.linear(x)


class KeepsValue(Odd):
    def forward(self, x):
        y = self.linear(x)
        self.seen.append(y)
        return y


class ChildsAttribute(Odd):
    def forward(self, x):
        self.linear.note = "called"
        return self.linear(x)


class WritesBuffer(Odd):
    def forward(self, x):
        self.count.add_(1)
        return self.linear(x)


class WritesBufferUnseen(Odd):
    def forward(self, x):
        self.buffers_too[0].add_(1)
        return self.linear(x)


class ReassignsBuffer(Odd):
    def forward(self, x):
        self.count = self.count + 1
        return self.linear(x)


class ReplacesBuffer(Odd):
    def forward(self, x):
        self._buffers["count"] = torch.ones_like(self.buffers_too[0])
        return self.linear(x)


class Constant(Odd):
    def forward(self, x):
        return self.linear(x) + torch.from_numpy(np.ones(4, dtype=np.float32))


class DataDependent(Odd):
    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


class SliceAssignment(Odd):
    def forward(self, x):
        y = self.linear(x)
        y[:, 0] = 0.0
        return y


class AssignsData(Odd):
    def forward(self, x):
        y = self.linear(x)
        y.data = y.data + 1
        return y


class AssignsDataInPlace(Odd):
    def forward(self, x):
        y = self.linear(x)
        y.data += 1
        return y


ODD = {
    AssignsData: "'data' is assigned",
    AssignsDataInPlace: "'data' is assigned",
    CustomFunction: "custom autograd.Function",
    CustomFunctionByName: "custom autograd.Function",
    Autocast: "autocast",
    AutocastDecorator: "autocast",
    NoGrad: "no_grad",
    NoGradHelper: "no_grad",
    EnableGrad: "enable_grad",
    SetGradEnabled: "set_grad_enabled",
    InferenceMode: "inference_mode",
    Checkpointed: "checkpoint",
    PythonRandom: "random numbers",
    NumpyRandom: "random numbers",
    TorchRandom: "random numbers",
    Counter: "'calls'",
    KeepsValue: "'seen'",
    ChildsAttribute: "'note'",
    WritesBuffer: "'odd.count' in place",
    WritesBufferUnseen: "'count'",
    ReassignsBuffer: "'count'",
    ReplacesBuffer: "'count'",
    Constant: "neither parameter nor buffer",
    DataDependent: "control flow",
    SliceAssignment: "item assignment",
}


class Plain(nn.Module):
    """Nothing odd: it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, scale=2.0, bias=None):
        y = self.linear(x) * scale
        return y if bias is None else y + bias


class Net(nn.Module):
    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.before = Plain()
        self.odd = odd
        self.after = Plain()

    def forward(self, x):
        return self.after(self.odd(self.before(x)))


def snapshot(model: nn.Module) -> list[object]:
    """Everything that capture must leave as it was."""
    state: list[object] = [random.getstate(), np.random.get_state()[1].tobytes()]
    state.append(torch.get_rng_state().tolist())
    for name, module in model.named_modules():
        own = {
            key: list(value) if isinstance(value, (list, dict)) else id(value)
            for key, value in module.__dict__.items()
        }
        state += [name, own, module.training]
    for name, tensor in model.state_dict(keep_vars=True).items():
        state += [name, id(tensor), tensor.tolist(), tensor.requires_grad, tensor.grad]
    return state


@pytest.fixture
def any_seed() -> Iterator[None]:
    """Random states that differ from call to call, put back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.mark.usefixtures("any_seed")
@pytest.mark.parametrize("kind", ODD, ids=lambda kind: kind.__name__)
def test_a_module_that_would_be_changed_stays_whole(kind: type[Odd]) -> None:
    model = Net(kind())
    captured = capture(model, (floats(4),))
    assert targets(captured) == ["before.linear", "odd", "after.linear"]
    ((path, reason),) = captured.opaque
    assert path == "odd"
    assert ODD[kind] in reason


@pytest.mark.usefixtures("any_seed")
@pytest.mark.parametrize("kind", [*ODD, Plain], ids=lambda kind: kind.__name__)
def test_the_model_and_the_random_states_are_left_as_they_were(kind: type[nn.Module]) -> None:
    model = Net(kind())
    model.after.train(False)
    model.odd.train(False)
    model.odd.linear.train(True)
    before = snapshot(model)
    capture(model, (floats(4),))
    assert snapshot(model) == before


def test_only_the_innermost_module_is_kept_whole() -> None:
    captured = capture(Net(Net(NoGrad())), (floats(4),))
    assert [path for path, _ in captured.opaque] == ["odd.odd"]
    assert targets(captured)[1:4] == ["odd.before.linear", "odd.odd", "odd.after.linear"]


def test_a_context_around_a_call_closes_the_module_that_entered_it() -> None:
    class Around(Net):
        def forward(self, x):
            with torch.no_grad():
                return self.after(self.before(x))

    captured = capture(Net(Around(Plain())), (floats(4),))
    assert captured.opaque == (("odd", "no_grad"),)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_keep_an_opened_module_whole_but_not_a_leaf(kind: str) -> None:
    model = Net(Plain())
    hook = {"forward": lambda m, x, y: None, "forward_pre": lambda m, x: None}
    for module in (model.odd, model.before.linear):
        getattr(module, f"register_{kind}_hook")(hook.get(kind, lambda m, g, h: None))
    captured = capture(model, (floats(4),))
    assert captured.opaque == (("odd", "hooks"),)
    assert targets(captured) == ["before.linear", "odd", "after.linear"]


def test_parametrizations_keep_a_module_whole() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.weight

    model = Net(Scaled())
    parametrize.register_parametrization(model.odd, "weight", nn.Softplus())
    parametrize.register_parametrization(model.before.linear, "weight", nn.Identity())
    captured = capture(model, (floats(4),))
    assert captured.opaque == (("odd", "parametrization"),)
    assert targets(captured) == ["before.linear", "odd", "after.linear"]


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_stays_whole() -> None:
    captured = capture(Net(torch.jit.script(nn.Sequential(nn.Linear(4, 4)))), (floats(4),))
    assert captured.opaque == (("odd", "TorchScript"),)


def test_a_value_that_leaked_out_of_a_module_closes_its_parent() -> None:
    class Leaks(nn.Module):
        def forward(self, x, out):
            out.append(x + 1)
            if x.sum() > 0:
                return x
            return -x

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaks = Leaks()

        def forward(self, x):
            out: list[Tensor] = []
            return self.leaks(x, out) + out[0]

    assert [path for path, _ in capture(Net(Parent()), (floats(4),)).opaque] == ["odd"]


@torch.fx.wrap
def wrapped(x, threshold):
    return x if x.sum() > threshold else -x


def test_wrapped_functions_are_calls() -> None:
    class Uses(nn.Module):
        def forward(self, x):
            return wrapped(x, 0.0)

    model = Net(Uses())
    captured = capture(model, (floats(4),))
    assert captured.opaque == ()
    assert node_of(captured, wrapped).op == "call_function"
    same_result(model, [captured], torch.randn(3, 4))


def test_factories_are_nodes_that_run_each_time() -> None:
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.arange(4) + torch.zeros(x.shape[0], 1) + torch.rand(4)

    model = Net(Noisy())
    captured = capture(model, (floats(4),))
    assert captured.opaque == ()
    assert node_of(captured, torch.rand).meta["random"]
    assert not node_of(captured, torch.arange).meta["random"]
    same_result(model, [captured], torch.randn(3, 4))


def test_the_shape_of_an_input_is_known_but_for_the_batch() -> None:
    class Asserts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)
            self.position = nn.Parameter(torch.randn(8, 4))

        def forward(self, ids):
            batch, length = ids.shape
            assert length <= self.position.shape[0] and ids.dim() == ids.ndim == 2
            steps = [self.table(ids[:, t]) for t in range(ids.size(-1))]
            return torch.stack(steps, 1).view(batch, -1, 4) + self.position[:length]

    from capture_nets import ids as id_spec

    model = Asserts()
    captured = capture(model, (id_spec(5, 10),))
    assert targets(captured) == ["table"] * 5
    same_result(model, [captured], torch.randint(0, 10, (3, 5)))


def test_packing_is_recorded() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 6, batch_first=True)

        def forward(self, x, lengths):
            packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            _, (h, _) = self.lstm(packed)
            return h[-1]

    model = Packed()
    lengths = torch.tensor([2, 5, 1])
    spec = (floats(5, 4), floats(name="lengths"))
    captured = capture(
        model, (spec[0], type(spec[1])(name="lengths", dtype="int64", shape=(), high=6))
    )
    assert captured.opaque == ()
    same_result(model, [captured], torch.randn(3, 5, 4), lengths)


def test_a_module_called_twice_is_two_nodes_with_two_scopes() -> None:
    class Twice(Net):
        def forward(self, x):
            return self.after(self.before(self.before(x)))

    captured = capture(Twice(Plain()), (floats(4),))
    scopes = [n.meta["scope"] for n in captured.compute_nodes if n.op == "call_module"]
    assert targets(captured) == ["before.linear", "before.linear", "after.linear"]
    assert scopes == [("before",), ("before@1",), ("after",)]


def test_scopes_are_the_enclosing_calls() -> None:
    captured = capture(Net(Net(Plain())), (floats(4),))
    node = node_of(captured, "odd.odd.linear")
    assert node.meta["scope"] == ("odd", "odd.odd")
    assert node_of(captured, "x").meta["scope"] == ()


def test_undeclared_parameters_keep_their_defaults() -> None:
    captured = capture(Plain(), (floats(4),))
    assert len(captured.graph.find_nodes(op="placeholder")) == 1
    both = capture(Plain(), (floats(4), floats(4, name="bias")))
    assert [n.name for n in both.graph.find_nodes(op="placeholder")] == ["x", "bias"]


def test_a_sequential_is_opened_and_a_torch_module_is_one_call() -> None:
    assert targets(
        capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (floats(4, name="input"),))
    ) == ["0", "1"]
    model = nn.Linear(4, 3)
    captured = capture(model, (floats(4, name="input"),))
    assert targets(captured) == [""]
    same_result(model, [captured], torch.randn(2, 4))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (NoGrad, r"forward of NoGrad itself cannot be traced \(no_grad\).*into a submodule"),
        (Counter, "changes its attribute 'calls'"),
        (PythonRandom, "random numbers"),
        (DataDependent, r"at test_tracer.py:\d+ \(TraceError"),
    ],
)
def test_the_model_itself_must_be_traceable(kind: type[Odd], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(kind(), (floats(4),))


def test_hooks_of_the_model_itself_and_lazy_parameters_are_refused() -> None:
    model = Plain()
    model.register_forward_hook(lambda m, x, y: None)
    with pytest.raises(CaptureError, match="Plain itself has hooks"):
        capture(model, (floats(4),))
    with pytest.raises(CaptureError, match="0.weight has no shape yet"):
        capture(nn.Sequential(nn.LazyLinear(3)), (floats(4, name="input"),))


def test_inputs_must_be_forwards_parameters() -> None:
    with pytest.raises(CaptureError, match="'x': describe it"):
        capture(Plain(), (floats(4, name="bias"),))
    with pytest.raises(CaptureError, match="--input y is not a parameter.*x, scale, bias"):
        capture(Plain(), (floats(4), floats(4, name="y")))
    with pytest.raises(CaptureError, match="--input x is not a parameter of Linear.forward"):
        capture(nn.Linear(4, 4), (floats(4),))
    with pytest.raises(CaptureError, match="at least 2"):
        capture(Plain(), (floats(4),), batch_size=1)


class FunctionalDropout(Odd):
    def forward(self, x):
        return F.dropout(self.linear(x), 0.5, training=self.training)


class TrainingBranch(Odd):
    def forward(self, x):
        y = self.linear(x)
        if self.training:
            y = y + 1
        return y


class EvalBranch(Odd):
    def forward(self, x):
        y = self.linear(x)
        return y if self.training else y.sigmoid()


class TrainingWiring(Odd):
    def forward(self, x):
        y, z = self.linear(x), x.tanh()
        return y if self.training else z


class TrainingWiringOfInputs(Odd):
    """The choice is between values from outside of the module that chooses."""

    class Chooses(nn.Module):
        def forward(self, y, z):
            return (z if self.training else y) - y

    def __init__(self) -> None:
        super().__init__()
        self.odd = self.Chooses()

    def forward(self, x):
        return self.odd(self.linear(x), x.tanh())


class EvalOnlyFails(Odd):
    def forward(self, x):
        if not self.training and x.sum() > 0:
            return x
        return self.linear(x)


@pytest.mark.parametrize(
    "kind",
    [TrainingBranch, EvalBranch, TrainingWiring, EvalOnlyFails],
)
def test_code_that_reads_training_stays_whole(kind: type[Odd]) -> None:
    model = Net(Net(kind()))
    captured = capture(model, (floats(4),))
    assert [path for path, _ in captured.opaque] == ["odd.odd"]
    same_result(model, [captured], torch.randn(3, 4))


def test_a_constant_that_depends_on_training_becomes_a_switch() -> None:
    model = Net(FunctionalDropout())
    captured = capture(model, (floats(4),))
    assert captured.opaque == ()
    switch = Switch(training=True, evaluation=False)
    assert switch in node_of(captured, F.dropout).kwargs.values()
    same_result(model, [captured], torch.randn(3, 4))


def test_a_module_that_chooses_between_what_it_is_given_stays_whole() -> None:
    model = TrainingWiringOfInputs()
    captured = capture(model, (floats(4),))
    assert captured.opaque == (("odd", "depends on self.training"),)
    same_result(model, [captured], torch.randn(3, 4))


class DropsPath(nn.Module):
    """Stochastic depth: in evaluation it does nothing at all."""

    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1) < 0.5)


class Residual(nn.Module):
    """A block that calls it twice, once inside of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.drop_path = DropsPath()
        self.body = nn.Sequential(nn.Linear(4, 4), self.drop_path)

    def forward(self, x):
        x = x + self.drop_path(torch.tanh(self.linear(x)))
        return x + self.body(x)


@pytest.mark.parametrize("frontend", ["fx", "record"])
@pytest.mark.parametrize("model", [Net(Residual()), Residual()], ids=["inside", "itself"])
def test_of_a_block_only_what_does_nothing_in_evaluation_stays_whole(
    model: nn.Module, frontend: str
) -> None:
    captured = capture(model, (floats(4),), frontend=frontend)
    ((path, reason),) = captured.opaque
    assert path.endswith("drop_path") and reason == "depends on self.training"
    assert "body.0" in " ".join(map(str, targets(captured)))
    same_result(model, [captured], torch.randn(3, 4))


@pytest.mark.parametrize("kind", [TrainingBranch, EvalBranch, TrainingWiring])
def test_the_model_itself_must_not_branch_on_training(kind: type[Odd]) -> None:
    with pytest.raises(CaptureError, match=r"depends on self.training \(at .+\): move"):
        capture(kind(), (floats(4),))


def test_constants_of_the_model_itself_may_depend_on_training() -> None:
    class Switches(Odd):
        def forward(self, x):
            y = F.dropout(self.linear(x), 0.5, training=self.training)
            y = y[:, : 3 if self.training else 2] * (2.0 if self.training else 0.5)
            return y.view(-1, 3 if self.training else 2)

    model = Switches()
    captured = capture(model, (floats(4),))
    assert captured.opaque == ()
    dropout = node_of(captured, F.dropout)
    assert dropout.kwargs["training"] == Switch(training=True, evaluation=False)
    assert dropout.meta["random"]
    same_result(model, [captured], torch.randn(3, 4))


def test_modules_that_torch_switches_are_opened() -> None:
    class Switches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

        def forward(self, x):
            return self.layers(x)

    model = Switches()
    captured = capture(model, (floats(4),))
    assert captured.opaque == ()
    same_result(model, [captured], torch.randn(6, 4))


def in_place_skip(x: Tensor) -> Tensor:
    skip = x = x * 2
    x += 1
    return x * skip


def in_place_view(x: Tensor) -> Tensor:
    y = x * 2
    part = y[:, :2]
    part -= 1
    return y


def in_place_each(x: Tensor) -> Tensor:
    y = x * 2
    y += 1
    y *= x
    y /= 3
    y -= x
    y **= 2
    y //= 2
    y %= 3
    mask = y > 1
    mask &= x > 0
    mask |= y > 2
    mask ^= x > 1
    return y * mask


@pytest.mark.parametrize("function", [in_place_skip, in_place_view, in_place_each])
def test_in_place_operators_write(function) -> None:
    class Uses(nn.Module):
        def forward(self, x):
            return function(x)

    model = Net(Uses())
    captured = capture(model, (floats(4),))
    assert captured.opaque == ()
    same_result(model, [captured], torch.randn(3, 4))
