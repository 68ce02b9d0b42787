"""The options of an emitted program: its flat constants, as the command line changes them."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scpl_compile.errors import MethodError
from scpl_compile.runtime.learning_rate import parse_lr_schedule
from scpl_compile.runtime.optim import read_options
from scpl_compile.runtime.step_options import StepOptions

__all__ = ["Options", "parse_options"]

Options = argparse.Namespace
"""The constants by name (batch_size, lr, …)."""

_LEAST = {"accumulate": 1, "batch_size": 2, "clip_norm": 0, "epochs": 1, "log_every": 1,
          "microbatches": 1, "save_every": 0, "steps": 0, "threads_per_stage": 1, "timeout": 1,
          "warmup": 0, "weight_decay": 0}  # fmt: skip
"""A batch of one sample has no positive pair, and BatchNorm no variance."""

_MOST = {"timeout": 1e6}  # seconds, eleven days; torch fails at 1e10

_CHECKS: Mapping[str, Callable[[str], object]] = {
    "amp": lambda text: StepOptions(amp=text),
    "wire_dtype": lambda text: StepOptions(wire_dtype=text),
    "lr_schedule": parse_lr_schedule,
    "optimizer_options": read_options,
}
"""What refuses the text of an option."""

_CHOICES = {
    "contrast": ("local", "global"),
    "engine": ("auto", "threads", "ranks"),
    "replicate": ("ddp", "fsdp"),
}
"""Options of which one engine alone reads the text; the other would pass over a slip in it."""


def parse_options(
    doc: str | None, constants: Mapping[str, Any], argv: Sequence[str] | None = None
) -> Options:
    """The program's constants as its command line changes them; bad usage ends with exit code 2.

    doc: of the program; its first line and the rest surround the help.
    constants: the module's globals; every lower-case bool, int, float or str is an option, in the
    order in which it stands there, and the comment behind it is its help.
    """
    head, _, epilog = (doc or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--option VALUE …]",
        description=head,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    comments = _comments(constants)
    for name, value in constants.items():
        if not name.islower() or name.startswith("_") or type(value) not in (bool, int, float, str):
            continue
        flag = f"--{name.replace('_', '-')}"
        told = [f"default {value}"] if type(value) is not bool or value else []
        help_text = "; ".join([*told, *comments.get(name, ())]).replace("%", "%%")
        if type(value) is bool:
            action = argparse.BooleanOptionalAction if value else "store_true"
            parser.add_argument(flag, action=action, default=value, help=help_text)
        else:
            kind = type(value)
            parser.add_argument(
                flag, type=kind, default=value, metavar=kind.__name__.upper(), help=help_text
            )
    options = parser.parse_args(argv)
    for name, least in _LEAST.items():
        if not (given := getattr(options, name, least)) >= least:
            parser.error(f"--{name.replace('_', '-')} is {given}; give at least {least}")
    for name, most in _MOST.items():
        if not (given := getattr(options, name, most)) <= most:
            parser.error(f"--{name.replace('_', '-')} is {given}; give at most {most:g}")
    for name, known in _CHOICES.items():
        if (chosen := getattr(options, name, known[0])) not in known:
            parser.error(f"--{name} {chosen!r} is not one of {', '.join(known)}")
    for name, check in _CHECKS.items():
        if name in options:
            try:
                check(getattr(options, name))
            except MethodError as error:
                parser.error(str(error))
    return options


def _comments(constants: Mapping[str, Any]) -> dict[str, tuple[str]]:
    """The comments behind the constants, where the program's file can be read."""
    try:
        source = Path(constants["__file__"]).read_text(encoding="utf-8")
    except (KeyError, OSError, ValueError):
        return {}
    found = re.findall(r"^(\w+) = .*?  # (.*)$", source, re.MULTILINE)
    return {name: (comment,) for name, comment in found}
