"""The chunked loss against the float64 reference, and what it promises beyond the numbers."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from supcon_peers import (
    CHOICES,
    OPTIONS,
    assert_symmetric,
    assert_triangle,
    loss_and_gradient,
    random_batch,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernels.grid import CASES, broken
from scpl_compile.kernels import supcon_chunked as supcon_chunked_module
from scpl_compile.kernels.reference import supcon_reference
from scpl_compile.kernels.supcon_chunked import chunk_size, supcon_chunked


def assert_is_reference(features: Tensor, labels: Tensor, **options: object) -> None:
    """Both in float64, to 1e-12 of the largest terms that are summed."""
    reference_options = {k: v for k, v in options.items() if k != "chunk"}
    truth, truth_grad = loss_and_gradient(supcon_reference, features, labels, **reference_options)
    loss, grad = loss_and_gradient(supcon_chunked, features, labels, **options)
    norm = features.norm(dim=1, keepdim=True)
    length = 1.0 if options["normalize"] else norm.max().item()
    logit = 1 + length**2 / options["temperature"]
    torch.testing.assert_close(loss, truth, rtol=0, atol=1e-12 * logit)
    per_unit = norm if options["normalize"] else 1.0
    scale = 1e-12 * logit * (1 + length / options["temperature"])
    torch.testing.assert_close(grad * per_unit, truth_grad * per_unit, rtol=0, atol=scale)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_it_is_the_reference(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 70), label="batch")
    dim = data.draw(st.integers(1, 40), label="dim")
    classes = data.draw(st.integers(1, batch), label="classes")
    seed = data.draw(st.integers(0, 2**32), label="seed")
    features, labels = random_batch(batch, dim, classes, seed=seed)
    assert_is_reference(
        features,
        labels,
        temperature=data.draw(st.floats(0.002, 2), label="temperature"),
        divisor=data.draw(st.sampled_from(["scpl", "khosla"]), label="divisor"),
        normalize=data.draw(st.booleans(), label="normalize"),
        reduction=data.draw(st.sampled_from(["mean", "none"]), label="reduction"),
        chunk=data.draw(st.none() | st.integers(1, 80), label="chunk"),
    )


@pytest.mark.parametrize("options", CHOICES)
def test_it_is_the_reference_where_blocks_are_recomputed(options: dict[str, object]) -> None:
    assert_is_reference(*random_batch(700, 5, 9), **options)


@pytest.mark.parametrize("options", CHOICES)
@pytest.mark.parametrize("chunk", [3, 11])
def test_the_gradient_is_the_derivative(options: dict[str, object], chunk: int) -> None:
    features, labels = random_batch(11, 4, 4)
    options = {**options, "temperature": 0.4, "chunk": chunk}
    assert torch.autograd.gradcheck(
        lambda f: supcon_chunked(f, labels, **options), features.requires_grad_()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [2.0, 0.1, 0.0251, 0.005])
@pytest.mark.parametrize("options", CHOICES)
def test_it_is_as_close_to_the_truth_as_torch(
    dtype: torch.dtype, temperature: float, options: dict[str, object]
) -> None:
    options = {**options, "temperature": temperature}
    features, labels = random_batch(48, 16, 6, dtype)
    if not options["normalize"]:
        features = torch.nn.functional.normalize(features, dim=1)
    assert_triangle(partial(supcon_chunked, chunk=20), features, labels, **options)


def test_the_grid() -> None:
    assert len(CASES) >= 300
    assert [text for case in CASES if (text := broken(supcon_chunked, case))] == []


@pytest.mark.parametrize("faulty", ["loss", "gradient"])
def test_the_grid_finds_a_small_fault(faulty: str) -> None:
    def wrong(features: Tensor, labels: Tensor, **options: object) -> Tensor:
        loss = supcon_chunked(features, labels, **options)
        off = loss * 1.0001
        return off + (loss - off).detach() if faulty == "gradient" else loss + (off - loss).detach()

    cases = [case for case in CASES if case.dtype == torch.float32 and case.batch > 60]
    found = [text for case in cases if (text := broken(wrong, case))]
    assert len(found) > len(cases) / 4
    assert all(f"the {faulty} is off" in text for text in found)


@pytest.mark.parametrize("options", CHOICES)
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_products_in_bfloat16_are_close_enough(
    options: dict[str, object], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a processor with AMX takes them: here any does."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    features, labels = random_batch(700, 16, 30, torch.bfloat16)
    assert supcon_chunked_module._multiplies_bfloat16(features)
    if not options["normalize"]:
        features = torch.nn.functional.normalize(features, dim=1)
    options = {**options, "temperature": temperature}
    assert_triangle(supcon_chunked, features, labels, **options)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    _, exact = loss_and_gradient(supcon_chunked, features, labels, **options)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    _, grad = loss_and_gradient(supcon_chunked, features, labels, **options)
    assert (grad - exact).double().norm() <= 0.01 * exact.double().norm()


@pytest.mark.parametrize("options", CHOICES)
@pytest.mark.parametrize("temperature", [0.1, 0.002])
def test_the_chunk_moves_last_bits_only(options: dict[str, object], temperature: float) -> None:
    features, labels = random_batch(23, 6, 4)
    options = {**options, "temperature": temperature}
    whole = loss_and_gradient(supcon_chunked, features, labels, **options, chunk=23)
    for chunk in (1, 2, 7, 16, 22, 64):
        parts = loss_and_gradient(supcon_chunked, features, labels, **options, chunk=chunk)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10 * a.abs().max().item())


@pytest.mark.parametrize("batch", [1, 2, 319, 320, 321, 512, 1000, 4096, 65537])
@pytest.mark.parametrize(
    ("device_type", "threads", "largest"), [("cpu", 1, 320), ("cpu", 2, 512), ("cuda", 2, 4096)]
)
def test_chunks_are_few_and_equal(batch: int, device_type: str, threads: int, largest: int) -> None:
    chunk = chunk_size(batch, device_type, threads)
    num_chunks = -(-batch // chunk)
    assert 1 <= chunk <= largest
    assert num_chunks == -(-batch // largest)
    assert num_chunks * chunk - batch < num_chunks


@pytest.mark.parametrize("options", CHOICES)
def test_the_order_of_the_batch_does_not_matter(options: dict[str, object]) -> None:
    features, labels = random_batch(40, 6, 5)
    leaf, order = features.requires_grad_(), torch.randperm(40)
    loss = supcon_chunked(leaf, labels, **options, chunk=16)
    permuted = supcon_chunked(leaf[order], labels[order], **options, chunk=16)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    (permuted_grad,) = torch.autograd.grad(permuted.sum(), leaf)
    torch.testing.assert_close(permuted, loss[order] if loss.dim() else loss)
    torch.testing.assert_close(permuted_grad, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_length_of_normalised_features_does_not_matter(reduction: str) -> None:
    features, labels = random_batch(40, 6, 5)
    lengths = torch.logspace(-9, 9, 40, dtype=torch.float64)[torch.randperm(40), None]
    options = {**OPTIONS, "reduction": reduction}
    loss, grad = loss_and_gradient(supcon_chunked, features, labels, **options)
    scaled, scaled_grad = loss_and_gradient(supcon_chunked, features * lengths, labels, **options)
    torch.testing.assert_close(scaled, loss)
    torch.testing.assert_close(scaled_grad * lengths, grad, rtol=1e-9, atol=1e-12)
    assert (features * grad).sum(1).abs().max() < 1e-12


def test_rows_too_short_to_normalise() -> None:
    features, labels = random_batch(12, 3, 3)
    features[0] = 0
    features[1] = torch.tensor([3e-13, 0, -4e-13])
    (truth, truth_grad), (loss, grad) = (
        loss_and_gradient(fn, features, labels, **OPTIONS)
        for fn in (supcon_reference, supcon_chunked)
    )
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(grad, truth_grad)


@pytest.mark.parametrize("options", CHOICES)
def test_one_class_only(options: dict[str, object]) -> None:
    features, _ = random_batch(30, 4, 1)
    assert_is_reference(features, torch.full((30,), -7), **options, chunk=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.1, 0.001])
@pytest.mark.parametrize("options", CHOICES)
def test_without_positives_loss_and_gradient_are_exactly_zero(
    dtype: torch.dtype, temperature: float, options: dict[str, object]
) -> None:
    features, _ = random_batch(30, 4, 1, dtype)
    options = {**options, "temperature": temperature, "chunk": 8}
    loss, grad = loss_and_gradient(supcon_chunked, features, torch.randperm(30), **options)
    assert loss.count_nonzero() == 0 and grad.count_nonzero() == 0


@pytest.mark.parametrize("batch", [40, 700])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_gradient_is_a_symmetric_matrix_times_the_features(
    batch: int, reduction: str, normalize: bool
) -> None:
    assert_symmetric(supcon_chunked, torch.float64, batch, reduction, normalize)


@pytest.mark.parametrize("options", CHOICES)
@pytest.mark.parametrize("batch", [100, 700])
def test_two_runs_give_the_same_bits(options: dict[str, object], batch: int) -> None:
    features, labels = random_batch(batch, 16, 7, torch.float32)
    first, second = (
        loss_and_gradient(supcon_chunked, features, labels, **options) for _ in range(2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("batch", [100, 700])
def test_a_kept_graph_gives_its_gradient_twice(batch: int) -> None:
    features, labels = random_batch(batch, 8, 7, torch.float32)
    loss = supcon_chunked(features.requires_grad_(), labels, **OPTIONS)
    (first,) = torch.autograd.grad(loss, features, retain_graph=True)
    (second,) = torch.autograd.grad(loss, features)
    assert torch.equal(first, second)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(reduction: str) -> None:
    features, labels = random_batch(8, 4, 2)
    loss = supcon_chunked(features.requires_grad_(), labels, **{**OPTIONS, "reduction": reduction})
    with pytest.raises(RuntimeError, match="no second derivative.*create_graph.*reference"):
        torch.autograd.grad(loss.sum(), features, create_graph=True)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numel = max(self.numel, storage)
        return result


def run(
    features: Tensor, labels: Tensor, chunk: int | None = None, **options: object
) -> tuple[Tensor, ...]:
    """What `forward` returns, and after it the gradient: the operator's inside."""
    arguments = [options[name] for name in ("temperature", "divisor", "normalize", "reduction")]
    arguments += [chunk or chunk_size(len(features), "cpu", 1), True]
    result = supcon_chunked_module.forward(features, labels, *arguments)
    fake = supcon_chunked_module.forward_fake(features, labels, *arguments)
    assert [(t.shape, t.dtype) for t in result] == [(t.shape, t.dtype) for t in fake]
    grad_loss = torch.ones_like(result[0])
    return *result, supcon_chunked_module.backward(
        grad_loss, features, labels, *result[1:], *arguments
    )


@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_memory_grows_with_the_batch_not_with_its_square(temperature: float) -> None:
    batch, dim = 4096, 32
    features, labels = random_batch(batch, dim, 50, torch.float32)
    with LargestTensor() as largest:
        _, *saved, grad = run(features, labels, **{**OPTIONS, "temperature": temperature})
    assert largest.numel == max(batch * dim, chunk_size(batch, "cpu", 1) ** 2)
    assert batch * dim < sum(t.numel() for t in saved) < 3 * batch * dim
    assert grad.isfinite().all()


def test_kept_blocks_are_no_larger_than_the_features() -> None:
    batch, dim = 600, 300
    features, labels = random_batch(batch, dim, 5, torch.float32)
    _, *saved, _ = run(features, labels, **OPTIONS)
    assert batch * batch // 2 < sum(t.numel() for t in saved) < 4.5 * batch * dim


@pytest.mark.parametrize("batch", [1, 5, 8, 13])
def test_blocks_are_kept_as_many_as_there_are(batch: int) -> None:
    features, labels = random_batch(batch, 3, 3)
    *_, kept, _ = run(features, labels, chunk=4, **OPTIONS)
    sizes = [min(4, batch - first) for first in range(0, batch, 4)]
    pairs = [a * b for i, a in enumerate(sizes) for b in sizes[i:]]
    assert kept.numel() == sum(pairs)


@pytest.mark.parametrize("options", CHOICES)
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_nothing_depends_on_data(options: dict[str, object], temperature: float) -> None:
    """A fake tensor has no data: .item(), nonzero or a data-dependent shape would raise."""
    with FakeTensorMode():
        features, labels = torch.empty(600, 8), torch.empty(600, dtype=torch.int64)
        *_, grad = run(features, labels, **{**options, "temperature": temperature})
        assert grad.shape == (600, 8)
