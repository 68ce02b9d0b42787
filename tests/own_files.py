"""Files with a method of one's own and its loss, as a user writes them, over vectors (B, width)."""

from pathlib import Path

import torch
from torch import nn

_TEXT = """
import torch
import torch.nn.functional as F
from torch import nn

from scpl_compile.methods import Method, cross_entropy_loss, module_loss


class Loss(nn.Module):
    def __init__(self, *, num_classes, in_shapes, **options):
        super().__init__()
        self.classifier = nn.Linear(in_shapes[0][-1], num_classes)
        {init}

    def logits(self, x, mask=None):
        return {logits}

    def forward(self, x, labels, mask=None):
        logits = self.logits(x)
        {body}
        return {terms}


class Mine({base}):
    name = "mine"
    {attributes}

    def losses(self, view):
        {losses}
        return (cross_entropy_loss(view),) if view.is_last else (
            module_loss(Loss, view.sends, view, {options}),)

    def inference(self, num_stages):
        return {steps}
"""
_PARTS = {
    "init": "",
    "logits": "self.classifier(x)",
    "body": "",
    "terms": '{"own": F.cross_entropy(logits, labels)}',
    "base": "Method",
    "attributes": "",
    "losses": "",
    "options": "{}",
    "steps": "super().inference(num_stages)",
}
EXITS = "[s for k in range(num_stages) for s in (f'{k}F', f'{k}X')][:-1]"
"""The steps of inference with an exit in every stage."""


def own_file(folder: Path, **parts: str) -> str:
    """The method of a new file in `folder`; parts: of the text, other than the plain ones."""
    path = folder / "mine.py"
    path.write_text(_TEXT.format(**{**_PARTS, **parts}))
    return f"{path}:Mine"


def layers() -> nn.Module:
    """(B, 8) to (B, 3), as wide at every place but the last."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(),
        nn.Linear(8, 3),
    )  # fmt: skip
