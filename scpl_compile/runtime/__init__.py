"""All that an emitted program imports while it trains."""

from scpl_compile.runtime.association import Association
from scpl_compile.runtime.launch import launch
from scpl_compile.runtime.loading import load_callable
from scpl_compile.runtime.losses import LocalLoss, binary_cross_entropy, cross_entropy
from scpl_compile.runtime.options import parse_options
from scpl_compile.runtime.predsim import PredSim
from scpl_compile.runtime.program import assemble
from scpl_compile.runtime.randomness import own_draws
from scpl_compile.runtime.run import Run
from scpl_compile.runtime.stage import Part, StopGradient, cut, take
from scpl_compile.runtime.trainer import Evaluation, Trainer

__all__ = [
    "Association",
    "Evaluation",
    "LocalLoss",
    "Part",
    "PredSim",
    "Run",
    "StopGradient",
    "Trainer",
    "assemble",
    "binary_cross_entropy",
    "cross_entropy",
    "cut",
    "launch",
    "load_callable",
    "own_draws",
    "parse_options",
    "take",
]
