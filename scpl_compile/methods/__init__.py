"""The methods by name, and the presets of their options.

One of the user's own is a subclass of `Method` in a Python file: `--method file.py:Class`.
"""

from collections.abc import Mapping
from types import MappingProxyType

from scpl_compile.errors import MethodError
from scpl_compile.ir import Scalar
from scpl_compile.methods.al import AssociatedLearning
from scpl_compile.methods.base import (
    PRESETS,
    Method,
    StageView,
    cross_entropy_loss,
    local_loss,
)
from scpl_compile.methods.bp import BP_SCHEDULES, Backpropagation
from scpl_compile.methods.dascpl import Dascpl
from scpl_compile.methods.deinforeg import DeInfoReg
from scpl_compile.methods.early_exit import EarlyExit
from scpl_compile.methods.modules import module_loss
from scpl_compile.methods.own import check_method, load_method
from scpl_compile.methods.predsim import PredSim
from scpl_compile.methods.scpl import Scpl
from scpl_compile.runtime.loss_options import LossOptions

__all__ = [
    "BP_SCHEDULES",
    "METHODS",
    "PRESETS",
    "LossOptions",
    "Method",
    "StageView",
    "cross_entropy_loss",
    "local_loss",
    "make_method",
    "module_loss",
]

METHODS: Mapping[str, type[Method]] = MappingProxyType(
    {
        cls.name: cls
        for cls in (
            Scpl,
            Backpropagation,
            EarlyExit,
            AssociatedLearning,
            PredSim,
            DeInfoReg,
            Dascpl,
        )
    }
)  # fmt: skip


def make_method(
    name: str,
    *,
    preset: str = "default",
    is_text: bool = False,
    options: Mapping[str, Scalar] | None = None,
) -> Method:
    """The method `name` with the options of `preset`, overridden by `options`.

    name: a key of METHODS; one of BP_SCHEDULES, bp with that schedule; or file.py:Class, the
    user's own. preset "paper" is the released algorithm (paper.md sections 1, 2 and 5). options:
    see the method's class.

    Raises:
        MethodError: an unknown name, preset or option, or one that the method has no use for; the
            user's own class has an attribute that is none.
        SourceError: the user's own file is missing, or fails.
    """
    if not isinstance(name, str):
        raise MethodError(
            f"method {name!r:.60} is no name; give one, as 'scpl', or file.py:Class of your own"
        )
    if preset not in PRESETS:
        raise MethodError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
    if name in BP_SCHEDULES:
        Backpropagation.make(options or {})
        return Backpropagation(name)
    if ":" in name:
        own = load_method(name, (*METHODS, *BP_SCHEDULES))
        made = own.make(options or {}, preset=preset, is_text=is_text)
        check_method(made, name)
        return made
    found = METHODS.get(name)
    if found is None:
        known = ", ".join((*METHODS, *BP_SCHEDULES))
        raise MethodError(f"method {name!r} is not one of {known}, or file.py:Class of your own")
    return found.make(options or {}, preset=preset, is_text=is_text)
