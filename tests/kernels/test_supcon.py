"""The public loss: what it accepts, what it returns, which choices it offers."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from scpl_compile.kernels import SupConLoss, forward_with_grad, supcon_loss
from scpl_compile.kernels.reference import supcon_reference

IMPLEMENTATIONS = [None, "chunked", "reference"]
INTEGERS = [
    torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def random_batch(batch: int = 24, dim: int = 6, classes: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, dim), torch.randint(0, classes, (batch,))


def gradient(features: Tensor, labels: Tensor, **options: object) -> Tensor:
    leaf = features.detach().requires_grad_()
    (grad,) = torch.autograd.grad(supcon_loss(leaf, labels, **options).sum(), leaf)
    return grad


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_defaults_are_those_of_the_released_code(impl: str | None) -> None:
    features, labels = random_batch()
    options = {"temperature": 0.1, "divisor": "scpl", "normalize": True, "reduction": "mean"}
    truth = supcon_reference(features, labels, **options)
    torch.testing.assert_close(supcon_loss(features, labels, impl=impl), truth.float())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_of_loss_and_gradient(impl: str | None, dtype: torch.dtype) -> None:
    features, labels = random_batch()
    features = features.to(dtype).requires_grad_()
    loss = supcon_loss(features, labels, impl=impl)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ()
    assert features.grad.dtype == dtype
    assert supcon_loss(features, labels, reduction="none", impl=impl).shape == (24,)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_only_the_equality_of_labels_counts(impl: str | None, dtype: torch.dtype) -> None:
    features, classes = random_batch()
    info = torch.iinfo(dtype)
    values = torch.tensor([info.min, info.max, 7, 3, 100], dtype=dtype)
    loss = supcon_loss(features, values[classes], impl=impl)
    torch.testing.assert_close(loss, supcon_loss(features, classes, impl=impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("divisor", ["scpl", "khosla"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_batch_of_one_is_zero_and_trains_nothing(
    impl: str | None, divisor: str, normalize: bool, reduction: str
) -> None:
    features = torch.randn(1, 4, requires_grad=True)
    options = {"divisor": divisor, "normalize": normalize, "reduction": reduction}
    loss = supcon_loss(features, torch.tensor([3]), impl=impl, **options)
    loss.sum().backward()
    assert loss.sum().item() == 0
    assert torch.equal(features.grad, torch.zeros(1, 4))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_small_temperature_stays_finite(impl: str | None, dtype: torch.dtype) -> None:
    features, labels = random_batch(64, 8, 10)
    features = features.to(dtype).requires_grad_()
    loss = supcon_loss(features, labels, temperature=0.005, impl=impl)
    loss.backward()
    assert loss.isfinite() and features.grad.isfinite().all()
    assert loss > 0 and features.grad.abs().max() > 0


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strides_do_not_matter(impl: str | None) -> None:
    features, labels = random_batch()
    wide = torch.stack([features, torch.randn(24, 6)], dim=2).flatten(1)[:, ::2]
    turned = features.t().contiguous().t()
    expanded = torch.stack([labels, labels.flip(0)], dim=1)[:, 0]
    for view in (wide, turned):
        assert not view.is_contiguous()
        loss = supcon_loss(view, expanded, impl=impl)
        torch.testing.assert_close(loss, supcon_loss(features, labels, impl=impl))
        grad = gradient(view, expanded, impl=impl)
        torch.testing.assert_close(grad, gradient(features, labels, impl=impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [6, 40])
def test_autocast_changes_no_bit(impl: str | None, dtype: torch.dtype, dim: int) -> None:
    features, labels = random_batch(600 if dim == 6 else 24, dim)
    features = features.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = supcon_loss(features, labels, impl=impl)
        grad = gradient(features, labels, impl=impl)
    assert torch.equal(loss, supcon_loss(features, labels, impl=impl))
    assert torch.equal(grad, gradient(features, labels, impl=impl))


def test_the_default_dtype_changes_no_bit() -> None:
    features, labels = random_batch()
    before = gradient(features, labels, divisor="khosla")
    torch.set_default_dtype(torch.float64)
    try:
        after = gradient(features, labels, divisor="khosla")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(before, after)


def test_the_reference_can_be_differentiated_twice() -> None:
    features, labels = random_batch(6, 3, 2)
    features = features.double().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda f: supcon_loss(f, labels, temperature=0.5, impl="reference"), features
    )


def test_the_module_is_the_function() -> None:
    features, labels = random_batch()
    options = {
        "temperature": 0.3,
        "divisor": "khosla",
        "normalize": False,
        "reduction": "none",
        "impl": "reference",
    }
    module = SupConLoss(**options)
    assert torch.equal(module(features, labels), supcon_loss(features, labels, **options))
    assert torch.equal(SupConLoss()(features, labels), supcon_loss(features, labels))
    assert not list(module.parameters()) and not module.state_dict()


def test_the_module_shows_its_options() -> None:
    shown = "temperature=0.1, divisor='scpl', normalize=True, reduction='mean', impl=None"
    assert repr(SupConLoss()) == f"SupConLoss({shown})"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_tensor_temperature_is_learnable(
    impl: str | None, normalize: bool, reduction: str
) -> None:
    features, labels = random_batch()
    features = features.double().requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(f: Tensor, t: Tensor) -> Tensor:
        options = {"normalize": normalize, "reduction": reduction, "impl": impl}
        return supcon_loss(f, labels, temperature=t, **options)

    fixed = supcon_loss(
        features, labels, temperature=0.3, normalize=normalize, reduction=reduction
    )  # fmt: skip
    torch.testing.assert_close(loss(features, temperature), fixed)
    assert torch.autograd.gradcheck(loss, (features, temperature))


def test_the_host_does_not_read_a_tensor_temperature() -> None:
    with FakeTensorMode():
        features, labels = torch.empty(8, 4), torch.empty(8, dtype=torch.int64)
        assert supcon_loss(features, labels, temperature=torch.empty(())).shape == ()


def test_a_parameter_is_learned_by_the_module() -> None:
    module = SupConLoss(temperature=torch.nn.Parameter(torch.tensor(0.5)))
    assert list(module.parameters()) == [module.temperature]
    module(*random_batch()).backward()
    assert module.temperature.grad.isfinite() and module.temperature.grad != 0


@pytest.mark.parametrize("divisor", ["scpl", "khosla"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("temperature", [0.3, 0.002])
def test_anchors_that_share_a_label_are_positives(
    divisor: str, reduction: str, temperature: float
) -> None:
    features, _ = random_batch(40)
    labels = torch.rand(40, 7) < 0.1
    assert not labels.any(1).all(), "an anchor without labels has no positives"
    options = {"divisor": divisor, "reduction": reduction, "temperature": temperature}
    features = features.double().requires_grad_()
    truth = supcon_loss(features, labels, impl="reference", **options)
    loss = supcon_loss(features, labels, **options)
    torch.testing.assert_close(loss, truth)
    weight = torch.rand_like(loss)
    (true_grad,) = torch.autograd.grad(truth, features, weight)
    (grad,) = torch.autograd.grad(loss, features, weight)
    torch.testing.assert_close(grad, true_grad, rtol=1e-9, atol=1e-9 / temperature)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_one_label_of_several_is_a_class(impl: str) -> None:
    features, labels = random_batch(1100)
    hot = torch.nn.functional.one_hot(labels).bool()
    loss = supcon_loss(features, hot, reduction="none", impl=impl)
    torch.testing.assert_close(loss, supcon_loss(features, labels, reduction="none", impl=impl))


def test_triton_refuses_labels_that_overlap() -> None:
    with pytest.raises(ValueError, match=r"impl='triton' takes one label.*\(24, 3\).*chunked"):
        supcon_loss(random_batch()[0], torch.ones(24, 3).bool(), impl="triton")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_forward_with_grad_is_both_at_once(impl: str | None) -> None:
    features, labels = random_batch()
    leaf = features.bfloat16().requires_grad_()
    with torch.no_grad():
        loss, grad = forward_with_grad(leaf, labels, divisor="khosla", impl=impl)
    expected = supcon_loss(leaf, labels, divisor="khosla", impl=impl)
    expected.backward()
    assert torch.equal(loss, expected) and not loss.requires_grad
    assert torch.equal(grad, leaf.grad) and grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be finite and above 0, not 0.0"),
        ({"temperature": -0.1}, ValueError, "temperature .* not -0.1"),
        ({"temperature": math.inf}, ValueError, "temperature .* not inf"),
        ({"temperature": math.nan}, ValueError, "temperature .* not nan"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature .* one element .* not \(2,\)"),
        ({"temperature": True}, TypeError, "temperature .* not a bool"),
        (
            {"divisor": "supcon"},
            ValueError,
            "divisor must be one of 'scpl', 'khosla', not 'supcon'",
        ),
        ({"reduction": "sum"}, ValueError, "reduction must be one of 'mean', 'none', not 'sum'"),
        ({"impl": "cuda"}, ValueError, "impl must be one of .*'triton', not 'cuda'"),
    ],
)
def test_wrong_options_are_named(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        supcon_loss(*random_batch(), **options)
    with pytest.raises(error, match=message):
        SupConLoss(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_says_why_it_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="needs features on a GPU, not on cpu.*chunked.*TRITON"):
        supcon_loss(*random_batch(), impl="triton")
    with pytest.raises(TypeError, match="float32, not float64: use impl='chunked'"):
        supcon_loss(random_batch()[0].double(), random_batch()[1], impl="triton")


ABSENT = """
import sys
sys.modules["triton"] = None
import torch
import scpl_compile.runtime.losses
from scpl_compile.kernels import supcon_loss
supcon_loss(torch.randn(4, 2), torch.tensor([0, 0, 1, 1]))
assert "scpl_compile.kernels.supcon_triton" not in sys.modules
try:
    supcon_loss(torch.randn(4, 2), torch.tensor([0, 0, 1, 1]), impl="triton")
except RuntimeError as error:
    assert "needs the package triton, which is not installed" in str(error), error
else:
    raise AssertionError("no error")
"""


def test_it_works_where_triton_is_absent(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ABSENT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("features", "labels", "error", "message"),
    [
        (torch.zeros(4), torch.zeros(4).long(), ValueError, r"features .* not \(4,\)"),
        (torch.zeros(4, 2, 2), torch.zeros(4).long(), ValueError, r"features .* not \(4, 2, 2\)"),
        (torch.zeros(0, 3), torch.zeros(0).long(), ValueError, r"features .* not \(0, 3\)"),
        (torch.zeros(3, 0), torch.zeros(3).long(), ValueError, r"features .* not \(3, 0\)"),
        (
            torch.zeros(4, 3).long(),
            torch.zeros(4).long(),
            TypeError,
            r"features .* not torch.int64",
        ),
        (torch.zeros(4, 3), torch.zeros(3).long(), ValueError, r"labels .*\(4,\).* not \(3,\)"),
        (
            torch.zeros(4, 3),
            torch.zeros(4, 1).long(),
            TypeError,
            r"labels .* not \(4, 1\) of torch.int64",
        ),
        (torch.zeros(4, 3), torch.zeros(4), TypeError, "labels .* of torch.float32"),
        (torch.zeros(4, 3), torch.zeros(4).bool(), TypeError, "labels .* of torch.bool"),
        (
            torch.zeros(4, 3),
            torch.zeros(4, device="meta").long(),
            ValueError,
            "labels are on meta and features on cpu",
        ),
    ],
)
def test_wrong_tensors_are_named(
    features: Tensor, labels: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        supcon_loss(features, labels)
