"""A method of the user's own: a subclass of Method in a file, and what its attributes may be.

They are looked at here, because a program is trained by what they say: one that says what no
schedule does would compile, and never run.
"""

from collections.abc import Sequence

from scpl_compile.errors import MethodError
from scpl_compile.ir import TASKS
from scpl_compile.methods.base import PRESETS, Method
from scpl_compile.runtime.loading import load_callable
from scpl_compile.runtime.schedules import DECOUPLED, JOINED

__all__ = ["check_method", "load_method"]


def load_method(spec: str, taken: Sequence[str]) -> type[Method]:
    """The class that `file.py:Class` names; taken: names that are of other methods.

    Raises:
        MethodError: it is no subclass of Method, or has no name of its own, or odd presets.
        SourceError: the file is missing, or fails.
    """
    path, _, name = spec.rpartition(":")
    found = load_callable(path, name)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise MethodError(
            f"{spec} is no subclass of scpl_compile.methods.Method, which has losses(view)"
        )
    own = getattr(found, "name", "")
    is_name = isinstance(own, str) and own.isidentifier()
    if not is_name or own in taken:
        raise MethodError(
            f"{spec} has the name {own!r}; give the class a `name` of its own, an identifier"
        )
    _check_names(spec, "presets", found.presets, PRESETS)
    return found


def check_method(method: Method, spec: str) -> None:
    """Raises MethodError where an attribute of the method is none that a program can have."""
    if not isinstance(method, Method):
        raise MethodError(f"make() of {spec} gives {method!r:.60}; it must give a method")
    _check_names(spec, "tasks", method.tasks, TASKS)
    for name in ("detach", "leaves_classifier"):
        value = getattr(method, name)
        if not isinstance(value, bool):
            raise MethodError(f"{spec} has {name} = {value!r:.60}; it must be True or False")
    schedule = method.schedule
    allowed: Sequence[str] = DECOUPLED if method.detach else JOINED
    if schedule in allowed:
        return
    text = f"{spec} has schedule = {schedule!r:.60}"
    one_of = f"one of {', '.join(allowed)}"
    if schedule not in (*DECOUPLED, *JOINED):
        raise MethodError(f"{text}; with detach = {method.detach} it must be {one_of}")
    why = (
        "and stops gradients at the cuts, which that schedule sends back; set `detach = False`"
        if method.detach
        else "and detach = False, so gradients cross the cuts, which that schedule does not send "
        "back; leave `detach` out"
    )
    raise MethodError(f"{text} {why}, or let the schedule be {one_of}")


def _check_names(spec: str, name: str, value: object, known: Sequence[str]) -> None:
    """Whether an attribute is a tuple of some of the `known` names."""
    if isinstance(value, (tuple, list)) and value and all(item in known for item in value):
        return
    hint = f", as ({value!r},)" if isinstance(value, str) and value in known else ""
    raise MethodError(
        f"{spec} has {name} = {value!r:.60}; it must be a tuple of {', '.join(known)}{hint}"
    )
