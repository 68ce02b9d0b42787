"""PredSim: a local classifier beside the similarities of the samples to each other."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scpl_compile.runtime.head_spec import HeadSpec, Shapes, TensorPath, option_error, tensor_paths
from scpl_compile.runtime.heads import Projection, Trunk, in_dtype_of
from scpl_compile.runtime.losses import Gather, cross_entropy
from scpl_compile.runtime.similarity import similarity_to_labels

__all__ = ["PredSim"]


class PredSim(nn.Module):
    """The local loss of Nokland & Eidnes 2019 (arXiv 1901.06656).

    ::

        features ─┬─▶ pooling ─▶ classifier ─▶ cross entropy ─────────────────▶ "cross_entropy"
                  └─▶ 3x3 convolution ─▶ deviation over the positions ─▶ S ─▶ S of the labels?
                                                                         └────▶ "similarity"

    The convolution keeps the channels; tokens and vectors have a linear layer in its place, and a
    vector is compared as it is. The two terms have the weights 1 - similarity and similarity.

    in_shapes, batch_dims: see `heads.Trunk`. pooling, layout: see `HeadSpec`. gather: set it to
    compare the features of all replicas.

    Raises:
        MethodError: an option or a shape does not fit.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_shapes: Shapes,
        batch_dims: Sequence[int] = (),
        similarity: float = 0.99,
        pooling: str = "auto",
        layout: str = "auto",
    ) -> None:
        super().__init__()
        if not 0 <= similarity <= 1:
            raise option_error("similarity", similarity, "a weight from 0 to 1")
        spec = HeadSpec(head="identity", pooling=pooling, layout=layout)
        self._paths = tensor_paths(spec, in_shapes)
        self._batch_dims = tuple(batch_dims) or (0,) * len(self._paths)
        self._num_classes = num_classes
        self._similarity = similarity
        self.gather: Gather | None = None
        self.trunk = Trunk(spec, in_shapes, batch_dims=batch_dims)
        self.classifier = Projection("linear", self.trunk.out_features, hidden=0, out=num_classes)
        self.maps = nn.ModuleList(_map_of(path) for path in self._paths)

    def forward(
        self, *features: Tensor, labels: Tensor, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Both terms by name, each a scalar times its weight; arguments as `LocalLoss`."""
        plan = zip(features, self._paths, self._batch_dims, self.maps, strict=True)
        spread = torch.cat([_spread(x, path, dim, layer) for x, path, dim, layer in plan], dim=1)
        classes = labels
        if self.gather is not None:
            spread, classes = self.gather(spread, labels)
        similar = similarity_to_labels(spread, classes, self._num_classes)
        wrong = cross_entropy(self.logits(*features, mask=mask), labels)
        return {
            "similarity": self._similarity * similar,
            "cross_entropy": (1 - self._similarity) * wrong,
        }

    def logits(self, *features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, num_classes) of the local classifier."""
        logits: Tensor = self.classifier(self.trunk(*features, mask=mask))
        return logits


def _map_of(path: TensorPath) -> nn.Module:
    if len(path.spatial) == 2:
        return nn.Conv2d(path.channels, path.channels, 3, padding=1, bias=False)
    return nn.Linear(path.channels, path.channels, bias=False)


def _spread(x: Tensor, path: TensorPath, batch_dim: int, layer: nn.Module) -> Tensor:
    """(B, C): the deviation over the positions of what the layer makes of a feature."""
    x = in_dtype_of(x.movedim(batch_dim, 0), layer)
    if isinstance(layer, nn.Conv2d):
        x = layer(x.movedim(-1, 1) if path.channels_last else x).flatten(2)
    else:
        x = layer(x if path.channels_last else x.movedim(1, -1)).movedim(-1, 1)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.dim() == 2:
        return x
    x = x.flatten(2)
    return x[:, :, 0] if x.shape[2] == 1 else x.std(2)
