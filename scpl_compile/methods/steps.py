"""The steps of inference that a method says, checked before anything is trained.

::

    0F 0X 1F 1X … 9F             the forward of every stage in order, and behind it its exit or none
    0F 1F … 9F 9B 9D 8D … 0D     Associated Learning: forward, the last bridge, back to the labels
"""

import re
from collections.abc import Sequence

from scpl_compile.errors import MethodError, OwnCodeError, ScplError
from scpl_compile.ir import LocalLoss
from scpl_compile.methods.base import Method, line_of
from scpl_compile.methods.modules import check_exit

__all__ = ["inference_of"]

_END = ""

Losses = Sequence[Sequence[LocalLoss]]
"""Of every stage."""


def inference_of(
    method: Method, losses: Losses, num_classes: int, batch_size: int
) -> tuple[str, ...]:
    """What `method` says of inference over stages with these losses, whoever wrote it.

    Raises:
        MethodError: its own, or it fails or gives something else than steps that can run one after
            another; a stage that has an exit cannot give its logits.
    """
    place = f"inference() of method {method.name!r}"
    try:
        given = method.inference(len(losses))
    except ScplError:
        raise
    except Exception as error:
        where = line_of(error, type(method))
        raise OwnCodeError(f"{place} fails: {type(error).__name__}: {error}{where}") from error
    if not isinstance(given, (tuple, list)) or not all(isinstance(step, str) for step in given):
        raise MethodError(f"{place} must give a tuple of steps, as ('0F', '1F'), not {given!r:.60}")
    done: list[str] = []
    for step in (*given, _END):
        allowed = _allowed(done, losses)
        if step not in allowed:
            after = f" after {done[-1]!r}" if done else ""
            can = " or ".join(repr(one) if one else "the end" for one in allowed)
            what = f"has the step {step!r}" if step else "ends"
            raise MethodError(f"{place} {what}{after}, where {can} must come{_why(step, losses)}")
        done.append(step)
    for step in given:
        if step.endswith("X"):
            check_exit(int(step[:-1]), _heads(losses[int(step[:-1])])[0], num_classes, batch_size)
    return tuple(given)


def _heads(losses: Sequence[LocalLoss]) -> list[LocalLoss]:
    return [loss for loss in losses if loss.has_head]


def _allowed(done: Sequence[str], losses: Losses) -> list[str]:
    """The steps that can come after those of `done`."""
    if not done:
        return ["0F"]
    last = len(losses) - 1
    k, kind = int(done[-1][:-1]), done[-1][-1]
    if kind == "B":
        return [f"{k}D"]
    if kind == "D":
        return [f"{k - 1}D"] if k else [_END]
    if k < last:
        has_exit = kind == "F" and bool(_heads(losses[k]))
        return [*([f"{k}X"] if has_exit else []), f"{k + 1}F"]
    has_exits = any(step.endswith("X") for step in done)
    has_codes = all(any(loss.kind == "al" for loss in items) for items in losses)
    return [_END, f"{k}B"] if has_codes and not has_exits else [_END]


def _why(step: str, losses: Losses) -> str:
    """What is wrong with the step wherever it stands."""
    last = len(losses) - 1
    if not step:
        return ""
    if not re.fullmatch("[0-9]+[FXBD]", step):
        return "; a step is the number of a stage and F (its forward) or X (its exit)"
    k, kind = int(step[:-1]), step[-1]
    if k > last:
        return f"; the stages are 0 to {last}"
    if kind == "X" and k == last:
        return "; the exit of the last stage is the model's own output, and needs no step"
    if kind == "X" and not _heads(losses[k]):
        return f"; stage {k} has no loss with a head to leave by"
    if kind in "BD":
        return "; B and D are of Associated Learning (al), in place of exits"
    return ""
