"""From what a user names to a model, its inputs and its logits.

::

    "torchvision:resnet18"   "timm:vit_tiny_patch16_224"   "hf:bert"   "hf:config.json"   ─┐
    "net.py:build"   "package.module:build"   ─ load_model ────────────────────────────────┴▶
        nn.Module  ─ derive_inputs, or --input ─▶ InputSpec
                   ─ its output ─ choose_output ─▶ the path of the logits
"""

from scpl_compile.inputs import example_inputs, parse_inputs
from scpl_compile.sources.config import parse_config
from scpl_compile.sources.given import Inputs, resolve_inputs, resolve_model
from scpl_compile.sources.named import derive_inputs, load_model
from scpl_compile.sources.outputs import (
    OutputPath,
    check_output,
    choose_output,
    output_name,
    output_structure,
    output_tensors,
    pick_output,
)
from scpl_compile.sources.weights import load_weights

__all__ = [
    "Inputs",
    "OutputPath",
    "check_output",
    "choose_output",
    "derive_inputs",
    "example_inputs",
    "load_model",
    "load_weights",
    "output_name",
    "output_structure",
    "output_tensors",
    "parse_config",
    "parse_inputs",
    "pick_output",
    "resolve_inputs",
    "resolve_model",
]
