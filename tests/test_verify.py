"""Verification: what it finds, what it measures, and that it leaves no trace.

Which edits of an emitted file it catches is in test_mutations.py.
"""

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from golden_models import Compile
from scpl_compile.api import Program, compile_model
from scpl_compile.errors import VerifyError
from scpl_compile.runtime.loading import load_module
from scpl_compile.runtime.randomness import StageRandom, spread_seed
from scpl_compile.runtime.trainer import _STAGE
from scpl_compile.sources import example_inputs
from scpl_compile.verify import verify

WIDTH, NUM_CLASSES, BATCH = 8, 4, 6


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def compiled(model: nn.Module, *cuts: str, inputs: str = f"{WIDTH}", **options: Any) -> Program:
    return compile_model(
        model, inputs, num_classes=NUM_CLASSES, split_at=cuts, batch_size=BATCH,
        threads_per_stage=1, **options,
    )  # fmt: skip


def edited(program: Program, old: str, new: str, folder: Path) -> None:
    """Verify the program with an edit of its stages.py."""
    text = (program.directory / "stages.py").read_text()
    assert old in text
    (folder / "stages.py").write_text(text.replace(old, new))
    stages = load_module(folder / "stages.py", "edited").STAGES
    verify(
        program.plan, program.model, stages,
        lambda batch_size: example_inputs(program.plan.inputs, batch_size),
        weights_sha256="", select_output=lambda output: output,
    )  # fmt: skip


class Net(nn.Module):
    """first, `special` and a tail; `special` is what a test is about."""

    def __init__(self, special: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.special = special
        self.second = nn.Linear(WIDTH, WIDTH)
        self.fc = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.special(torch.relu(self.first(x)))
        return self.fc(torch.relu(self.second(x)))


# ---------------------------------------------------------------------- what tracing would lose


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)


class Autocast(Inner):
    """Half precision inside."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return x + y.float()


class NoGrad(Inner):
    """Its layer does not train."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.linear(x)
        return x + y


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 0.5


class StraightThrough(Inner):
    """A backward of its own: by autograd it would be zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x + _Sign.apply(self.linear(x))


class Checkpointed(Inner):
    """Its backward runs its forward again."""

    use_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.inner, x, use_reentrant=self.use_reentrant)

    def inner(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.3, self.training)


class Reentrant(Checkpointed):
    """The older kind, which trains nothing where its input has no gradient."""

    use_reentrant = True


class FunctionalDropout(Inner):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.3, training=self.training)


class LayerDrop(Inner):
    """Left out at random, by Python's generator."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.5:
            return x
        return x + self.linear(x)


class NumpyNoise(Inner):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.linear(x)
        noise = torch.from_numpy(np.random.standard_normal(WIDTH).astype(np.float32))
        return self.linear(x) + noise


class Tied(Inner):
    """One weight, used twice."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.linear(x)), self.linear.weight)


class FrozenNorm(nn.Module):
    """Stays in eval mode while the rest trains."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:  # kept whole
            x = x + 0
        return self.linear(self.norm(x))


SPECIAL = (Autocast, NoGrad, StraightThrough, Checkpointed, Reentrant, FunctionalDropout, LayerDrop,
           NumpyNoise, Tied, FrozenNorm)  # fmt: skip
without_warning = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
"""What Reentrant says wherever it runs without gradients."""
RANDOM = {Checkpointed, Reentrant, FunctionalDropout, LayerDrop, NumpyNoise}


def batches(num_steps: int) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(7)
    return [
        (torch.randn(BATCH, WIDTH, generator=draws), torch.arange(BATCH) % NUM_CLASSES)
        for _ in range(num_steps)
    ]


@without_warning
@pytest.mark.parametrize("special", SPECIAL, ids=lambda kind: kind.__name__)
def test_backpropagation_over_the_stages_is_plain_training_in_every_bit(
    special: Callable[[], nn.Module],
) -> None:
    model = Net(special())
    program = compiled(model, "special", method="bp")
    assert program.verification.random_stages == ((0,) if special in RANDOM else ())
    eager = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(eager.parameters(), lr=1e-2)
    with StageRandom(spread_seed(0, _STAGE, 0), torch.device("cpu")).drawing():
        for x, labels in batches(4):
            optimizer.zero_grad()
            F.cross_entropy(eager(x), labels).backward()
            optimizer.step()
    with program.trainer(lr=1e-2, seed=0) as trainer:
        for x, labels in batches(4):
            trainer.step(x, labels)
        trained = trainer.state_dict()
        logits = trainer.predict(x)[0]
    expected = eager.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], trained[name])] == []
    assert torch.equal(logits, eager.eval()(x))  # eval() after the compilation
    assert not torch.equal(expected["first.weight"], model.state_dict()["first.weight"])


@pytest.mark.parametrize(
    "special", [s for s in SPECIAL if s is not Reentrant], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("cut", ["first", "special"])
def test_local_losses_train_around_it_as_well(special: Callable[[], nn.Module], cut: str) -> None:
    program = compiled(Net(special()), cut)
    assert program.verification.is_verified
    with program.trainer(lr=1e-2) as trainer:
        for x, labels in batches(2):
            trainer.step(x, labels)
        trained = trainer.state_dict()
        expected = program.model.state_dict()
        moved = {name for name in expected if not torch.equal(expected[name], trained[name])}
    still = {name for name, _ in program.model.named_parameters()} - moved
    assert still == ({"special.linear.weight", "special.linear.bias"} if special is NoGrad
                     else set())  # fmt: skip


@without_warning
def test_a_module_that_a_cut_would_leave_untrained_is_an_error() -> None:
    """A reentrant checkpoint trains nothing behind a cut, without any error from torch."""
    with pytest.raises(VerifyError, match=r"'special\.linear\.bias' trains in the model and by no "
                       r"local loss \(nor do 1 more\).*--split-at"):  # fmt: skip
        compiled(Net(Reentrant()), "relu")
    assert compiled(Net(Reentrant()), "special").verification.is_verified


# ---------------------------------------------------------------------- randomness


def test_stages_that_draw_are_found_by_each_generator() -> None:
    for special in (FunctionalDropout, LayerDrop, NumpyNoise):
        program = compiled(Net(special()), "first", "special")
        assert program.verification.random_stages == (1,)
    assert compiled(Net(Tied()), "first", "special").verification.random_stages == ()


def test_a_second_stage_that_draws_from_numpy_is_found() -> None:
    """The second draw moves only a position within numpy's state."""
    net = Net(NumpyNoise())
    net.second = NumpyNoise()
    assert compiled(net, "special").verification.random_stages == (0, 1)


class HiddenCheckpoint(Checkpointed):
    """Capture sees autocast, and keeps the module whole before it meets checkpoint()."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x + checkpoint(self.linear, x, use_reentrant=False)


@without_warning
@pytest.mark.parametrize("special", [Checkpointed, HiddenCheckpoint, Reentrant])
def test_stages_whose_backward_runs_a_forward_are_found(special: type[nn.Module]) -> None:
    program = compiled(Net(special()), "special")
    assert program.verification.recompute_stages == (0,)
    assert compiled(Net(Tied()), "special").verification.recompute_stages == ()


class OwnGenerator(Inner):
    """Draws from a generator that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.generators = [np.random.default_rng(0)]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.linear(x)
        return self.linear(x) + torch.from_numpy(self.generators[0].random(WIDTH, np.float32))


def test_a_model_that_cannot_be_repeated_is_an_error() -> None:
    with pytest.raises(
        VerifyError,
        match=r"in train mode at batch size 3 does not give the same again .* 'special' "
        r"\(OwnGenerator, 3x8\): turn its randomness off",
    ):
        compiled(Net(OwnGenerator()), "first")


class Logarithm(Inner):
    """Gives NaN wherever its map is below zero."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).log()


def test_a_model_that_gives_nan_is_told_as_that() -> None:
    with pytest.raises(VerifyError, match=r"own output in eval mode .* has NaN on random"):
        compiled(Net(Logarithm()), "first")


# ---------------------------------------------------------------------- no trace


class Stateful(nn.Module):
    """All kinds of state that a forward may change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("total", torch.zeros(WIDTH), persistent=False)
        self.calls = 0
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        self.total = self.total + x.detach().sum(0)
        return F.dropout(self.norm(x), 0.1, self.training) * np.random.rand() * random.random()


def test_the_model_and_the_generators_are_as_before() -> None:
    model = Net(Stateful())
    model.second.eval()
    model.second.weight.requires_grad_(False)
    model.fc.weight.data.zero_()
    model(torch.randn(BATCH, WIDTH)).sum().backward()
    state = {n: v.clone() for n, v in (*model.named_parameters(), *model.named_buffers())}
    gradients = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters()
                 if p.grad is not None}  # fmt: skip
    modes = {name: module.training for name, module in model.named_modules()}
    others = (model.special.calls, list(model.special.seen), model.special.total)
    generators = (torch.get_rng_state(), np.random.get_state(), random.getstate())

    compiled(model, "first", "special")

    for name, value in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(value, state[name]), name
    assert gradients and all(
        model.get_parameter(name).grad is kept and torch.equal(kept, value)
        for name, (kept, value) in gradients.items()
    )
    assert all(p.grad is None for n, p in model.named_parameters() if n not in gradients)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert others[:2] == (model.special.calls, model.special.seen)
    assert others[2] is model.special.total
    assert torch.equal(generators[0], torch.get_rng_state())
    assert all(np.array_equal(a, b) for a, b in zip(generators[1], np.random.get_state(),
                                                   strict=True))  # fmt: skip
    assert generators[2] == random.getstate()


# ---------------------------------------------------------------------- nothing is vacuous


def test_a_classifier_of_zeros_hides_no_mistake(tmp_path: Path) -> None:
    """Else all gradients behind it would be zero, right or wrong (torchvision's ViT)."""
    net = Net(Tied())
    nn.init.zeros_(net.fc.weight)
    nn.init.zeros_(net.fc.bias)
    program = compiled(net, "special")
    with pytest.raises(VerifyError, match="the gradient of '(first|special)"):
        edited(program, "self.second(special)", "self.second(0.5 * (special + special.detach()))",
               tmp_path)  # fmt: skip


class Scaled(Inner):
    """A branch that begins at nothing (ReZero, layer scale)."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((WIDTH,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.linear(x)


@pytest.mark.parametrize("start", [0.0, 1e-6])
def test_a_branch_of_zeros_hides_no_mistake(start: float, tmp_path: Path) -> None:
    program = compiled(Net(Scaled(start)), "special_linear")
    text = (program.directory / "stages.py").read_text()
    assert "self.special.scale * special_linear" in text
    with pytest.raises(VerifyError):
        edited(program, "self.special.scale * special_linear", "self.special.scale * relu",
               tmp_path)  # fmt: skip


# ---------------------------------------------------------------------- what is measured


def test_the_figures_are_recorded(golden: Compile) -> None:
    program = golden("nested_cnn")
    checks = program.verification.checks
    assert checks.keys() == {"forward_eval", "forward_train", "gradients", "parameters"}
    assert checks["parameters"] == len(list(program.model.parameters()))
    assert all(0 <= checks[name] < 1e-4 for name in ("forward_eval", "forward_train", "gradients"))
    assert program.verification.plan == program.plan.digest


def test_the_model_may_take_its_inputs_in_another_order_and_have_others_between() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)
            self.fc = nn.Linear(WIDTH, NUM_CLASSES)

        def forward(self, a: Tensor, scale: float = 2.0, b: Tensor | None = None) -> Tensor:
            return self.fc(torch.relu(self.first(a)) * scale - b)

    assert compiled(Between(), "first", inputs="b:8,a:8").verification.is_verified


def test_sparse_gradients_are_compared() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, WIDTH, sparse=True)
            self.fc = nn.Linear(WIDTH, NUM_CLASSES)

        def forward(self, ids: Tensor) -> Tensor:
            return self.fc(self.embedding(ids).tanh().mean(1))

    program = compiled(Sparse(), "embedding", inputs="ids:int64:5<9")
    assert program.verification.checks["parameters"] == 3


class Cached(Inner):
    """Gives a tensor that it keeps, and writes again in the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None or self.kept.shape != x.shape or self.kept.requires_grad:
            self.kept = torch.zeros_like(x)
        with torch.no_grad():
            self.kept.copy_(x.detach() > 0)
        return self.kept


class UsesCache(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        mask = self.special(x)
        return self.fc(torch.relu(self.second(x) * mask))


def test_a_tensor_that_its_owner_keeps_is_sent_as_a_copy(tmp_path: Path) -> None:
    model = UsesCache(Cached())
    model(torch.randn(3, WIDTH))  # verify's first batch size: from now on it is kept
    program = compiled(model, "special")
    assert {c.name: c.alias for c in program.plan.cuts[0].crossings} == {
        "relu": "", "special": "cache",
    }  # fmt: skip
    with pytest.raises(VerifyError, match="its next forward writes into what it has sent"):
        edited(program, "cut(special, clone=True)", "cut(special)", tmp_path)


class WritesUnseen(Autocast):
    """Writes what it was given where autograd does not see it; nor does capture, as it is whole."""

    def forward(self, x: Tensor) -> Tensor:
        x.data.clamp_(max=0.5)
        return super().forward(x * 1)


def test_a_write_that_autograd_does_not_see_is_found() -> None:
    with pytest.raises(VerifyError, match=r"stage 1: it writes .* 'relu' .*unseen by autograd"):
        compiled(Net(WritesUnseen()), "relu")
    assert compiled(Net(WritesUnseen()), "special").verification.is_verified


# ---------------------------------------------------------------------- models that fail


class FixedBatch(Inner):
    def forward(self, x: Tensor) -> Tensor:
        if (
            len(x) == 2
            and not torch.is_inference_mode_enabled()
            and not isinstance(x, torch._subclasses.FakeTensor)
        ):
            raise RuntimeError("two is\nno batch")
        return self.linear(x)


def test_a_model_that_fails_is_told_with_mode_and_batch_size() -> None:
    with pytest.raises(
        VerifyError,
        match="the model in eval mode at batch size 2 fails: RuntimeError: two is no batch",
    ):
        compiled(Net(FixedBatch()), "first")


def test_without_verification_every_stage_counts_as_random() -> None:
    program = compiled(Net(Tied()), "first", verify=False)
    assert not program.verification.is_verified
    assert program.verification.random_stages is None
    assert program.verification.recompute_stages is None
