"""A trunk with its projection, as the contrastive losses join them, and what both cost."""

from collections.abc import Sequence

from torch import Tensor, nn

from scpl_compile.ir import Scalar
from scpl_compile.runtime.head_spec import (
    HeadSpec,
    Shapes,
    projection_flops,
    projection_parameters,
    trunk_features,
    trunk_flops,
    trunk_parameters,
)
from scpl_compile.runtime.heads import Projection, Trunk


class Head(nn.Module):
    """Trunk and projection in one module."""

    def __init__(
        self,
        head: str,
        *,
        in_shapes: Shapes,
        batch_dims: Sequence[int] = (),
        **options: Scalar,
    ) -> None:
        super().__init__()
        spec = HeadSpec.from_options({"head": head, **options}).resolve(in_shapes)
        self.trunk = Trunk(spec, in_shapes, batch_dims=batch_dims)
        self.projection = Projection(
            spec.projection, self.trunk.out_features, hidden=spec.hidden, out=spec.out
        )

    def forward(self, *features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, out); for identity (B, length of the pooled vector). mask: see Trunk."""
        vector: Tensor = self.projection(self.trunk(*features, mask=mask))
        return vector


def head_parameters(spec: HeadSpec, in_shapes: Shapes) -> int:
    """Elements of the parameters of the `Head` that `spec` describes."""
    spec = spec.resolve(in_shapes)
    width = trunk_features(spec, in_shapes)
    projection = projection_parameters(spec.projection, width, hidden=spec.hidden, out=spec.out)
    return trunk_parameters(spec, in_shapes) + projection


def head_flops(spec: HeadSpec, in_shapes: Shapes, batch_size: int) -> int:
    """Forward FLOPs of the `Head` that `spec` describes; what counts, see `trunk_flops`."""
    spec = spec.resolve(in_shapes)
    width = trunk_features(spec, in_shapes)
    projection = projection_flops(
        spec.projection, width, hidden=spec.hidden, out=spec.out, batch_size=batch_size
    )
    return trunk_flops(spec, in_shapes, batch_size) + projection
