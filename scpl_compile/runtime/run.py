"""A run of an emitted program: its directory, progress, metrics, checkpoints and result."""

import json
import shutil
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, Self

import torch

from scpl_compile.errors import ProgramError, ScplError, TrainingError
from scpl_compile.ir import Plan
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime.data import Batch, Loader
from scpl_compile.runtime.datasets import open_splits
from scpl_compile.runtime.lane import split_devices
from scpl_compile.runtime.options import Options
from scpl_compile.runtime.program import read_plan
from scpl_compile.runtime.progress import Progress, say
from scpl_compile.runtime.trainer import Evaluation, Trainer
from scpl_compile.version import __version__

__all__ = ["Run", "evaluation_facts", "launch", "open_loader", "versions"]

_COMPARED = ("data", "augment", "batch_size", "epochs", "steps", "optimizer", "lr", "lr_schedule",
             "seed", "threads_per_stage")  # fmt: skip
"""Options that a resumed run must share with the run that it continues."""


def launch(main: Callable[[], None]) -> None:
    """Run `main`; an error of ours becomes one sentence on stderr and exit code 1.

    Where a stage's worker failed, its own traceback comes first. A warning is one line.
    """
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *place: say(f"warning: {message}")
        try:
            main()
        except ScplError as error:
            cause = error.__cause__
            if isinstance(error, TrainingError) and not isinstance(cause, (OSError, NoneType)):
                traceback.print_exception(cause)
            say(f"error: {error}")
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            say("interrupted; --resume goes on from the last checkpoint, if --save-every made one")
            raise SystemExit(130) from None


def versions() -> dict[str, str]:
    """Versions of all that a result depends on."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"scpl_compile": __version__, "torch": str(torch.__version__), "python": python}


def open_loader(
    plan: Plan, data: str, *, batch_size: int, augment: str = "none", seed: int = 0
) -> Loader:
    """The data set `data`, fitted to the plan's inputs.

    A last training batch of one sample is left out: BatchNorm refuses it, and it has no pair.
    """
    splits = open_splits(data, inputs=plan.inputs, num_classes=plan.num_classes)
    num_samples = len(splits.train)
    loader = Loader(
        splits,
        inputs=plan.inputs,
        num_classes=plan.num_classes,
        batch_size=batch_size,
        augment=augment,
        seed=seed,
        drop_last=num_samples > batch_size and num_samples % batch_size == 1,
    )
    if loader.fit_notice:
        say(loader.fit_notice)
    return loader


class Run:
    """What surrounds the training loop of an emitted program.

    directory: of the program. A run directory that exists is refused, unless --resume goes on from
    its newest checkpoint or --force replaces it. Files are written when training starts.

    Raises:
        ProgramError: the run directory exists, or belongs to another plan or other options; it
            cannot be written.
    """

    def __init__(self, directory: Path, options: Options) -> None:
        self.plan = read_plan(directory)
        self.options = options
        self.directory = directory / options.run_dir
        self.trainer: Trainer | None = None
        self._stack = ExitStack()
        self._progress: Progress | None = None
        self._total_steps = 0
        self._first_step = 0
        self._start = 0.0
        self._num_samples = 0
        self._num_finished = 0
        self._recent: list[deque[dict[str, float]]] = []
        self._validation: float | None = None
        self._resume_from = self._check_directory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _check_directory(self) -> Path | None:
        """The checkpoint to go on from; refuses a directory that is in the way."""
        path = self.directory
        if self.options.resume:
            newest = checkpoint.latest(path)
            if newest is None:
                raise ProgramError(
                    f"{path} has no complete checkpoint to resume from; start again with --force "
                    "and --save-every N"
                )
            self._compare_options(path)
            return newest
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            if not (path / "run.json").is_file():
                raise ProgramError(f"{path} exists and is no run; choose another --run-dir")
            if not self.options.force:
                raise ProgramError(f"{path} exists; add --resume, --force or another --run-dir")
        return None

    def _compare_options(self, path: Path) -> None:
        try:
            before = json.loads((path / "run.json").read_text(encoding="utf-8"))
            plan, options = str(before["plan"]), dict(before["options"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ProgramError(
                f"{path / 'run.json'} is damaged ({error!r}); start again with --force"
            ) from error
        if plan != self.plan.digest:
            raise ProgramError(
                f"{path} is a run of another plan ({plan[:12]}, this one is "
                f"{self.plan.digest[:12]}); resume with the program that began it, or start again "
                "with --force"
            )
        for name in _COMPARED:
            if options.get(name) != (given := getattr(self.options, name)):
                flag = f"--{name.replace('_', '-')}"
                raise ProgramError(
                    f"{path} was begun with {flag} {options.get(name)}, not {given}; resume with "
                    "the same options, or start again with --force"
                )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ProgramError(
                f"{self.directory} cannot be written ({error}); make room, or choose another "
                "--run-dir"
            ) from error

    # ------------------------------------------------------------------ before the loop

    def open_data(self) -> Loader:
        """The loader of --data; checks shapes and labels before anything is trained."""
        options = self.options
        loader = open_loader(
            self.plan,
            options.data,
            batch_size=options.batch_size,
            augment=options.augment,
            seed=options.seed,
        )
        if len(loader.splits.train) > loader.num_batches * options.batch_size:
            say(f"{options.data}: the last batch of every epoch has one sample and is left out")
        self._total_steps = options.steps or options.epochs * loader.num_batches
        return loader

    def start(self, build_trainer: Callable[..., Trainer], loader: Loader) -> Trainer:
        """The trainer with the program's options, gone on from the checkpoint where asked."""
        options = self.options
        trainer = build_trainer(
            devices=split_devices(options.devices, self.plan.num_stages),
            optimizer=options.optimizer,
            lr=options.lr,
            lr_schedule=options.lr_schedule,
            total_steps=self._total_steps,
            schedule=options.schedule,
            seed=options.seed,
            threads_per_stage=options.threads_per_stage,
        )
        self._stack.callback(trainer.close)
        self.trainer = trainer
        if self._resume_from is not None:
            trainer.load(self._resume_from)
            say(f"resumed after step {trainer.num_steps} from {self._resume_from}")
        self._write_facts()
        self._recent = [deque(maxlen=options.log_every) for _ in self.plan.stages]
        self._first_step = trainer.num_steps
        self._progress = self._stack.enter_context(Progress(self._total_steps, trainer.num_steps))
        self._start = time.perf_counter()
        return trainer

    def _write_facts(self) -> None:
        """The run directory with run.json, and without what the resumed run will do again."""
        facts = {"plan": self.plan.digest, "options": vars(self.options), "versions": versions()}
        with self._writing():
            if self._resume_from is None and self.directory.exists():
                shutil.rmtree(self.directory)  # an earlier run, or empty: _check_directory
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / "run.json").write_text(json.dumps(facts, indent=2), "utf-8")
            path = self.directory / "metrics.jsonl"
            if path.exists():
                kept = _rows_before(self._trainer.num_steps, path.read_text("utf-8"))
                path.write_text(kept, "utf-8")

    def epochs(self, loader: Loader) -> Iterator[tuple[int, int]]:
        """(epoch, first batch) until all steps are done."""
        while not self.is_done:
            yield divmod(self._trainer.num_steps, loader.num_batches)

    @property
    def _trainer(self) -> Trainer:
        assert self.trainer is not None, "start() comes first"
        return self.trainer

    @property
    def is_done(self) -> bool:
        """Whether all steps are submitted."""
        return self._trainer.num_steps >= self._total_steps

    # ------------------------------------------------------------------ in the loop

    def after_step(self, batch: Batch) -> None:
        """Looks at the losses every --log-every steps, saves every --save-every steps."""
        step, options = self._trainer.num_steps, self.options
        self._num_samples += len(batch.labels)
        is_saving = options.save_every and step % options.save_every == 0
        if (step % options.log_every == 0 or is_saving) and not self.is_done:
            self._log()
        if is_saving:
            self._trainer.save(self.directory)

    def _log(self) -> None:
        """Writes the losses of what the stages have finished, and shows their latest mean."""
        finished = self._trainer.take_losses()
        rows = [
            {"step": step, "stage": stage, "losses": losses}
            for stage, steps in enumerate(finished)
            for step, losses in steps
        ]
        self._write_metrics(rows)
        for recent, steps in zip(self._recent, finished, strict=True):
            recent.extend(losses for _, losses in steps)
        self._num_finished += len(finished[-1])
        if self._progress is not None:
            submitted = self._trainer.num_steps - self._first_step
            samples = self._num_samples * self._num_finished / max(submitted, 1)
            rate = samples / max(time.perf_counter() - self._start, 1e-9)
            self._progress.show(self._trainer.num_steps, self._losses(), rate, self._validation)

    def _losses(self) -> list[dict[str, float]]:
        """Per stage the mean of each loss over the last --log-every steps that it has finished."""
        return [_mean(list(recent)) for recent in self._recent]

    def _write_metrics(self, rows: list[dict[str, Any]]) -> None:
        with self._writing(), (self.directory / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def after_epoch(self, epoch: int, loader: Loader) -> None:
        """Accuracy on the validation split, for choosing between runs; the test split waits.

        Its time does not count as training.
        """
        if self.is_done or not loader.has_split("validation"):
            return
        self._trainer.drain()
        start = time.perf_counter()
        accuracy = self._trainer.evaluate(loader.evaluation("validation")).accuracy
        step = self._trainer.num_steps - 1
        self._write_metrics([{"step": step, "epoch": epoch, "validation_accuracy": accuracy}])
        self._validation = accuracy
        self._start += time.perf_counter() - start  # as if training had begun so much later

    # ------------------------------------------------------------------ after the loop

    def finish(self, loader: Loader) -> dict[str, Any]:
        """Drain, write final.safetensors, read the test split once, print the result."""
        trainer, options = self._trainer, self.options
        trainer.drain()
        seconds = time.perf_counter() - self._start
        self._log()
        trainer.wait_saved()
        path = self.directory / "final.safetensors"
        with self._writing():
            checkpoint.save_tensors(path, trainer.state_dict(), {"plan": self.plan.digest})
        self._stack.close()
        found = trainer.evaluate(loader.evaluation("test"))
        result: dict[str, Any] = {
            **evaluation_facts(found),
            "losses": self._losses(),
            "samples_per_second": self._num_samples / seconds,
            "seconds": seconds,
            "steps": trainer.num_steps,
            "schedule": trainer.schedule,
            "devices": [str(device) for device in trainer.devices],
            "threads_per_stage": trainer.threads_per_stage,
            "versions": versions(),
        }
        say(
            f"{100 * found.accuracy:.2f} % on the test split after {trainer.num_steps} steps, "
            f"{result['samples_per_second']:.0f} samples/s; weights in {path}"
        )
        if options.json:
            print(json.dumps(result), flush=True)
        return result


def evaluation_facts(found: Evaluation) -> dict[str, Any]:
    """accuracy, and where there are several exits the accuracy of each."""
    facts: dict[str, Any] = {"accuracy": found.accuracy, "num_samples": found.num_samples}
    if len(found.accuracies) > 1:
        facts["exit_accuracies"] = list(found.accuracies)
    return facts


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    if not rows:
        return {}
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _rows_before(num_steps: int, metrics: str) -> str:
    """The lines of metrics.jsonl before `num_steps`; a run that was killed may have torn one."""
    kept = []
    for line in metrics.splitlines(keepends=True):
        try:
            if json.loads(line)["step"] < num_steps:
                kept.append(line)
        except ValueError:
            continue
    return "".join(kept)
