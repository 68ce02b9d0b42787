"""The options of an emitted program: its flat constants, as the command line changes them."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from scpl_compile.errors import MethodError

__all__ = ["Options", "parse_options"]

Options = argparse.Namespace
"""The constants by name (batch_size, lr, …)."""


def parse_options(
    doc: str | None, constants: Mapping[str, Any], argv: Sequence[str] | None = None
) -> Options:
    """The program's constants as its command line changes them.

    constants: the module's globals; every lower-case bool, int, float or str is an option, in the
    order in which it stands there. Exit code 2 for bad usage.
    """
    head, _, epilog = (doc or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in constants.items():
        if not name.islower() or name.startswith("_") or type(value) not in (bool, int, float, str):
            continue
        flag = f"--{name.replace('_', '-')}"
        if type(value) is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(
                flag, type=type(value), default=value, metavar=type(value).__name__.upper(),
                help=f"default {value!r}".replace("%", "%%"),
            )  # fmt: skip
    options = parser.parse_args(argv)
    for name in ("batch_size", "epochs", "log_every", "threads_per_stage"):
        if getattr(options, name, 1) < 1:
            raise MethodError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; give at least 1"
            )
    for name in ("steps", "save_every"):
        if getattr(options, name, 0) < 0:
            raise MethodError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; give 0 or more"
            )
    return options
