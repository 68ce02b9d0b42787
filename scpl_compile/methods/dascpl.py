"""DASCPL (Ho 2023, NCU): SCPL with a local classifier in every stage that does not shape it.

The classifier reads the stage's pooled output without a gradient, so the stage is trained by the
contrast alone; inference gives the logits of all stages (paper.md section 5). With `--option
detach_classifier=false` both train the stage.
"""

from types import MappingProxyType

from scpl_compile.methods.local import LocalMethod

__all__ = ["Dascpl"]


class Dascpl(LocalMethod):
    """Contrastive stages, each with an exit."""

    name = "dascpl"
    defaults = MappingProxyType({"detach_classifier": True})
    paper = MappingProxyType(
        {
            "vision": MappingProxyType(
                {"head": "mlp", "hidden": 512, "out": 1024, "pooling": "none", "classifier": "mlp"}
            ),
            "text": MappingProxyType({"head": "identity", "pooling": "mean"}),
        }
    )
    exits = True
