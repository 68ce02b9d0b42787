"""The edge of an emitted program: errors become sentences, and what it ran on is told."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from types import NoneType

import torch

from scpl_compile.errors import ScplError, TrainingError
from scpl_compile.runtime.allocator import keep_freed_memory
from scpl_compile.runtime.program import missing_module
from scpl_compile.runtime.progress import leads, say
from scpl_compile.version import __version__

__all__ = ["INTERRUPTED", "INTERRUPTED_CODE", "launch", "versions"]

INTERRUPTED = "interrupted; --resume goes on from the last checkpoint, if --save-every made one"
INTERRUPTED_CODE = 130
"""What a shell gives for a process that Ctrl-C has ended."""


def launch(main: Callable[[], None]) -> None:
    """Run `main`; an error of ours becomes one sentence on stderr and exit code 1.

    Where a stage's worker failed, its own traceback comes first. A warning is one line. So is a
    module that is not there, as the one that the model came from. Memory that a step frees stays
    with the process.
    """
    keep_freed_memory()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *place: say(f"warning: {message}")
        try:
            main()
        except ScplError as error:
            cause = error.__cause__
            if isinstance(error, TrainingError) and not isinstance(cause, (OSError, NoneType)):
                traceback.print_exception(cause)
            _tell(f"{error}")
            raise SystemExit(1) from None
        except ModuleNotFoundError as error:
            _tell(missing_module(error))
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            say(INTERRUPTED)
            raise SystemExit(INTERRUPTED_CODE) from None


def _tell(error: str) -> None:
    """On every rank: what reaches this place may be wrong on one host alone, before they meet."""
    place = "" if leads() else f"rank {os.environ['RANK']}: "
    print(f"error: {place}{error}", file=sys.stderr, flush=True)


def versions() -> dict[str, str]:
    """Versions of all that a result depends on."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"scpl_compile": __version__, "torch": str(torch.__version__), "python": python}
