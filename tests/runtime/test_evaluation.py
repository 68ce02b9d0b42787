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
