"""The reference is the truth of the other tests, so its own truth comes from elsewhere."""

import math

import pytest
import torch
from torch import Tensor

from scpl_compile.kernels.reference import supcon_reference

OPTIONS = {"temperature": 0.1, "divisor": "scpl", "normalize": True, "reduction": "mean"}


def random_batch(batch: int, dim: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, dim, dtype=torch.float64), torch.randint(0, classes, (batch,))


def released_loss(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The released SCPL loss step by step: the maximum includes the diagonal."""
    z = torch.nn.functional.normalize(features, dim=1, eps=1e-12)
    mask = torch.eq(labels[:, None], labels[None, :]).to(z.dtype)
    not_self = 1 - torch.eye(len(z), dtype=z.dtype)
    similarity = z @ z.T / temperature
    similarity = similarity - similarity.max(dim=1, keepdim=True).values.detach()
    denominator = (similarity.exp() * not_self).sum(dim=1, keepdim=True)
    log_probability = similarity - denominator.log()
    return -((mask * not_self * log_probability).sum(dim=1) / mask.sum(dim=1)).mean()


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_scpl_is_the_released_formula(temperature: float) -> None:
    features, labels = random_batch(40, 12, 6)
    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    loss = supcon_reference(ours, labels, **{**OPTIONS, "temperature": temperature})
    released = released_loss(theirs, labels, temperature)
    loss.backward()
    released.backward()
    torch.testing.assert_close(loss, released, rtol=1e-10, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("divisor", ["scpl", "khosla"])
@pytest.mark.parametrize("normalize", [True, False])
def test_each_anchor_is_the_sum_in_the_formula(divisor: str, normalize: bool) -> None:
    features, labels = random_batch(9, 3, 4)
    rows = [list(map(float, row)) for row in features]
    if normalize:
        rows = [[v / math.hypot(*row) for v in row] for row in rows]
    expected = []
    for i, anchor in enumerate(rows):
        s = [sum(a * b for a, b in zip(anchor, row, strict=True)) / 0.2 for row in rows]
        log_sum = math.log(sum(math.exp(s[k]) for k in range(9) if k != i))
        positives = [j for j in range(9) if j != i and labels[j] == labels[i]]
        count = len(positives) + (divisor == "scpl")
        expected.append(-sum(s[j] - log_sum for j in positives) / max(count, 1))
    options = {"temperature": 0.2, "divisor": divisor, "normalize": normalize}
    losses = supcon_reference(features, labels, reduction="none", **options)
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))


def test_two_points_by_hand() -> None:
    features = torch.tensor([[2.0, 0.0], [0.0, 3.0], [4.0, 0.0]])
    labels = torch.tensor([5, -1, 5])
    losses = supcon_reference(
        features, labels, **{**OPTIONS, "temperature": 1.0, "reduction": "none"}
    )
    alone = math.log(math.e + 1) - 1  # similarity 1 to the positive, 0 to the other
    expected = torch.tensor([alone / 2, 0.0, alone / 2], dtype=torch.float64)
    torch.testing.assert_close(losses, expected)


def test_means_count_different_anchors() -> None:
    features, _ = random_batch(5, 4, 1)
    labels = torch.tensor([0, 0, 1, 2, 3])
    for divisor, count in (("scpl", 5), ("khosla", 2)):
        options = {**OPTIONS, "divisor": divisor}
        losses = supcon_reference(features, labels, **{**options, "reduction": "none"})
        mean = supcon_reference(features, labels, **options)
        torch.testing.assert_close(mean, losses.sum() / count)


@pytest.mark.parametrize("divisor", ["scpl", "khosla"])
def test_no_positive_is_a_loss_and_gradient_of_zero(divisor: str) -> None:
    for batch in (1, 6):
        features = torch.randn(batch, 3, requires_grad=True)
        options = {**OPTIONS, "divisor": divisor}
        loss = supcon_reference(features, torch.arange(batch), **options)
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(features.grad, torch.zeros(batch, 3))
