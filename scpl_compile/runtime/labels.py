"""What labels may be, by the task of a plan.

::

    single-label   int64 (B,)                      one class per sample
    multi-label    (B, num_classes) zeros, ones    any number of labels per sample

A stage gets the second as bool: by that it knows them, as the contrastive loss does.
"""

import torch
from torch import Tensor

from scpl_compile.errors import DataError
from scpl_compile.ir import MULTI_LABEL, SINGLE_LABEL

__all__ = ["SUPPORTED", "as_flags", "check_labels"]

SUPPORTED = (
    "supported are one label per sample, and with --task multi-label (N, classes) zeros and ones; "
    "not labels per token or pixel"
)
"""For the errors of labels that are something else."""

_DTYPES = (torch.bool, torch.int64, torch.float32)


def check_labels(
    labels: Tensor, num_samples: int, num_classes: int, task: str = SINGLE_LABEL
) -> tuple[Tensor, str]:
    """The labels of a batch as stages take them, and a notice where all are the same ("": not so).

    On the host: on a device it would be an assert later.

    Raises:
        DataError: they are not what `task` asks for, `num_samples` is no multiple of their number,
            or one is out of range.
    """
    is_multi = task == MULTI_LABEL
    if not isinstance(labels, Tensor):
        what = f"a tensor (B, {num_classes}) of 0 and 1" if is_multi else "an int64 tensor (B,)"
        raise DataError(f"labels must be {what}, not {type(labels).__name__}")
    shape = _by(labels)
    if is_multi and (labels.ndim != 2 or labels.shape[1] != num_classes):
        raise DataError(
            f"labels must be (B, {num_classes}) zeros and ones (task multi-label), not {shape}"
        )
    if is_multi and labels.dtype not in _DTYPES:
        raise DataError(f"labels must be int64, float32 or bool zeros and ones, not {shape}")
    if not is_multi and (labels.ndim != 1 or labels.dtype != torch.int64):
        more = f"; {SUPPORTED}" if labels.ndim > 1 else ""
        raise DataError(f"labels must be int64 (B,), not {shape}{more}")
    if not len(labels) or not num_samples or num_samples % len(labels):
        raise DataError(f"{num_samples} samples have {len(labels)} labels")
    return _flags(labels) if is_multi else _classes(labels, num_classes)


def _classes(labels: Tensor, num_classes: int) -> tuple[Tensor, str]:
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        raise DataError(
            f"label {low if low < 0 else high} is out of range for {num_classes} classes; "
            "compile with a larger --num-classes, or mend the labels"
        )
    is_alone = low == high and len(labels) > 1
    what = "one class teaches a contrastive loss nothing"
    return labels, f"all labels of a batch are {low}; {what}" if is_alone else ""


def _flags(labels: Tensor) -> tuple[Tensor, str]:
    flags = as_flags(labels)
    is_alone = len(flags) > 1 and bool((flags == flags[0]).all())
    what = "that teaches a contrastive loss nothing"
    return flags, f"all samples of a batch have the same labels; {what}" if is_alone else ""


def as_flags(labels: Tensor) -> Tensor:
    """Zeros and ones (N, classes) of any dtype as bool.

    Raises:
        DataError: one of them is something else; names the first.
    """
    if labels.dtype == torch.bool:
        return labels
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise DataError(
            f"label {column} of sample {row} is {labels[row, column].item():g}; give 1 where a "
            "sample has the label, else 0"
        )
    return labels != 0


def _by(labels: Tensor) -> str:
    return f"{labels.dtype} {tuple(labels.shape)}"
