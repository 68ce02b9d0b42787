"""Every error that scpl_compile raises on purpose.

::

    ScplError
    ├── SourceError       the model, its file, its constructor, an input or a weights file
    ├── CaptureError      the model's graph cannot be taken
    │   └── TraceError        by this frontend; another may do it
    ├── PartitionError    the graph has no such cut
    ├── MethodError       a method, loss, head or schedule does not fit the plan
    │   ├── LossError         a loss of one's own, wherever the cut is
    │   └── OwnCodeError      code of one's own fails, on the shapes of one place
    ├── EmitError         the program directory
    ├── VerifyError       the emitted stages differ from the model
    ├── ProgramError      a plan, weights or checkpoint file: damaged, foreign, another version
    ├── DataError         a data set, its shapes or its labels
    └── TrainingError     a stage failed while training

A message says what is wrong, where (node, parameter, stage), with which number, and the remedy.
Inner code raises the short fact; `context` adds the place at the edge.
"""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "CaptureError",
    "DataError",
    "EmitError",
    "LossError",
    "MethodError",
    "OwnCodeError",
    "PartitionError",
    "ProgramError",
    "ScplError",
    "SourceError",
    "TraceError",
    "TrainingError",
    "VerifyError",
    "context",
]


class ScplError(Exception):
    """Base of all errors above: one sentence for the user, exit code 1 on the command line."""


class SourceError(ScplError):
    """The model cannot be built from what the user named, or its inputs are wrong."""


class CaptureError(ScplError):
    """The model's graph cannot be taken without changing what the model does."""


class TraceError(CaptureError):
    """One frontend cannot take the graph; another one may."""


class PartitionError(ScplError):
    """The graph cannot be cut as asked."""


class MethodError(ScplError):
    """A method, local loss, head or schedule cannot be applied to this plan."""


class LossError(MethodError):
    """A method or loss of the user's own cannot be used, wherever the model is cut."""


class OwnCodeError(MethodError):
    """A method or loss of the user's own raised something; on other shapes it may not."""


class EmitError(ScplError):
    """The program directory cannot be written."""


class VerifyError(ScplError):
    """The emitted stages do not compute what the original model computes."""


class ProgramError(ScplError):
    """A file of a program or of a run is damaged, foreign, or of another version."""


class DataError(ScplError):
    """A data set is missing or does not fit the model."""


class TrainingError(ScplError):
    """A stage failed while training."""


@contextmanager
def context(place: str) -> Iterator[None]:
    """Put `place` in front of the message of any ScplError raised inside.

    Example::

        with context("stage 2 (layer3 .. layer4)"):
            ...  # MethodError("…") becomes MethodError("stage 2 (layer3 .. layer4): …")
    """
    try:
        yield
    except ScplError as error:
        raise type(error)(f"{place}: {error}") from error
