"""PredSim's local loss: its two terms, for every kind of feature."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scpl_compile.errors import MethodError
from scpl_compile.runtime.losses import cross_entropy
from scpl_compile.runtime.predsim import PredSim
from scpl_compile.runtime.similarity import similarity_to_labels

LABELS = torch.tensor([0, 1, 2, 0, 1, 1])


def made(*shapes: tuple[int, ...], **options: object) -> PredSim:
    return PredSim(num_classes=3, in_shapes=shapes, **options)  # type: ignore[arg-type]


def features(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(len(LABELS), *shape) for shape in shapes]


def test_a_map_is_compared_by_the_deviations_of_what_a_convolution_makes_of_it() -> None:
    loss = made((4, 5, 6))
    (x,) = features((4, 5, 6))
    (layer,) = loss.maps
    spread = F.conv2d(x, layer.weight, padding=1).std(dim=(2, 3))
    terms = loss(x, labels=LABELS)
    torch.testing.assert_close(terms["similarity"], 0.99 * similarity_to_labels(spread, LABELS, 3))
    pooled = F.avg_pool2d(x, 2, ceil_mode=True).flatten(1)  # to 3x3, at most 4x4
    wrong = cross_entropy(loss.classifier(pooled), LABELS)
    torch.testing.assert_close(terms["cross_entropy"], 0.01 * wrong)


def test_a_vector_is_compared_as_it_is() -> None:
    loss = made((8,))
    (x,) = features((8,))
    expected = similarity_to_labels(loss.maps[0](x), LABELS, 3)
    torch.testing.assert_close(loss(x, labels=LABELS)["similarity"], 0.99 * expected)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 5, 6), {}),
        ((5, 6, 4), {"layout": "nhwc"}),
        ((7, 8), {}),
        ((4, 2, 3, 3), {}),
        ((8,), {}),
    ],
    ids=str,
)
def test_every_feature_trains_all_of_it(shape: tuple[int, ...], options: dict[str, object]) -> None:
    loss = made(shape, **options)
    (x,) = features(shape)
    x.requires_grad_()
    sum(loss(x, labels=LABELS).values()).backward()  # type: ignore[union-attr]
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in loss.parameters())
    assert loss.logits(x).shape == (6, 3)


def test_several_tensors_are_compared_together_whatever_their_batch_dimension() -> None:
    loss = made((7, 8), (2, 8), batch_dims=(0, 1))
    tokens, state = torch.randn(6, 7, 8), torch.randn(2, 6, 8)
    terms = loss(tokens, state, labels=LABELS, mask=torch.ones(6, 7, dtype=torch.int64))
    assert all(term.isfinite() for term in terms.values())


def test_the_channels_of_a_map_with_them_last_are_the_same() -> None:
    first, last = made((4, 5, 6)), made((5, 6, 4), layout="nhwc")
    last.load_state_dict(first.state_dict())
    (x,) = features((4, 5, 6))
    torch.testing.assert_close(
        first(x, labels=LABELS), last(x.movedim(1, -1), labels=LABELS)
    )  # fmt: skip


def test_a_weight_outside_0_and_1_is_refused() -> None:
    with pytest.raises(MethodError, match=r"option similarity is 1.5; it must be a weight from 0"):
        made((8,), similarity=1.5)
