"""The modules that a stage's own loss may be, by the kind that a plan records.

Such a module is built from `num_classes`, `in_shapes` (of the tensors that it reads, each without
its batch dimension), `batch_dims` where one is not 0, and its options; it is called with these
tensors, `labels` (B,), or of task multi-label bool (B, num_classes), and, where the plan says so,
`mask`, and gives its terms by name, scalars whose sum is the stage's loss. Where the stage has an
exit, `logits` of the tensors (and the mask) gives (B, num_classes). One of scpl_compile's own that
gives a code of the labels to the next stage gives it beside the terms, and takes that of the stage
before as `code`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from scpl_compile import ir
from scpl_compile.runtime.association import Association
from scpl_compile.runtime.loading import load_callable
from scpl_compile.runtime.losses import LocalLoss
from scpl_compile.runtime.predsim import PredSim

__all__ = ["LOSS_CLASSES", "build_loss", "loss_class"]

LOSS_CLASSES: Mapping[str, type[nn.Module]] = MappingProxyType(
    {"local": LocalLoss, "predsim": PredSim, "al": Association}
)  # fmt: skip


def loss_class(loss: ir.LocalLoss) -> type[nn.Module]:
    """The class of the module that `loss` is.

    Raises:
        SourceError: the user's own file is missing, or has changed.
    """
    if loss.source is None:
        return LOSS_CLASSES[loss.kind]
    found: type[nn.Module] = load_callable(
        loss.source.path, loss.source.name, loss.source.sha256
    )  # fmt: skip
    return found


def build_loss(loss: ir.LocalLoss, num_classes: int) -> nn.Module:
    """The module, with new weights."""
    more: dict[str, Any] = dict(loss.options)
    if any(loss.batch_dims):
        more["batch_dims"] = loss.batch_dims
    return loss_class(loss)(num_classes=num_classes, in_shapes=loss.in_shapes, **more)
