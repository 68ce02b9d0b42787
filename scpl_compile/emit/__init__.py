"""Writes a program directory: all of it, or nothing."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from itertools import count
from pathlib import Path
from string import Template

from scpl_compile.actions import (
    PIPELINES,
    SCHEDULES,
    Action,
    picture,
    pipeline_timeline,
    timeline,
)
from scpl_compile.capture import Capture
from scpl_compile.emit.layout import WIDTH, plain
from scpl_compile.emit.stages import stages_source, stamp
from scpl_compile.errors import EmitError, ScplError
from scpl_compile.ir import Plan, from_json, to_json
from scpl_compile.runtime.growth import can_grow
from scpl_compile.runtime.program import save_weights
from scpl_compile.runtime.schedules import allowed_schedules, num_ranks

__all__ = ["GENERATED", "check_target", "program_directory", "train_source", "write_program"]

_MICROBATCHES = "microbatches = 8  # of gpipe, 1f1b and zb\n"
_GROW = (
    'grow = ""  # as in 1,2: the epochs from which stages 1, 2, … take part; until then they rest\n'
)

GENERATED = (
    "__init__.py", "plan.json", "stages.py", "train.py", "verification.json", "weights.safetensors",
)  # fmt: skip
"""The files of a program; everything else in its directory is the user's (run/)."""


def train_source(plan: Plan) -> str:
    """train.py of `plan`."""
    template = Template((files(__package__) / "templates" / "train.py.txt").read_text("utf-8"))
    devices = plan.placement if len(set(plan.placement)) > 1 else plan.placement[:1]
    return template.substitute(
        stamp=stamp(plan),
        model=plain(plan.model, 50),
        method=plan.method,
        num_stages=plan.num_stages,
        num_ranks=num_ranks(plan.schedule, plan.num_stages),
        picture=_picture(plan),
        schedule=plan.schedule,
        schedules=_others(plan),
        microbatches=_MICROBATCHES if "gpipe" in allowed_schedules(plan) else "",
        grow=_GROW if can_grow(plan) else "",
        devices=",".join(devices),
        threads_per_stage=plan.threads_per_stage,
    )


def _picture(plan: Plan) -> str:
    """The schedule of the first batches, as many as fit; "" if not even one does."""
    if plan.schedule not in SCHEDULES:
        return _pipeline_picture(plan)
    for num_steps in (3, 2, 1):
        times = timeline(plan.schedule, plan.num_stages, num_steps)
        batches = f"batch {', '.join(map(str, range(num_steps)))}"
        what = f"F forward, B backward with the update, of {batches}"
        if drawn := _drawn(plan, times, what):
            return drawn
    return ""


def _pipeline_picture(plan: Plan) -> str:
    """One batch in as many micro-batches as fit; those of ddp know no stages."""
    if plan.schedule not in PIPELINES:
        return ""
    for parts in (4, 2, 1):
        times = pipeline_timeline(plan.schedule, plan.num_stages, parts)
        what = f"F forward, B backward (I of inputs, W of weights), of {parts} micro-batches"
        if drawn := _drawn(plan, times, what):
            return drawn
    return ""


def _drawn(plan: Plan, times: Mapping[Action, tuple[int, int]], what: str) -> str:
    """The schedule as text; "" where it is too wide."""
    rows = [f"    stage {k}   {row}" for k, row in enumerate(picture(times).splitlines())]
    if max(map(len, rows)) > WIDTH:
        return ""
    return "\n".join([f"\nSchedule {plan.schedule} ({what}):\n", *rows])


def _others(plan: Plan) -> str:
    """The comment behind the schedule: which others the method allows."""
    names = [name for name in allowed_schedules(plan) if name != plan.schedule]
    return f"  # or {', '.join(names)}" if names else ""


def write_program(
    directory: Path, plan: Plan, capture: Capture, stage_of: Mapping[str, int]
) -> str:
    """Write all files of the program but verification.json; gives the sha256 of the weights."""
    sha256 = save_weights(capture.model, directory / "weights.safetensors")
    (directory / "plan.json").write_text(json.dumps(to_json(plan), indent=2) + "\n", "utf-8")
    (directory / "stages.py").write_text(stages_source(plan, capture, stage_of), "utf-8")
    (directory / "train.py").write_text(train_source(plan), "utf-8")
    (directory / "__init__.py").write_text(
        f'{stamp(plan)}\n"""{plain(plan.model, 70)} in {plan.num_stages} stages."""\n\n'
        'from .stages import build_trainer\n\n__all__ = ["build_trainer"]\n',
        "utf-8",
    )
    return sha256


def check_target(target: Path, *, force: bool) -> None:
    """Raises EmitError where `target` may not be written: known before any work is done."""
    if target.exists() and not target.is_dir():
        raise EmitError(f"{target} is a file; give -o a directory")
    if not target.exists() or not any(target.iterdir()):
        return
    if not force:
        changed = " (its train.py was changed by hand)" if _is_changed_by_hand(target) else ""
        raise EmitError(f"{target} exists{changed}; choose another -o, or replace it with --force")
    if not (target / "plan.json").is_file():
        raise EmitError(f"{target} is no program, which --force could replace; choose another -o")


@contextmanager
def program_directory(
    target: Path | None, *, force: bool, notice: Callable[[str], None]
) -> Iterator[Path]:
    """A new directory to write into, that becomes `target` when the block ends without an error.

    With `force` an existing program is replaced; what the compiler did not generate stays (run/),
    and a train.py that was changed by hand stays as train.py.old. None: a temporary directory,
    which the caller removes.

    Raises:
        EmitError: the target exists and `force` is not given, or it is no program.
    """
    if target is None:
        yield Path(tempfile.mkdtemp(prefix="scpl-program-"))
        return
    check_target(target, force=force)
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        part.chmod(0o755)
        yield part
        check_target(target, force=force)
        if target.exists():
            _exchange(target, part, notice)
        else:
            os.replace(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _exchange(target: Path, part: Path, notice: Callable[[str], None]) -> None:
    """Put `part` in the place of `target`; the user's files move over or stay where they are."""
    old = part.with_name(f"{part.name}.old")
    os.replace(target, old)
    try:
        os.replace(part, target)
    except BaseException:
        os.replace(old, target)
        raise
    if _is_changed_by_hand(old):
        name = next(n for n in _old_names() if not (old / n).exists())
        shutil.copy2(old / "train.py", target / name)
        notice(f"{target / 'train.py'} was changed by hand; it is kept as {name}")
    for path in old.iterdir():
        if path.name not in (*GENERATED, "__pycache__"):
            os.replace(path, target / path.name)
    shutil.rmtree(old)


def _old_names() -> Iterator[str]:
    yield "train.py.old"
    yield from (f"train.py.old{i}" for i in count(2))


def _is_changed_by_hand(directory: Path) -> bool:
    train = directory / "train.py"
    try:
        plan = from_json(Plan, json.loads((directory / "plan.json").read_text("utf-8")))
        return train.is_file() and train.read_text("utf-8") != train_source(plan)
    except (OSError, ValueError, RecursionError, ScplError):
        return train.is_file()
