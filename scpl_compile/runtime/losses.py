"""What a stage trains on: a contrastive term and a local classifier over one trunk."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scpl_compile.errors import MethodError
from scpl_compile.ir import Scalar
from scpl_compile.kernels import supcon_loss
from scpl_compile.runtime.head_spec import Shapes
from scpl_compile.runtime.heads import Projection, Trunk
from scpl_compile.runtime.loss_options import LossOptions
from scpl_compile.runtime.similarity import deinforeg

__all__ = ["Gather", "LocalLoss", "binary_cross_entropy", "cross_entropy"]

Gather = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(features, labels) of one replica to those of all."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of (B, num_classes) logits and (B,) int64 labels, in float32 at least."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """That of every label by itself, its mean over (B, num_classes) logits and bool labels, in
    float32 at least.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


class LocalLoss(nn.Module):
    """The local loss of one stage, with the head that it needs.

    ::

        features ─▶ Trunk ─┬─▶ projection ─▶ supervised contrastive loss ─▶ "contrast"
                           │              or DeInfoReg's ────────────────▶ "deinforeg"
                           └─▶ classifier ─▶ cross entropy ───────────────▶ "cross_entropy"

    A term of weight 0 is not built: contrast alone is SCPL as released, cross entropy alone is
    the local classifier of Early Exit. Parameters are drawn from torch's default generator.

    Of labels (B, num_classes), bool, a sample has any number: those that share one are positives of
    each other, and the cross entropy is the binary one of every label.

    in_shapes, batch_dims: see `heads.Trunk`. options: see `LossOptions`. gather: set it to contrast
    the features of all replicas.

    Example::

        self.local_loss = LocalLoss(
            num_classes=10, in_shapes=((128, 8, 8),), head="conv", channels=64, hidden=256
        )
        losses = self.local_loss(layer2, labels=labels)

    Raises:
        MethodError: an option or a shape does not fit.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_shapes: Shapes,
        batch_dims: Sequence[int] = (),
        **options: Scalar,
    ) -> None:
        super().__init__()
        spec = LossOptions.from_options(options).resolve(in_shapes)
        self.options = spec
        self.gather: Gather | None = None
        self._num_classes = num_classes
        self._reads_tokens = any(len(shape) == 2 for shape in in_shapes)
        self.trunk = Trunk(spec, in_shapes, batch_dims=batch_dims)
        width, hidden = self.trunk.out_features, spec.hidden
        self.projection: Projection | None = None
        self.classifier: Projection | None = None
        if spec.contrast:
            self.projection = Projection(spec.projection, width, hidden=hidden, out=spec.out)
        if spec.cross_entropy:
            self.classifier = Projection(spec.classifier, width, hidden=hidden, out=num_classes)

    def forward(
        self, *features: Tensor, labels: Tensor, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The terms by name ("contrast" or "deinforeg", "cross_entropy"), each times its weight.

        features: one tensor per shape, batch size B, any floating dtype. labels: (B,) int64, or
        (B, num_classes) bool. mask: see `heads.Trunk`. The sum of the terms is the stage's loss.
        They are computed in float32 at least, also under autocast.
        """
        pooled = self.trunk(*features, mask=mask)
        options = self.options
        terms = {}
        if self.projection is not None:
            anchors, classes = self.projection(pooled), labels
            if self.gather is not None:
                anchors, classes = self.gather(anchors, classes)
            name = "contrast" if options.objective == "supcon" else options.objective
            terms[name] = options.contrast * self._objective(anchors, classes)
        if self.classifier is not None:
            if options.detach_classifier:
                pooled = pooled.detach()
            logits = self._classify(self.classifier, pooled)
            entropy = binary_cross_entropy if labels.dtype == torch.bool else cross_entropy
            terms["cross_entropy"] = options.cross_entropy * entropy(logits, labels)
        return terms

    def _objective(self, anchors: Tensor, labels: Tensor) -> Tensor:
        options = self.options
        if options.objective == "deinforeg":
            return deinforeg(anchors, labels, self._num_classes)
        return supcon_loss(
            anchors,
            labels,
            temperature=options.temperature,
            divisor=options.divisor,  # type: ignore[arg-type]  # LossOptions checked both
            impl=None if options.impl == "auto" else options.impl,  # type: ignore[arg-type]
        )

    def _classify(self, classifier: Projection, pooled: Tensor) -> Tensor:
        """Logits of the pooled vector; that of tokens is brought to mean 0 and variance 1.

        A pre-norm transformer never normalises what it passes from block to block; a classifier
        of that as it is made the loss of a ViT-B jump from 0.03 to 20 (Adam, 1e-3).
        """
        if self._reads_tokens:
            pooled = F.layer_norm(pooled, pooled.shape[1:])
        logits: Tensor = classifier(pooled)
        return logits

    def logits(self, *features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, num_classes) of the local classifier: the stage's exit.

        Raises:
            MethodError: cross_entropy is 0, so there is no classifier.
        """
        if self.classifier is None:
            raise MethodError("this local loss has no classifier; set cross_entropy above 0")
        return self._classify(self.classifier, self.trunk(*features, mask=mask))
