"""SCPL, Supervised Contrastive Parallel Learning (arXiv 2602.00062).

Each stage trains on the contrastive loss of its own output. The last stage is trained in one of
two ways: `released`, contrastive as well, with the model's classifier on a detached feature; or
`through`, by the cross entropy of the model's own logits.
"""

from scpl_compile.methods.local import LocalMethod

__all__ = ["Scpl"]


class Scpl(LocalMethod):
    """Local contrastive losses, with cross entropy beside them where the options say so."""

    name = "scpl"
