"""The files of a run, and whether a run may begin, go on, or is finished.

::

    RUN/run.json            plan, options and versions
        data_facts.json     words, labels, mean and std of the data (data_facts.py)
        metrics.jsonl       a row per stage and step, one per log interval, and one per epoch
        tensorboard/        the same for TensorBoard
        trace.json          what the stages did in the last steps (trace.py)
        step-00000050/      checkpoints (checkpoint.py)
        final.safetensors   the trained weights
        result.json         the result; written last
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from scpl_compile.errors import ProgramError
from scpl_compile.json_form import to_json
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime.attempt import Attempt
from scpl_compile.runtime.data_facts import DATA_FACTS, DataFacts
from scpl_compile.runtime.options import Options

__all__ = ["Follower", "RunDirectory", "trained_by_another", "trained_in", "trained_steps"]

_COMPARED = ("data", "augment", "batch_size", "epochs", "steps", "optimizer", "optimizer_options",
             "weight_decay", "lr", "lr_schedule", "warmup", "clip_norm", "accumulate",
             "microbatches", "amp", "channels_last", "wire_dtype", "contrast", "grow", "seed",
             "threads_per_stage")  # fmt: skip
"""Options that a resumed run must share with the run that it continues."""


FIRST = Attempt()
_NO_FACTS = DataFacts()


class RunDirectory:
    """The directory of a run of the plan with this digest.

    resume_from: the checkpoint to go on from. result: that of a finished run that is resumed.
    The caller holds the RunLock. Nothing is written before `begin`.

    attempt: a launch that was started again goes on with the run that it has begun, from the newest
    checkpoint, or from the start where there is none.

    Raises:
        ProgramError: it is in the way, cannot be resumed, or belongs to another plan or to other
            options.
    """

    def __init__(
        self, path: Path, plan_digest: str, options: Options, attempt: Attempt = FIRST
    ) -> None:
        self.path = path
        self.final = path / "final.safetensors"
        self.resume_from: Path | None = None
        self.result: dict[str, Any] | None = None
        self._plan_digest = plan_digest
        self._options = options
        self._attempt = attempt
        is_begun = self._is_begun()
        if is_begun or options.resume:
            self._open(may_start_again=is_begun)
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            if not (path / "run.json").is_file():
                raise ProgramError(f"{path} exists and is no run; choose another --run-dir")
            if not options.force:
                raise ProgramError(f"{path} exists; add --resume, --force or another --run-dir")

    def _is_begun(self) -> bool:
        """Whether an earlier attempt of this launch has begun this run."""
        file = self.path / "run.json"
        if not self._attempt.number or not file.is_file():
            return False
        return _read_object(file).get("launch") == self._attempt.launch

    def _open(self, *, may_start_again: bool) -> None:
        """Find where to go on."""
        self._check_contents()
        self.resume_from = checkpoint.latest(self.path)
        result = self.path / "result.json"
        is_finished = result.is_file() and self.final.is_file()
        if self.resume_from is None and not is_finished:
            if may_start_again:
                return
            raise ProgramError(
                f"{self.path} has no complete checkpoint to resume from; start again with --force "
                "and --save-every N"
            )
        self._compare_options()
        if is_finished:
            self.result = _read_object(result)
            told = [self.result.get(name) for name in ("accuracy", "steps")]
            if (rate := self.result.get("samples_per_second")) is not None:
                told.append(rate)
            if not all(_is_number(value) for value in told):
                raise ProgramError(f"{result} is damaged; start again with --force")

    def _check_contents(self) -> None:
        """Files and directories alone: through a link, a run from elsewhere would be written to
        another place, and a pipe would be waited for.
        """
        for item in self.path.rglob("*"):
            if item.is_symlink() or not (item.is_file() or item.is_dir()):
                raise ProgramError(f"{item} is no file of a run; replace it by the file itself")

    def _compare_options(self) -> None:
        path = self.path / "run.json"
        before = _read_object(path)
        plan, options = str(before.get("plan")), before.get("options")
        if not isinstance(options, dict):
            raise ProgramError(f"{path} is damaged (no options); start again with --force")
        if plan != self._plan_digest:
            raise ProgramError(
                f"{self.path} is a run of another plan ({plan[:12]}, this one is "
                f"{self._plan_digest[:12]}); resume with the program that began it, or start again "
                "with --force"
            )
        for name in _COMPARED:
            if options.get(name) != (given := getattr(self._options, name, None)):
                flag = f"--{name.replace('_', '-')}"
                raise ProgramError(
                    f"{self.path} was begun with {flag} {_shown(options.get(name))}, not "
                    f"{_shown(given)}; resume with the same options, or start again with --force"
                )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ProgramError(
                f"{self.path} cannot be written ({error}); make room, or choose another --run-dir"
            ) from error

    def _write_object(self, name: str, value: Mapping[str, Any]) -> None:
        temporary = self.path / f".{name}.part"
        temporary.write_text(json.dumps(value, indent=2), "utf-8")
        os.replace(temporary, self.path / name)

    def begin(
        self, num_steps: int, versions: Mapping[str, str], data: DataFacts = _NO_FACTS
    ) -> list[dict[str, Any]]:
        """Make the directory; of a resumed run, remove what will be done again.

        Gives the rows of metrics.jsonl of the first `num_steps` steps.
        """
        facts = {"plan": self._plan_digest, "options": vars(self._options), "versions": versions}
        if self._attempt.launch:
            facts["launch"] = self._attempt.launch
        with self._writing():
            if self.resume_from is None and self.path.exists():
                shutil.rmtree(self.path)  # an earlier run, or empty: see __init__
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "result.json").unlink(missing_ok=True)
            self._write_object("run.json", facts)
            if data != _NO_FACTS:
                self._write_object(DATA_FACTS, to_json(data))
            metrics = self.path / "metrics.jsonl"
            if not metrics.exists():
                return []
            rows = _rows_before(num_steps, metrics.read_text("utf-8", errors="replace"))
            temporary = self.path / ".metrics.jsonl.part"
            temporary.write_text(_lines(rows), "utf-8")
            os.replace(temporary, metrics)
            return rows

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to metrics.jsonl."""
        with self._writing(), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_lines(rows))

    def save_final(
        self, state: Mapping[str, Tensor], num_steps: int, untrained: Sequence[str] = ()
    ) -> None:
        """Write the trained weights, and what they are of; untrained: parameters that are not."""
        facts: dict[str, Any] = {"plan": self._plan_digest, "steps": num_steps}
        if untrained:
            facts["untrained"] = list(untrained)
        with self._writing():  # one key: the order of several is not kept in the file
            checkpoint.save_tensors(self.final, state, {"run": json.dumps(facts)})

    def save_trace(self, trace: Mapping[str, Any]) -> None:
        """Write trace.json."""
        with self._writing():
            (self.path / "trace.json").write_text(json.dumps(trace), "utf-8")

    def save_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json: the run is finished."""
        with self._writing():
            self._write_object("result.json", result)


def _shown(value: object) -> str:
    return "''" if value == "" else f"{value}"


class Follower:
    """What a rank other than rank 0 knows of the run directory; it writes nothing there but its
    stage's files of a checkpoint. The calls are those of RunDirectory.
    """

    def __init__(self, resume_from: str | None, result: dict[str, Any] | None) -> None:
        self.resume_from = None if resume_from is None else Path(resume_from)
        self.result = result
        self.final = Path()

    def begin(
        self, num_steps: int, versions: Mapping[str, str], data: DataFacts = _NO_FACTS
    ) -> list[dict[str, Any]]:
        """No rows."""
        return []

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Nothing."""

    def save_final(
        self, state: Mapping[str, Tensor], num_steps: int, untrained: Sequence[str] = ()
    ) -> None:
        """Nothing."""

    def save_trace(self, trace: Mapping[str, Any]) -> None:
        """Nothing."""

    def save_result(self, result: Mapping[str, Any]) -> None:
        """Nothing."""


def trained_steps(weights: Path, plan_digest: str) -> int | None:
    """After how many steps a run of this plan wrote `weights`; None for any other file.

    Raises:
        ProgramError: the file is missing or damaged.
    """
    facts = _written_with(weights)
    steps = facts.get("steps")
    is_ours = facts.get("plan") == plan_digest and type(steps) is int and 0 <= steps <= 2**53
    return steps if is_ours else None


def trained_by_another(weights: Path, plan_digest: str) -> str:
    """A sentence where a run of another plan wrote `weights`; "" for any other file.

    Raises:
        ProgramError: the file is missing or damaged.
    """
    facts = _written_with(weights)
    plan, untrained = facts.get("plan"), facts.get("untrained")
    if not isinstance(plan, str) or plan == plan_digest:
        return ""
    names = ", ".join(map(str, untrained)) if isinstance(untrained, list) else ""
    left = f", which left the model's own classifier untrained ({names})" if names else ""
    return f"{weights} is of a run of another plan ({plan[:12]}){left}"


def _written_with(weights: Path) -> dict[str, Any]:
    """What `save_final` wrote beside the weights; {} for any other file."""
    try:
        facts = json.loads(checkpoint.read_metadata(weights).get("run", ""))
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def trained_in(weights: Path, plan_digest: str) -> dict[str, Any]:
    """amp and channels_last of the run of this plan that wrote `weights`; {} for any other file.

    They are those of the run.json beside it.

    Raises:
        ProgramError: a file is missing or damaged.
    """
    path = weights.parent / "run.json"
    if trained_steps(weights, plan_digest) is None or not path.is_file():
        return {}
    facts = _read_object(path)
    options = facts.get("options")
    if facts.get("plan") != plan_digest or not isinstance(options, dict):
        return {}
    return {name: options[name] for name in ("amp", "channels_last") if name in options}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ProgramError(f"{path} is damaged ({error!r}); start again with --force") from error
    return value


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _rows_before(num_steps: int, metrics: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl before `num_steps`; a run that was killed may have torn one."""
    kept = []
    for line in metrics.splitlines():
        try:
            row = json.loads(line)
            if _is_row(row) and row["step"] < num_steps:
                kept.append(row)
        except (ValueError, RecursionError):
            continue
    return kept


def _is_row(row: Any) -> bool:
    """Whether it has what a run that goes on looks at."""
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        return False
    stage, losses = row.get("stage"), row.get("losses", {})
    return ("losses" not in row or (type(stage) is int and stage >= 0)) and (
        isinstance(losses, dict) and all(type(value) is float for value in losses.values())
    )


def _is_number(value: Any) -> bool:
    """Whether it can be printed as a number; Python's integers have no end."""
    return type(value) is float or (type(value) is int and abs(value) <= 2**53)
