"""Views of stages, as the methods see them, without a model behind."""

from dataclasses import replace

from scpl_compile.ir import TensorMeta
from scpl_compile.methods.base import Mask, StageView, Value

NUM_CLASSES = 10


def value(name: str, *shape: int, batch_dim: int | None = 0) -> Value:
    """A tensor with a gradient; `shape` with the batch."""
    meta = TensorMeta(shape=shape, dtype="float32", requires_grad=True, batch_dim=batch_dim)
    return Value(name=name, meta=meta)


FIRST = StageView(
    index=0, is_last=False, sends=(value("layer1", 8, 16, 6, 6),), mask=None, feature=None,
    output=None, num_classes=NUM_CLASSES,
)  # fmt: skip
"""A stage that ends with a feature map (B, 16, 6, 6)."""

TEXT = replace(FIRST, sends=(value("block", 8, 7, 12),), mask=Mask(name="mask", length=7))
"""A stage that ends with tokens (B, 7, 12)."""

LAST = replace(FIRST, index=1, is_last=True, sends=(), feature=value("pool", 8, 32),
               output=value("fc", 8, 10))  # fmt: skip
"""The last stage: the classifier `fc` reads `pool` (B, 32)."""
