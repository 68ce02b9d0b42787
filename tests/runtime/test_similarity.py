"""Similarities of a batch with itself, against their definitions written out in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scpl_compile.runtime.similarity import deinforeg, similarity, similarity_to_labels

SHAPES = [(2, 3), (7, 16), (32, 5)]


def cosines(x: Tensor) -> Tensor:
    """Row by row: the correlation of the entries of two samples."""
    rows = [row - row.mean() for row in x.double()]
    return torch.stack(
        [torch.stack([F.cosine_similarity(a, b, dim=0) for b in rows]) for a in rows]
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_cosine_of_the_centred_samples(shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(similarity(x).double(), cosines(x), rtol=1e-5, atol=1e-6)
    scaled = 3 * x + torch.randn(shape[0], 1)
    torch.testing.assert_close(similarity(scaled), similarity(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_to_labels_is_the_squared_difference_from_that_of_one_hot_vectors(
    shape: tuple[int, int],
) -> None:
    x, labels = torch.randn(shape), torch.randint(4, shape[:1])
    expected = (cosines(x) - cosines(F.one_hot(labels, 4))).square().mean()
    found = similarity_to_labels(x, labels, 4)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_deinforeg_is_the_sum_of_its_three_terms(shape: tuple[int, int]) -> None:
    (batch, dim), labels = shape, torch.randint(4, shape[:1])
    z = torch.randn(shape)
    wide = z.double()
    variance = sum(
        max(0.0, 1 - float((wide[:, d].var() + 1e-4).sqrt())) for d in range(dim)
    ) / (dim * batch)  # fmt: skip
    unit = wide / wide.norm(dim=1, keepdim=True)
    centred = unit - unit.mean(0)
    covariance = sum(
        float(centred[:, i] @ centred[:, j] / batch) ** 2
        for i in range(dim)
        for j in range(dim)
        if i != j
    )
    expected = variance + float(similarity_to_labels(wide, labels, 4)) + covariance / dim
    assert float(deinforeg(z, labels, 4)) == pytest.approx(expected, rel=1e-5)


def test_features_like_the_labels_have_no_invariance_left() -> None:
    labels = torch.arange(12) % 3
    apart = F.one_hot(labels, 3).float()
    assert float(similarity_to_labels(apart, labels, 3)) < 1e-12
    assert float(similarity_to_labels(torch.randn(12, 3), labels, 3)) > 0.1


@pytest.mark.parametrize("loss", [similarity_to_labels, deinforeg])
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_samples_and_a_single_one_have_a_finite_gradient(
    loss: object, batch: int, value: float, dtype: torch.dtype
) -> None:
    x = torch.full((batch, 3), value, dtype=dtype, requires_grad=True)
    found = loss(x, torch.arange(batch) % 2, 2)  # type: ignore[operator]
    found.backward()
    assert found.dtype == torch.float32 and found.isfinite()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("loss", [similarity_to_labels, deinforeg])
def test_gradients_are_those_of_finite_differences(loss: object) -> None:
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 2, 2])
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, 3), x)  # type: ignore[operator]
