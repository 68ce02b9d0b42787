"""Accuracy and cross entropy over batches are those of all samples at once."""

import pytest
import torch
import torch.nn.functional as F

from scpl_compile.errors import DataError
from scpl_compile.runtime.evaluation import Tally


def test_batches_of_any_size_add_up() -> None:
    exits = [torch.randn(11, 4), torch.randn(11, 4).bfloat16()]
    labels = torch.randint(4, (11,))
    tally, start = Tally(), 0
    for size in (5, 1, 5):
        part = slice(start, start := start + size)
        tally.add([logits[part] for logits in exits], labels[part])
    found = tally.result()
    assert found.num_samples == 11
    for logits, accuracy, loss in zip(exits, found.accuracies, found.losses, strict=True):
        assert accuracy == float((logits.argmax(-1) == labels).sum()) / 11
        expected = F.cross_entropy(logits.double(), labels)
        assert loss == pytest.approx(float(expected), rel=1e-5)
    assert found.accuracy == found.accuracies[-1]


def test_of_nothing_there_is_no_accuracy() -> None:
    with pytest.raises(DataError, match="there is no sample to evaluate on"):
        Tally().result()


def test_of_several_labels_each_counts_and_the_samples_that_are_all_right() -> None:
    exits = [torch.randn(11, 4), torch.randn(11, 4).bfloat16()]
    labels = torch.randn(11, 4) > 0
    labels[:3] = exits[0][:3] > 0
    tally, start = Tally(), 0
    for size in (5, 1, 5):
        part = slice(start, start := start + size)
        tally.add([logits[part] for logits in exits], labels[part])
    found = tally.result()
    for i, logits in enumerate(exits):
        is_right = (logits > 0) == labels
        assert found.accuracies[i] == pytest.approx(float(is_right.double().mean()))
        assert found.exact_matches[i] == float(is_right.all(1).double().mean())
        expected = F.binary_cross_entropy_with_logits(logits.double(), labels.double())
        assert found.losses[i] == pytest.approx(float(expected), rel=1e-5)
    assert found.exact_matches[0] >= 3 / 11 and len(set(tally.sums)) == 4


def test_of_one_label_no_exact_matches_are_told() -> None:
    tally = Tally()
    tally.add([torch.eye(3)], torch.arange(3))
    assert tally.result().exact_matches == () and tally.result().accuracy == 1
