"""A run of an emitted program: its directory, progress, metrics, checkpoints and result."""

import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch

from scpl_compile.errors import ProgramError, ScplError, TrainingError
from scpl_compile.ir import Plan
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime.data import Batch, Loader
from scpl_compile.runtime.datasets import Splits, open_splits
from scpl_compile.runtime.lane import split_devices
from scpl_compile.runtime.options import Options
from scpl_compile.runtime.program import read_plan
from scpl_compile.runtime.progress import Progress, say
from scpl_compile.runtime.trainer import Evaluation, Trainer
from scpl_compile.version import __version__

__all__ = ["Run", "launch", "open_loader", "versions"]

_COMPARED = ("data", "augment", "batch_size", "epochs", "steps", "optimizer", "lr", "lr_schedule",
             "seed", "threads_per_stage")  # fmt: skip
"""Options that a resumed run must share with the run that it continues."""


def launch(main: Callable[[], None]) -> None:
    """Run `main`; an error of ours becomes one sentence on stderr and exit code 1.

    Where a stage's worker failed, its own traceback comes first.
    """
    try:
        main()
    except ScplError as error:
        cause = error.__cause__
        if isinstance(error, TrainingError) and cause is not None:
            traceback.print_exception(cause)
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def versions() -> dict[str, str]:
    """Versions of all that a result depends on."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"scpl_compile": __version__, "torch": str(torch.__version__), "python": python}


def open_loader(
    plan: Plan, data: str, *, batch_size: int, augment: str = "none", seed: int = 0
) -> tuple[Loader, Splits]:
    """The data set `data`, fitted to the plan's inputs."""
    splits = open_splits(data, inputs=plan.inputs, num_classes=plan.num_classes)
    loader = Loader(
        splits,
        inputs=plan.inputs,
        num_classes=plan.num_classes,
        batch_size=batch_size,
        augment=augment,
        seed=seed,
    )
    if loader.fit_notice:
        say(loader.fit_notice)
    return loader, splits


class Run:
    """What surrounds the training loop of an emitted program.

    directory: of the program. A run directory that exists is refused, unless --resume goes on from
    its newest checkpoint or --force replaces it.

    Raises:
        ProgramError: the run directory exists, or belongs to another plan or other options.
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
        self._last_losses: list[dict[str, float]] = []
        self._resume_from = self._prepare_directory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _prepare_directory(self) -> Path | None:
        path = self.directory
        if self.options.resume:
            newest = checkpoint.latest(path)
            if newest is None:
                raise ProgramError(
                    f"{path} has no complete checkpoint to resume from; start without --resume, "
                    "with --save-every"
                )
            self._compare_options(path)
            return newest
        if path.exists() and any(path.iterdir()):
            if not self.options.force:
                raise ProgramError(f"{path} exists; add --resume, --force or another --run-dir")
            shutil.rmtree(path)
        return None

    def _compare_options(self, path: Path) -> None:
        try:
            before = json.loads((path / "run.json").read_text())
        except (OSError, ValueError) as error:
            raise ProgramError(f"{path / 'run.json'} is damaged: {error}") from error
        if before.get("plan") != self.plan.digest:
            raise ProgramError(
                f"{path} is a run of another plan ({str(before.get('plan'))[:12]}, this one is "
                f"{self.plan.digest[:12]}); resume with the program that began it"
            )
        for name in _COMPARED:
            if before["options"].get(name) != getattr(self.options, name):
                flag = f"--{name.replace('_', '-')}"
                raise ProgramError(
                    f"{path} was begun with {flag} {before['options'].get(name)}, not "
                    f"{getattr(self.options, name)}; resume with the same options"
                )

    # ------------------------------------------------------------------ before the loop

    def open_data(self) -> Loader:
        """The loader of --data; checks shapes and labels before anything is trained."""
        options = self.options
        loader, splits = open_loader(
            self.plan,
            options.data,
            batch_size=options.batch_size,
            augment=options.augment,
            seed=options.seed,
        )
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
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._resume_from is not None:
            trainer.load(self._resume_from)
            say(f"resumed after step {trainer.num_steps} from {self._resume_from}")
            self._cut_metrics(trainer.num_steps)
        facts = {"plan": self.plan.digest, "options": vars(options), "versions": versions()}
        (self.directory / "run.json").write_text(json.dumps(facts, indent=2))
        self._first_step = trainer.num_steps
        self._progress = self._stack.enter_context(Progress(self._total_steps, trainer.num_steps))
        self._start = time.perf_counter()
        return trainer

    def _cut_metrics(self, num_steps: int) -> None:
        path = self.directory / "metrics.jsonl"
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(line for line in lines if json.loads(line)["step"] < num_steps))

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
        if step % options.log_every == 0 or self.is_done:
            self._log()
        if options.save_every and step % options.save_every == 0:
            self._trainer.save(self.directory)

    def _log(self) -> None:
        rows = self._trainer.take_losses()
        with (self.directory / "metrics.jsonl").open("a") as file:
            for stage, finished in enumerate(rows):
                for step, losses in finished:
                    row = {"step": step, "stage": stage, "losses": losses}
                    file.write(json.dumps(row) + "\n")
        means = [_mean([losses for _, losses in finished]) for finished in rows]
        old = self._last_losses or [{}] * len(means)
        self._last_losses = [new or before for new, before in zip(means, old, strict=True)]
        if self._progress is not None:
            rate = self._num_samples / max(time.perf_counter() - self._start, 1e-9)
            self._progress.show(self._trainer.num_steps, self._last_losses, rate)

    def after_epoch(self, epoch: int, loader: Loader) -> None:
        """Accuracy on the validation split, for choosing between runs; the test split waits."""
        if self.is_done or not loader.has_split("validation"):
            return
        found = self._trainer.evaluate(loader.evaluation("validation"))
        self._write_metric({"epoch": epoch, "validation_accuracy": found.accuracy})
        say(f"epoch {epoch}: {100 * found.accuracy:.2f} % on the validation split")

    def _write_metric(self, row: Mapping[str, Any]) -> None:
        with (self.directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": self._trainer.num_steps - 1, **row}) + "\n")

    # ------------------------------------------------------------------ after the loop

    def finish(self, loader: Loader) -> dict[str, Any]:
        """Drain, write final.safetensors, read the test split once, print the result."""
        trainer, options = self._trainer, self.options
        trainer.drain()
        seconds = time.perf_counter() - self._start
        self._log()
        trainer.wait_saved()
        path = self.directory / "final.safetensors"
        checkpoint.save_tensors(path, trainer.state_dict(), {"plan": self.plan.digest})
        self._stack.close()
        found = trainer.evaluate(loader.evaluation("test"))
        steps = trainer.num_steps - self._first_step
        result: dict[str, Any] = {
            **evaluation_facts(found),
            "losses": self._last_losses,
            "samples_per_second": self._num_samples / seconds if steps else 0.0,
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
