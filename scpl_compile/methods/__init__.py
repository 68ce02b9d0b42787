"""The methods by name, and the presets of their options."""

from collections.abc import Mapping

from scpl_compile.errors import MethodError
from scpl_compile.ir import Scalar
from scpl_compile.methods.base import Method
from scpl_compile.methods.bp import Backpropagation
from scpl_compile.methods.early_exit import EarlyExit, check_options
from scpl_compile.methods.scpl import Scpl
from scpl_compile.runtime.loss_options import PAPER, LossOptions

__all__ = ["BP_SCHEDULES", "LAST", "METHODS", "PRESETS", "make_method"]

METHODS = ("scpl", "bp", "early_exit")
BP_SCHEDULES = ("gpipe", "1f1b", "zb", "ddp")
"""Schedules of backpropagation that may stand for a method, as `--method gpipe`."""
PRESETS = ("default", "paper")
LAST = ("through", "released")


def make_method(
    name: str,
    *,
    preset: str = "default",
    is_text: bool = False,
    options: Mapping[str, Scalar] | None = None,
) -> Method:
    """The method `name` with the options of `preset`, overridden by `options`.

    The name of one of BP_SCHEDULES is bp with that schedule.

    preset "paper" is the released algorithm (paper.md section 1). options: those of LossOptions,
    and `last` ("through" or "released").

    Raises:
        MethodError: an unknown name, preset or option, or one that the method has no use for.
    """
    if name not in (*METHODS, *BP_SCHEDULES):
        known = ", ".join((*METHODS, *BP_SCHEDULES))
        raise MethodError(f"method {name!r} is not one of {known}")
    if preset not in PRESETS:
        raise MethodError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
    chosen: dict[str, Scalar] = {"last": "through"}
    if preset == "paper":
        chosen = {"last": "released", **PAPER["text" if is_text else "vision"]}
    chosen.update(options or {})
    last = str(chosen.pop("last"))
    if last not in LAST:
        raise MethodError(f"option last is {last!r}; it must be one of {', '.join(LAST)}")
    if name == "bp" or name in BP_SCHEDULES:
        if options:
            raise MethodError(
                f"method {name!r} has no local loss, so no option {next(iter(options))!r}; methods "
                "scpl and early_exit have"
            )
        return Backpropagation(name)
    loss_options = LossOptions.from_options(chosen)
    if name == "early_exit":
        check_options(options or {})
    return Scpl(loss_options, last) if name == "scpl" else EarlyExit(loss_options, last)
