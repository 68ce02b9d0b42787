"""A method of one's own: one direction per class in every stage."""

import torch
import torch.nn.functional as F
from torch import nn

from scpl_compile.methods import Method, cross_entropy_loss, module_loss
from scpl_compile.runtime.head_spec import HeadSpec
from scpl_compile.runtime.heads import Trunk


class Directions(nn.Module):
    """Cross entropy of the cosines between the pooled features and a direction per class."""

    def __init__(self, *, num_classes, in_shapes, batch_dims=(), scale=8.0):
        super().__init__()
        self.pool = Trunk(HeadSpec(head="identity"), in_shapes, batch_dims=batch_dims)
        self.directions = nn.Parameter(torch.randn(num_classes, self.pool.out_features))
        self.scale = scale

    def forward(self, *features, labels, mask=None):
        pooled = self.pool(*features, mask=mask)
        cosines = F.linear(F.normalize(pooled), F.normalize(self.directions))
        return {"directions": F.cross_entropy(self.scale * cosines, labels)}


class Cosine(Method):
    """scale: of the cosines."""

    name = "cosine"

    def __init__(self, scale=8.0):
        self.scale = scale

    def losses(self, view):
        if view.is_last:
            return (cross_entropy_loss(view),)  # of the model's own logits
        return (module_loss(Directions, view.sends, view, {"scale": self.scale}),)
