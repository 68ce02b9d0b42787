"""The Triton kernels against the float64 reference, in the process that test_supcon_triton starts:
in Triton's interpreter, which needs no GPU, or on a GPU.

The interpreter's bfloat16 dot is wrong and its bfloat16 store rounds towards zero: the kernels
compute products in float32 there (UPCAST), and the tolerance has two roundings more. It runs one
program after another, so it cannot show a race.
"""

from pathlib import Path

import pytest
import torch
from supcon_peers import (
    CHOICES,
    OPTIONS,
    assert_guarded,
    assert_symmetric,
    assert_triangle,
    loss_and_gradient,
    random_batch,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernels.grid import CASES, Case, broken
from scpl_compile import compile_model
from scpl_compile.kernels import supcon_loss, supcon_triton, triton_kernels
from scpl_compile.kernels.reference import supcon_reference
from scpl_compile.kernels.routes import route

# numpy interprets, and warns of infinities; rows of the padding have some, and none reads them
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def supcon(features: Tensor, labels: Tensor, **options: object) -> Tensor:
    """`supcon_loss` by Triton, on the GPU where there is one."""
    loss = supcon_loss(features.to(DEVICE), labels.to(DEVICE), impl="triton", **options)
    return loss.to(features.device)


def path(batch: int, dim: int) -> str:
    way = route(batch, dim, torch.float32, "interpreter", 0.1, True)
    return "stored" if way.stored else "chunks" if not way.resident else "rows"


SHAPES = [(1, 1), (2, 3), (33, 5), (70, 16), (97, 20), (40, 130), (130, 65), (161, 48), (300, 144)]
"""(B, D): ragged in both, one block and several, every path."""


def test_the_shapes_take_every_path() -> None:
    every = {"stored", "chunks", "rows"}
    assert {path(*shape) for shape in SHAPES} == every
    assert {path(*shape) for shape in [(90, 8), (60, 140), (150, 65)]} == every


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_it_is_as_close_to_the_truth_as_torch(case: Case) -> None:
    """A part of the grid; benchmarks/kernels checks all of it."""
    assert broken(supcon, case, roundings=3) == ""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_every_path_is_as_close_too(shape: tuple[int, int], temperature: float) -> None:
    features, labels = random_batch(*shape, max(2, shape[0] // 6), torch.float32)
    options = {**OPTIONS, "temperature": temperature}
    assert_triangle(supcon, features, labels, roundings=3, **options)


@pytest.mark.parametrize("batch", [40, 150])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_gradient_is_a_symmetric_matrix_times_the_features(
    batch: int, reduction: str, normalize: bool
) -> None:
    assert_symmetric(supcon, torch.float32, batch, reduction, normalize)


@pytest.mark.parametrize("shape", [(90, 8), (60, 140), (150, 65)], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_order_of_the_batch_does_not_matter(
    shape: tuple[int, int], temperature: float, reduction: str
) -> None:
    features, labels = random_batch(*shape, 9, torch.float32)
    leaf, order = features.requires_grad_(), torch.randperm(len(features))
    options = {**OPTIONS, "temperature": temperature, "reduction": reduction}
    loss = supcon(leaf, labels, **options)
    permuted = supcon(leaf[order], labels[order], **options)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    (permuted_grad,) = torch.autograd.grad(permuted.sum(), leaf)
    torch.testing.assert_close(permuted, loss[order] if loss.dim() else loss, rtol=1e-5, atol=1e-5)
    atol = 2e-5 * grad.abs().max().item()
    torch.testing.assert_close(permuted_grad, grad, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("shape", [(90, 8), (60, 140), (150, 65)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_length_of_normalised_features_does_not_matter(
    shape: tuple[int, int], reduction: str
) -> None:
    features, labels = random_batch(*shape, 9, torch.float32)
    lengths = 2.0 ** torch.randint(-20, 20, (len(features), 1))
    options = {**OPTIONS, "reduction": reduction}
    loss, grad = loss_and_gradient(supcon, features, labels, **options)
    scaled, scaled_grad = loss_and_gradient(supcon, features * lengths, labels, **options)
    torch.testing.assert_close(scaled, loss, rtol=1e-6, atol=1e-6)
    atol = 1e-5 * grad.abs().max().item()
    torch.testing.assert_close(scaled_grad * lengths, grad, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("options", CHOICES)
@pytest.mark.parametrize("shape", [(90, 8), (60, 140)], ids=str)
@pytest.mark.parametrize("classes", ["one", "distinct", "negative"])
def test_any_labels(
    options: dict[str, object],
    shape: tuple[int, int],
    classes: str,
) -> None:
    features, labels = random_batch(*shape, 9, torch.float32)
    features /= 4
    labels = {
        "one": torch.full_like(labels, -7),
        "distinct": torch.randperm(len(labels)),
        "negative": labels * 2**59 - 2**62,
    }[classes]
    assert_triangle(supcon, features, labels, **options)
    if classes == "distinct":
        loss, grad = loss_and_gradient(supcon, features, labels, **options)
        assert loss.count_nonzero() == 0 and grad.count_nonzero() == 0


@pytest.mark.parametrize("shape", [(90, 8), (60, 140)], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_duplicated_and_zero_rows(
    shape: tuple[int, int], temperature: float, reduction: str
) -> None:
    features, labels = random_batch(*shape, 9, torch.float32)
    features[40:50] = features[:10]
    features[50], features[51], features[52] = 0, -features[53], 1e-13
    options = {**OPTIONS, "temperature": temperature, "reduction": reduction}
    truth = loss_and_gradient(supcon_reference, features, labels, **options)
    ours = loss_and_gradient(supcon, features, labels, **options)
    torch.testing.assert_close(ours[0], truth[0].float(), rtol=1e-5, atol=1e-6)
    lengths = features.norm(dim=1, keepdim=True).clamp_min(1e-12)  # gradients of unit features
    grad, true_grad = ours[1] * lengths, truth[1] * lengths
    atol = 2e-5 * true_grad.abs().max().item()
    torch.testing.assert_close(grad, true_grad, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_class_sums_serve_large_batches(monkeypatch: pytest.MonkeyPatch, reduction: str) -> None:
    """Labels are not compared in tiles then; here the limit is lowered."""
    monkeypatch.setattr("scpl_compile.kernels.routes.MAX_LABELS_BATCH", 16)
    assert not route(75, 6, torch.float32, "interpreter", 0.1, True).labels
    for options in (o for o in CHOICES if o["reduction"] == reduction):
        features, labels = random_batch(75, 6, 9, torch.float32)
        assert_triangle(supcon, features, labels, **options)


@pytest.mark.parametrize("shape", [(300, 8), (300, 140)], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_groups_of_columns_and_chunks_of_rows_move_last_bits_only(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    temperature: float,
) -> None:
    features, labels = random_batch(*shape, 9, torch.float32)
    options = {**OPTIONS, "temperature": temperature}
    several = loss_and_gradient(supcon, features, labels, **options)
    assert route(*shape, torch.float32, "interpreter", temperature, True).groups == 3
    monkeypatch.setattr("scpl_compile.kernels.routes.PROGRAMS", 1)
    monkeypatch.setattr("scpl_compile.kernels.routes.CHUNK_BYTES", 0)
    way = route(*shape, torch.float32, "interpreter", temperature, True)
    assert way.groups == 1 and way.chunk_rows == 128
    one = loss_and_gradient(supcon, features, labels, **options)
    for first, second in zip(several, one, strict=True):
        atol = 1e-5 * first.abs().max().item()
        torch.testing.assert_close(first, second, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("shape", [(90, 8), (60, 140), (150, 65)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_runs_give_the_same_bits(shape: tuple[int, int], reduction: str) -> None:
    features, labels = random_batch(*shape, 9, torch.float16)
    options = {**OPTIONS, "reduction": reduction}
    first, second = (loss_and_gradient(supcon, features, labels, **options) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [2.0**-26, 2.0**26])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradient_is_linear_in_what_arrives(
    dtype: torch.dtype, scale: float, reduction: str
) -> None:
    """Loss scaling cannot push the weights out of float16."""
    features, labels = random_batch(90, 8, 9, dtype)
    leaf = features.requires_grad_()
    loss = supcon(leaf, labels, **{**OPTIONS, "reduction": reduction})
    weight = torch.randn_like(loss)
    (grad,) = torch.autograd.grad(loss, leaf, weight, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, leaf, weight * scale)
    if dtype == torch.float32:
        torch.testing.assert_close(scaled / scale, grad, rtol=1e-5, atol=1e-8)
    else:  # the gradient itself is float16: it may overflow or vanish, but is never NaN
        assert not scaled.isnan().any()


def test_strides_and_no_gradient() -> None:
    features, labels = random_batch(50, 12, 9, torch.float32)
    loss, grad = loss_and_gradient(supcon, features, labels, **OPTIONS)
    turned = features.t().contiguous().t()
    repeated = labels.int().repeat_interleave(2)[::2]
    assert not turned.is_contiguous() and not repeated.is_contiguous()
    again, turned_grad = loss_and_gradient(supcon, turned, repeated, **OPTIONS)
    assert torch.equal(again, loss) and torch.equal(turned_grad, grad)
    assert torch.equal(supcon(features, labels, **OPTIONS), loss)


def test_a_stored_batch_takes_five_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward together, and no kernel of torch's: what it calls makes no data."""
    features, labels = (t.to(DEVICE) for t in random_batch(60, 140, 5, torch.float32))
    launched, called = [], set()
    function = type(triton_kernels.forward_kernel)
    run = function.run

    def count(self: object, *args: object, **kwargs: object) -> object:
        launched.append(self)
        return run(self, *args, **kwargs)

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    arguments = (0.1, "scpl", True, "mean", True)
    grad_loss = torch.ones((), device=DEVICE)
    monkeypatch.setattr(function, "run", count)
    with Called():
        _, *saved = supcon_triton.forward(features, labels, *arguments)
        supcon_triton.backward(grad_loss, features, labels, *saved, *arguments)
    assert len(launched) == 5
    if DEVICE == "cuda":  # the interpreter itself copies what it is given
        assert called <= {"empty", "new_empty", "empty_like", "select", "view", "detach"}


def training_curve(impl: str, directory: Path) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Twenty steps of an emitted program of three stages: losses by stage, and the weights."""
    source = directory / "net.py"
    source.write_text(NET)
    torch.manual_seed(0)
    program = compile_model(
        f"{source}:build_model", "8", num_classes=4, num_stages=3, split_at=("1", "3"),
        options={"impl": impl, "head": "mlp", "out": 8}, out=directory / impl,
    )  # fmt: skip
    assert (directory / impl / "stages.py").read_text().count(f'impl="{impl}"') == 2
    generator = torch.Generator().manual_seed(1)
    trainer = program.trainer(schedule="sequential", optimizer="sgd", lr=0.5, seed=0)
    curve = []
    for _ in range(20):
        labels = torch.randint(4, (24,), generator=generator)
        inputs = torch.randn(24, 8, generator=generator) + 2 * torch.eye(4, 8)[labels]
        trainer.step(inputs, labels)
        trainer.drain()
        curve += [losses | {"stage": k} for k, losses in enumerate(trainer.losses())]
    weights = trainer.state_dict()
    trainer.close()
    return curve, weights


NET = """
from torch import nn


def build_model():
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="stages are verified on the CPU, then interpreted")
def test_an_emitted_program_trains_as_with_the_chunked_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty steps, schedule sequential: the same curve within float32 rounding."""
    calls = []

    def count(*arguments: object) -> object:
        calls.append(arguments)
        return prologue(*arguments)

    prologue = supcon_triton._prologue
    monkeypatch.setattr(supcon_triton, "_prologue", count)
    ours, weights = training_curve("triton", tmp_path)
    launches = len(calls)
    expected, expected_weights = training_curve("chunked", tmp_path)
    assert launches >= 40 and len(calls) == launches, "two stages, twenty steps, and verification"
    contrast = [losses["contrast"] for losses in ours if "contrast" in losses]
    assert len(contrast) == 40 and sum(contrast[-2:]) < 0.9 * sum(contrast[:2])
    for found, wanted in zip(ours, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", CHOICES[:2] + CHOICES[-2:])
def test_nothing_is_written_or_read_outside(
    shape: tuple[int, int], options: dict[str, object]
) -> None:
    assert_guarded(shape, options, DEVICE)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
def test_it_is_the_default_on_a_gpu() -> None:
    features, labels = (t.to(DEVICE) for t in random_batch(40, 6, 5, torch.float32))
    assert torch.equal(supcon_loss(features, labels), supcon_loss(features, labels, impl="triton"))


@pytest.mark.parametrize("options", [CHOICES[0], CHOICES[-1]])
def test_compile_has_no_graph_break(options: dict[str, object]) -> None:
    def step(features: Tensor, labels: Tensor, **_: object) -> Tensor:
        return supcon_loss(features.to(DEVICE) * 2, labels.to(DEVICE), impl="triton", **options) * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (24, 30):
        features, labels = random_batch(batch, 6, 5, torch.float32)
        expected = loss_and_gradient(step, features, labels)
        found = loss_and_gradient(compiled, features, labels)
        torch.testing.assert_close(found, expected)


def test_what_would_be_wrong_in_silence_is_refused() -> None:
    features, labels = torch.randn(3, 8, 4, device=DEVICE), torch.zeros(3, 8, device=DEVICE).long()
    with pytest.raises(RuntimeError, match="cannot be mapped by vmap.*reference"):
        torch.vmap(lambda f, y: supcon_loss(f, y, impl="triton"))(features, labels)
    leaf = features[0].requires_grad_()
    loss = supcon_loss(leaf, labels[0], impl="triton")
    with pytest.raises(RuntimeError, match="no second derivative.*create_graph.*reference"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize("shape", [(20, 12), (70, 6), (300, 140)], ids=str)
def test_the_operator_is_what_torch_asks_of_one(shape: tuple[int, int]) -> None:
    features, labels = (t.to(DEVICE) for t in random_batch(*shape, 3, torch.float32))
    arguments = (features.requires_grad_(), labels, 0.1, "scpl", True, "mean", True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.scpl_compile.supcon_triton.default
    torch.library.opcheck(operator, arguments, test_utils=tests)
