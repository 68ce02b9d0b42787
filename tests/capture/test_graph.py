"""Where a graph may be cut, what crosses there, and which nodes stay together."""

import time

import torch
from torch import nn

from capture_nets import Nested, floats, ids, node_of
from scpl_compile.capture import (
    CutCandidate,
    capture,
    cut_candidates,
    node_parameters,
    tied_groups,
)


class Calls(nn.Module):
    """A model whose forward is a given function of (self, *inputs)."""

    def __init__(self, function, **modules: nn.Module) -> None:
        super().__init__()
        self._function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x, other=None):
        return self._function(self, x) if other is None else self._function(self, x, other)


def candidates(function, *specs, **modules: nn.Module) -> dict[str, CutCandidate]:
    """Candidates by the node they come after."""
    captured = capture(Calls(function, **modules), specs or (floats(4),))
    return {c.after: c for c in cut_candidates(captured)}


def linears(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(4, 4) for name in names}


def test_a_chain_can_be_cut_anywhere_but_at_its_end() -> None:
    found = candidates(lambda m, x: m.c(m.b(m.a(x))), **linears("a", "b", "c"))
    assert {after: (c.crossing, c.inputs, c.allowed) for after, c in found.items()} == {
        "a": (("a",), (), True),
        "b": (("b",), (), True),
    }


def test_skips_of_a_u_net_cross_until_their_last_use() -> None:
    def unet(m, x):
        one = m.down1(x)
        two = m.down2(one)
        bottom = m.bottom(two)
        up = m.up2(torch.cat([bottom, two], 1))
        return m.up1(torch.cat([up, one], 1))

    modules = linears("down1", "down2", "bottom")
    modules |= {"up2": nn.Linear(8, 4), "up1": nn.Linear(8, 4)}
    found = candidates(unet, **modules)
    assert {after: c.crossing for after, c in found.items()} == {
        "down1": ("down1",),
        "down2": ("down1", "down2"),
        "bottom": ("down1", "down2", "bottom"),
        "cat": ("down1", "cat"),
        "up2": ("down1", "up2"),
        "cat_1": ("cat_1",),
    }
    assert all(c.allowed for c in found.values())


def test_inputs_read_later_and_early_outputs_cross() -> None:
    def function(m, x, other):
        early = m.a(x)
        return m.c(m.b(early) + other), early

    found = candidates(function, floats(4), floats(4, name="other"), **linears("a", "b", "c"))
    assert (found["a"].crossing, found["a"].inputs) == (("a",), ("other",))
    assert (found["b"].crossing, found["b"].inputs) == (("a", "b"), ("other",))
    assert (found["add"].crossing, found["add"].inputs) == (("a", "add"), ())


def test_only_tensors_cross() -> None:
    lstm = nn.LSTM(4, 4)
    found = candidates(lambda m, x: m.c(m.lstm(x)[0]), floats(5, 4), lstm=lstm, **linears("c"))
    assert found["lstm"].reason == "lstm is not a tensor"
    assert found["getitem"].allowed
    found = candidates(lambda m, x: m.a(x) * x.sum().item(), **linears("a"))
    assert found["item"].reason == "item is not a tensor"


def test_sizes_that_can_be_computed_again_do_not_count() -> None:
    def function(m, x):
        batch = x.size(0)
        return m.b(m.a(x)).view(batch, 2, 2)

    found = candidates(function, **linears("a", "b"))
    assert found["a"].crossing == ("a",) and found["a"].allowed
    doubled = candidates(lambda m, x: m.a(x).repeat(x.size(0) * 2, 1), **linears("a"))
    assert doubled["a"].allowed
    early = candidates(lambda m, x: (lambda n: m.a(x).repeat(n, 1))(x.size(0) * 2), **linears("a"))
    assert early["a"].reason == "mul is not a tensor"


def test_something_that_can_be_trained_must_cross() -> None:
    found = candidates(lambda m, x: m.b(m.a(x + 1)), **linears("a", "b"))
    assert found["add"].reason == "no tensor with a gradient crosses"
    frozen = nn.Linear(4, 4).requires_grad_(False)
    found = candidates(lambda m, x: m.a(m.frozen(x)), frozen=frozen, **linears("a"))
    assert found["frozen"].reason == "no tensor with a gradient crosses"
    found = candidates(lambda m, x: m.b(m.a(x).detach()), **linears("a", "b"))
    assert found["a"].allowed and not found["detach"].allowed


def test_values_without_a_batch_dimension_and_parameters_stay() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 4))
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            token = self.token.expand(x.shape[0], 4)
            scale = self.token.exp()
            return torch.cat([y, token]) * scale

    captured = capture(Token(), (floats(4),))
    found = {c.after: c for c in cut_candidates(captured)}
    assert found["a"].allowed
    assert found["expand"].reason == "expand is a parameter"
    assert "no batch dimension" in found["cat"].reason


def test_memory_that_is_written_later_crosses_under_one_name_only() -> None:
    def function(m, x):
        y = m.a(x)
        part = y[:, :2]
        z = y * 3
        part.add_(z[:, :2])
        return m.b(y)

    found = candidates(function, **linears("a", "b"))
    assert found["a"].allowed
    assert found["getitem"].reason == "a and getitem share memory that is written later"
    assert found["mul"].reason == "a and getitem share memory that is written later"
    assert found["add_"].allowed and found["add_"].crossing == ("a",)


def test_memory_that_is_only_read_may_cross_under_several_names() -> None:
    def function(m, x):
        first, second = m.a(x).chunk(2, 1)
        return m.b(torch.cat([first.relu(), second], 1))

    found = candidates(function, **linears("a", "b"))
    assert len(found["getitem_1"].crossing) == 2 and found["getitem_1"].allowed


def test_an_input_that_was_written_is_not_read_again() -> None:
    def function(m, x):
        y = m.a(x)
        x.add_(1)
        return m.b(y) + x

    found = candidates(function, **linears("a", "b"))
    assert found["a"].allowed
    assert found["add_"].reason == "x is read again after it was written in place"


def test_an_in_place_activation_may_follow_a_cut() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    captured = capture(model, (floats(4, name="input"),))
    first, _ = cut_candidates(captured)
    assert first.allowed
    assert node_of(captured, "1").meta["mutates"] == (first.after,)


def test_tied_parameters_form_a_group() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 4)
            self.mix = nn.Linear(4, 4)
            self.head = nn.Linear(4, 20, bias=False)
            self.head.weight = self.table.weight
            self.twice = nn.Linear(4, 4)
            self.alone = nn.Linear(4, 4)

        def forward(self, ids):
            x = self.twice(self.mix(self.table(ids)))
            x = x @ self.alone.weight + self.alone(x)
            return self.head(self.twice(x))

    captured = capture(Tied(), (ids(5, 20),))
    groups = tied_groups(captured)
    assert groups == {
        "table": "table.weight = head.weight",
        "head": "table.weight = head.weight",
        "twice": "twice.weight",
        "twice_1": "twice.weight",
        "matmul": "alone.weight",
        "alone": "alone.weight",
    }
    assert node_parameters(captured)["head"] == ("table.weight",)
    assert node_parameters(captured)["mix"] == ("mix.weight", "mix.bias")


def test_groups_that_overlap_are_one() -> None:
    modules = linears("a", "b", "c")
    modules["b"].weight = modules["a"].weight
    modules["c"].bias = modules["b"].bias
    captured = capture(Calls(lambda m, x: m.c(m.b(m.a(x))), **modules), (floats(4),))
    assert set(tied_groups(captured)) == {"a", "b", "c"}
    assert len(set(tied_groups(captured).values())) == 1


def test_written_buffers_have_one_owner_and_others_may_have_several() -> None:
    norm = nn.BatchNorm1d(4, affine=False)
    captured = capture(
        Calls(lambda m, x: m.norm(m.a(m.norm(x))), norm=norm, **linears("a")), (floats(4),)
    )
    assert set(tied_groups(captured)) == {"norm", "norm_1"}

    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(4))
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.relu(x * self.mask) * self.mask)

    assert tied_groups(capture(Masks(), (floats(4),))) == {}


def test_one_candidate_between_any_two_nodes() -> None:
    captured = capture(Nested(), (floats(3, 6, 6),))
    found = cut_candidates(captured)
    names = [n.name for n in captured.compute_nodes]
    assert [c.after for c in found] == names[:-1]
    assert [c.index for c in found] == list(range(len(names) - 1))


def test_many_nodes_are_swept_fast() -> None:
    model = nn.Sequential(nn.Linear(2, 2), *(nn.ReLU() for _ in range(499)))
    captured = capture(model, (floats(2, name="input"),), batch_size=2)
    start = time.perf_counter()
    assert sum(c.allowed for c in cut_candidates(captured)) == 499
    tied_groups(captured)
    assert time.perf_counter() - start < 0.5


class _SharedBias(nn.Module):
    """A position bias that is made once and added by every layer, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.table(torch.arange(5))
        for layer in self.layers:
            x = torch.relu(layer(x) + bias)
        return self.head(x.mean(1))


def test_a_gradient_without_a_batch_crosses_beside_one_that_depends_on_it() -> None:
    found = capture(_SharedBias(), (floats(5, 6),))
    by_after = {candidate.after: candidate for candidate in cut_candidates(found)}
    assert "no batch dimension" in by_after["table"].reason
    after_first = next(c for name, c in by_after.items() if name.startswith("relu"))
    assert after_first.allowed and set(after_first.crossing) == {"table", after_first.after}


class _PadsWithInfinity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.head = nn.Linear(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(self.first(x), (0, 1, 0, 1), value=float("-inf"))
        return self.head(nn.functional.max_pool2d(x, 3).amax((2, 3)))


def test_no_cut_is_where_infinities_would_cross() -> None:
    found = capture(_PadsWithInfinity(), (floats(1, 8, 8),))
    refused = {c.after: c.reason for c in cut_candidates(found)}
    assert "holds infinities" in refused["pad"]
    assert refused["first"] == ""
