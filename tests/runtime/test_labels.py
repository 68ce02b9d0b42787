"""What labels a step takes, by the task, and how others are refused."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scpl_compile.errors import DataError
from scpl_compile.ir import MULTI_LABEL
from scpl_compile.runtime.labels import as_flags, check_labels

FLAGS = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]])


def test_one_label_per_sample_is_taken_as_it_is() -> None:
    labels = torch.tensor([2, 0, 1])
    found, notice = check_labels(labels, 6, 3)
    assert found is labels and notice == ""


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_several_labels_become_bool(dtype: torch.dtype) -> None:
    found, notice = check_labels(FLAGS.to(dtype), 6, 3, MULTI_LABEL)
    assert found.dtype == torch.bool and torch.equal(found, FLAGS.bool())
    assert notice == ""


@pytest.mark.parametrize(
    ("labels", "task", "notice"),
    [
        (torch.tensor([3, 3]), "single-label", "all labels of a batch are 3; one class teaches"),
        (torch.tensor([3]), "single-label", ""),
        (torch.ones(2, 4), MULTI_LABEL, "all samples of a batch have the same labels; that teach"),
        (torch.zeros(2, 4), MULTI_LABEL, "all samples of a batch have the same labels"),
        (torch.ones(1, 4), MULTI_LABEL, ""),
    ],
)
def test_labels_that_are_all_the_same_are_noticed(labels: Tensor, task: str, notice: str) -> None:
    found = check_labels(labels, len(labels), 4, task)[1]
    assert found.startswith(notice) and bool(found) == bool(notice)


PER_TOKEN = r"supported are one label per sample, and with --task multi-label .*; not .* per token"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([2, 3, 0]), "label 3 is out of range for 3 classes; compile with a larger"),
        (torch.tensor([2, -1, 0]), "label -1 is out of range for 3 classes"),
        (np.zeros(3, dtype=np.int64), r"must be an int64 tensor \(B,\), not ndarray"),
        (torch.zeros(3), r"must be int64 \(B,\), not torch\.float32 \(3,\)$"),
        (FLAGS, rf"must be int64 \(B,\), not torch\.int64 \(3, 3\); {PER_TOKEN}"),
        (torch.zeros(3, 7, dtype=torch.int64), rf"not torch\.int64 \(3, 7\); {PER_TOKEN}"),
        (torch.tensor([0, 1]), "3 samples have 2 labels"),
        (torch.zeros(0, dtype=torch.int64), "3 samples have 0 labels"),
    ],
)
def test_what_is_no_label_per_sample_is_refused(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_labels(labels, 3, 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.arange(3), r"must be \(B, 3\) zeros and ones \(task .*\), not torch\.int64 \(3,\)"),
        (FLAGS[:, :2], r"must be \(B, 3\) zeros and ones .* not torch\.int64 \(3, 2\)"),
        (FLAGS[None], r"not torch\.int64 \(1, 3, 3\)"),
        (FLAGS.double(), r"int64, float32 or bool zeros and ones, not torch\.float64 \(3, 3\)"),
        (FLAGS.tolist(), r"must be a tensor \(B, 3\) of 0 and 1, not list"),
        (FLAGS * 2, "label 0 of sample 0 is 2; give 1 where a sample has the label, else 0"),
        (-FLAGS, "label 0 of sample 0 is -1"),
        (FLAGS.float() / 2, r"label 0 of sample 0 is 0\.5"),
        (torch.where(FLAGS.bool(), 1.0, float("nan")), "label 1 of sample 0 is nan"),
        (FLAGS[:2], "3 samples have 2 labels"),
        (FLAGS[:0], "3 samples have 0 labels"),
    ],
)
def test_what_are_no_labels_of_several_is_refused(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_labels(labels, 3, 3, MULTI_LABEL)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float16, torch.float64])
def test_flags_of_a_file_may_be_of_any_dtype(dtype: torch.dtype) -> None:
    assert torch.equal(as_flags(FLAGS.to(dtype)), FLAGS.bool())
