"""The methods by name, and the presets of their options."""

from collections.abc import Mapping

from scpl_compile.errors import MethodError
from scpl_compile.ir import Scalar
from scpl_compile.methods.base import Method
from scpl_compile.methods.bp import Backpropagation
from scpl_compile.methods.early_exit import EarlyExit, check_options
from scpl_compile.methods.scpl import Scpl
from scpl_compile.runtime.loss_options import PAPER, LossOptions

__all__ = ["LAST", "METHODS", "PRESETS", "make_method"]

METHODS = ("scpl", "bp", "early_exit")
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

    preset "paper" is the released algorithm (paper.md section 1). options: those of LossOptions,
    and `last` ("through" or "released").

    Raises:
        MethodError: an unknown name, preset or option, or one that the method has no use for.
    """
    if name not in METHODS:
        raise MethodError(f"method {name!r} is not one of {', '.join(METHODS)}")
    if preset not in PRESETS:
        raise MethodError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
    chosen: dict[str, Scalar] = {"last": "through"}
    if preset == "paper":
        chosen = {"last": "released", **PAPER["text" if is_text else "vision"]}
    chosen.update(options or {})
    last = str(chosen.pop("last"))
    if last not in LAST:
        raise MethodError(f"option last is {last!r}; it must be one of {', '.join(LAST)}")
    if name == "bp":
        if options:
            raise MethodError(
                f"method 'bp' has no local loss, so no option {next(iter(options))!r}; methods "
                "scpl and early_exit have"
            )
        return Backpropagation()
    loss_options = LossOptions.from_options(chosen)
    if name == "early_exit":
        check_options(options or {})
    return Scpl(loss_options, last) if name == "scpl" else EarlyExit(loss_options, last)
