"""The local loss of Associated Learning: features meet a code of the labels half way."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scpl_compile.runtime.head_spec import LARGEST, HeadSpec, Shapes, option_error
from scpl_compile.runtime.heads import Trunk, in_dtype_of

__all__ = ["Association"]

_ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


class Association(nn.Module):
    """Kao & Chen 2021 (Associated Learning), Wu et al. 2022, ICLR: one component of the chain.

    ::

        stage k          features ─▶ pooling ─▶ bridge ──┐
                                                         ├─▶ "bridge", squared difference
        code k-1 ──┬────▶ encoder ─▶ code k ─┬───────────┘
        (k = 0: the labels, one-hot)         ├─▶ to stage k+1
                   └─ "autoencoder" ─ decoder ◀

    The bridge's gradient does not reach the encoder: the stage learns to give the code, the encoder
    and the decoder learn to keep what the code is of. At inference the last bridge gives a code,
    and the decoders lead it back to scores of the classes.

    in_shapes, batch_dims: see `heads.Trunk`. latent: width of a code. hidden: of the bridge.
    activation: sigmoid or tanh. is_first: the code is made of the labels. pooling, layout: see
    `HeadSpec`.

    Raises:
        MethodError: an option or a shape does not fit.
    """

    gives_code = True

    def __init__(
        self,
        *,
        num_classes: int,
        in_shapes: Shapes,
        batch_dims: Sequence[int] = (),
        latent: int = 128,
        hidden: int = 256,
        activation: str = "sigmoid",
        is_first: bool = False,
        pooling: str = "auto",
        layout: str = "auto",
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise option_error("activation", activation, f"one of {', '.join(_ACTIVATIONS)}")
        for name, width in (("latent", latent), ("hidden", hidden)):
            if type(width) is not int or not 1 <= width <= LARGEST:
                raise option_error(name, width, f"a whole number, 1 or more, {LARGEST} or less")
        spec = HeadSpec(head="identity", pooling=pooling, layout=layout)
        self.num_classes = num_classes
        self.is_first = is_first
        self.latent = latent
        width = num_classes if is_first else latent
        act = _ACTIVATIONS[activation]
        self.trunk = Trunk(spec, in_shapes, batch_dims=batch_dims)
        self.bridge = nn.Sequential(
            nn.Linear(self.trunk.out_features, hidden), act(), nn.Linear(hidden, latent)
        )
        self.encoder = nn.Sequential(nn.Linear(width, latent), act())
        self.decoder = nn.Sequential(nn.Linear(latent, width), act())

    def forward(
        self,
        *features: Tensor,
        labels: Tensor,
        code: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The two terms by name, and the code for the next stage, (B, latent).

        code: that of the stage before, (B, latent); in the first stage the labels are its place.
        """
        source = self._one_hot(labels) if code is None else code
        made = self.encoder(in_dtype_of(source, self.encoder[0]))
        given = self.associate(*features, mask=mask)
        terms = {
            "bridge": _difference(given, made.detach()),
            "autoencoder": _difference(self.decoder(made), source),
        }
        return terms, made

    def associate(self, *features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, latent): the code that the features stand for."""
        pooled = self.trunk(*features, mask=mask)
        code: Tensor = self.bridge(in_dtype_of(pooled, self.bridge[0]))
        return code

    def decode(self, code: Tensor) -> Tensor:
        """The code of the stage before of a code of this one; in the first (B, num_classes)."""
        source: Tensor = self.decoder(in_dtype_of(code, self.decoder[0]))
        return source

    def _one_hot(self, labels: Tensor) -> Tensor:
        classes = torch.arange(self.num_classes, device=labels.device)
        return in_dtype_of((labels[:, None] == classes).float(), self.encoder[0])


def _difference(given: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared difference, in float32 at least."""
    wide = torch.promote_types(given.dtype, torch.float32)
    return F.mse_loss(given.to(wide), wanted.to(wide))
