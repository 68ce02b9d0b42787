"""A run of an emitted program: its directory, progress, metrics, checkpoints and result."""

import json
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from scpl_compile.actions import num_active
from scpl_compile.errors import ScplError
from scpl_compile.runtime.attempt import Attempt
from scpl_compile.runtime.data import Batch, Loader
from scpl_compile.runtime.data_facts import DATA_FACTS
from scpl_compile.runtime.evaluation import accuracy_text, evaluation_facts
from scpl_compile.runtime.growth import first_steps
from scpl_compile.runtime.lane import split_devices
from scpl_compile.runtime.launch import INTERRUPTED, INTERRUPTED_CODE, versions
from scpl_compile.runtime.meeting import as_posted
from scpl_compile.runtime.open_loader import open_loader
from scpl_compile.runtime.options import Options
from scpl_compile.runtime.program import read_plan, untrained_notice
from scpl_compile.runtime.progress import Progress, leads, say
from scpl_compile.runtime.ranks import Ranks, join, rank_options, wants_ranks
from scpl_compile.runtime.run_directory import Follower, RunDirectory
from scpl_compile.runtime.run_lock import RunLock
from scpl_compile.runtime.scalars import Scalars, summary_writer
from scpl_compile.runtime.schedules import check_schedule, stage_columns
from scpl_compile.runtime.stage_step import KEPT_LOSSES
from scpl_compile.runtime.termination import EXIT_CODE, Termination
from scpl_compile.runtime.trace import chrome_trace
from scpl_compile.runtime.trainer import Trainer

__all__ = ["TRAINING", "Run"]

TRAINING = ("optimizer", "optimizer_options", "weight_decay", "lr", "lr_schedule", "warmup",
            "clip_norm", "accumulate", "amp", "channels_last", "wire_dtype")  # fmt: skip
"""The options that go to the trainer as they are."""

TRACED_STEPS = 200
"""Of how many last steps --trace tells."""


class Run:
    """What surrounds the training loop of an emitted program.

    directory: of the program. A run directory that exists is refused, unless --resume goes on from
    its newest checkpoint or --force replaces it. Files are written when training starts. No other
    process can use the run directory until this one leaves the `with` block.

    A finished run that is resumed has nothing to do: its `with` block tells the result as it was
    and raises SystemExit(0).

    Raises:
        ProgramError: the run directory exists, is in use, or belongs to another plan or other
            options; it cannot be written.
    """

    def __init__(self, directory: Path, options: Options) -> None:
        self.options = options
        self.directory = directory / options.run_dir
        is_rank = wants_ranks(options.engine)
        self._ranks = self._join(directory) if is_rank else None
        self.plan = read_plan(directory)
        self.trainer: Trainer | None = None
        self._stack = ExitStack()
        self._progress: Progress | None = None
        self._total_steps = 0
        self._first_step = 0
        self._start = 0.0
        self._num_samples = 0
        self._num_finished = 0
        self._recent: list[deque[dict[str, float]]] = []
        self._metrics = threading.RLock()  # the writer of checkpoints logs too
        self._interval = (0.0, 0.0)
        self._scalars: Scalars | None = None
        self._validated: set[int] = set()
        self._validation: float | None = None
        self._lock: RunLock | None = None
        try:
            self._files = self._open_files()
        except Exception as error:
            self._end(error)
            raise

    def _join(self, directory: Path) -> Ranks:
        """Meet the other ranks, which must have been started alike."""
        given = self.options
        names = split_devices(given.devices, 10**6) if given.devices != "auto" else ()

        def columns() -> tuple[int, ...]:
            plan = read_plan(directory)
            schedule = check_schedule(plan, given.schedule, on_ranks=True)
            return stage_columns(schedule, plan.num_stages)

        options = {f"--{name.replace('_', '-')}": value for name, value in vars(given).items()}
        return join(
            columns, names or ("auto",), lambda: read_plan(directory).digest, options,
            timeout_s=given.timeout,
        )  # fmt: skip

    def _open_files(self) -> RunDirectory | Follower:
        attempt = Attempt.current()
        if self._ranks is not None:
            # An agent counts the failures of its own ranks alone.
            attempt = replace(attempt, number=self._ranks.largest("attempt", attempt.number))
        if self._ranks is not None and self._ranks.rank != 0:
            told = self._ranks.wait_for("run", dict)
            with as_posted("run"):
                return Follower(**told)
        self._lock = RunLock(self.directory)
        files = RunDirectory(self.directory, self.plan.digest, self.options, attempt)
        if self._ranks is not None:
            begun = None if files.resume_from is None else str(files.resume_from)
            self._ranks.post("run", {"resume_from": begun, "result": files.result})
        return files

    def __enter__(self) -> Self:
        if self._files.result is not None:
            say(f"{self.directory} is finished; --force starts again")
            self._tell(self._files.result)
            self._end()
            raise SystemExit(0)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None or isinstance(error, SystemExit) or self._ranks is None:
                self._stack.close()
        finally:
            self._end(error)

    def _end(self, error: BaseException | None = None) -> None:
        """Let go of the run directory and of the other ranks.

        Where there is an error they end too, and this process: rank 0 has told it, and that is all
        there is to say.
        """
        if self._lock is not None:
            self._lock.release()
        if self._ranks is None:
            return
        if isinstance(error, Exception):
            if not isinstance(error, ScplError):
                traceback.print_exception(error)
            self._ranks.fail(error)
            self._ranks.watch.exit()  # at once: a writer may wait for another rank
        if error is None or isinstance(error, SystemExit):
            self._ranks.leave()
        else:  # Ctrl-C; Python's own end would abort a thread that waits inside torch
            self._ranks.watch.exit(INTERRUPTED if leads() else "", INTERRUPTED_CODE)

    def open_data(self) -> Loader:
        """The loader of --data; checks shapes and labels before anything is trained."""
        options, begun = self.options, self._files.resume_from
        loader = open_loader(
            self.plan, options.data, batch_size=options.batch_size, augment=options.augment,
            seed=options.seed, ranks=self._ranks,
            facts=None if begun is None else begun.parent / DATA_FACTS,
        )  # fmt: skip
        rest = len(loader.splits.train) - loader.num_batches * options.batch_size
        if rest > 0:
            what = "one sample" if rest == 1 else f"{rest} samples for the replicas"
            say(f"{options.data}: the last batch of every epoch has {what} and is left out")
        self._total_steps = options.steps or options.epochs * loader.num_batches
        return loader

    def start(self, build_trainer: Callable[..., Trainer], loader: Loader) -> Trainer:
        """The trainer with the program's options, gone on from the checkpoint where asked."""
        options = self.options
        starts = first_steps(
            self.plan, getattr(options, "grow", ""), loader.num_batches, self._total_steps
        )
        trainer = build_trainer(
            devices=split_devices(options.devices, self.plan.num_stages),
            **{name: getattr(options, name) for name in TRAINING},
            total_steps=self._total_steps,
            schedule=options.schedule,
            seed=options.seed,
            threads_per_stage=options.threads_per_stage,
            starts=starts,
            trace_steps=TRACED_STEPS if options.trace else 0,
            **rank_options(self._ranks, options),
        )
        self._stack.callback(self._close_scalars)  # after the trainer, whose saver still logs
        self._stack.callback(trainer.close)
        self.trainer = trainer
        self._termination = Termination()
        self._stack.callback(self._termination.restore)
        if (path := self._files.resume_from) is not None:
            trainer.load(path)
            say(f"resumed after step {trainer.num_steps} from {path}")
        writer = summary_writer() if options.tensorboard else None
        self._recent = [deque(maxlen=options.log_every) for _ in self.plan.stages]
        for row in self._files.begin(trainer.num_steps, versions(), loader.splits.facts):
            if "losses" in row and row["stage"] < len(self._recent):
                self._recent[row["stage"]].append(row["losses"])
            elif "epoch" in row:
                self._validated.add(row["step"])
        if self._ranks is not None:  # all take part in a validation
            self._validated = set(self._ranks.from_leader("validated", list(self._validated)))
        self._first_step = trainer.num_steps
        if leads():
            if writer is not None:
                folder = self.directory / "tensorboard"
                self._scalars = Scalars(writer, folder, self._first_step)
            bar = Progress(self._total_steps, trainer.num_steps)
            self._progress = self._stack.enter_context(bar)
        self._start = time.perf_counter()
        self._restart_interval()
        return trainer

    def epochs(self, loader: Loader) -> Iterator[tuple[int, int]]:
        """(epoch, first batch) until all steps are done."""
        done = self._trainer.num_steps
        is_end = done > 0 and (self.is_done or done % loader.num_batches == 0)
        if is_end and done - 1 not in self._validated:  # killed between the two
            self.after_epoch((done - 1) // loader.num_batches, loader)
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

    def after_step(self, batch: Batch) -> None:
        """Looks at the losses every --log-every steps, saves every --save-every steps."""
        step, options = self._trainer.num_steps, self.options
        num_replicas = 1 if self._ranks is None else self._ranks.num_replicas
        self._num_samples += len(batch.labels) * num_replicas
        is_saving = options.save_every and step % options.save_every == 0
        log_every = min(options.log_every, KEPT_LOSSES // 2)
        if (step % log_every == 0 or is_saving) and not self.is_done:
            self._log()
        if is_saving:
            # A checkpoint's steps are all in metrics.jsonl, or a run that is killed and resumed
            # would lack some.
            self._trainer.save(self.directory, before_complete=self._write_losses)
        if self._termination.is_due(self._trainer.num_steps, self._ranks):
            self._end_early()

    def _end_early(self) -> None:
        """SIGTERM: a checkpoint, and the end."""
        trainer = self._trainer
        trainer.wait_saved()
        trainer.save(self.directory, before_complete=self._write_losses)
        trainer.wait_saved()
        say(f"ended by SIGTERM after step {trainer.num_steps}; --resume goes on from there")
        raise SystemExit(EXIT_CODE)

    def _write_losses(self) -> None:
        """Writes the losses of what the stages have finished. In any thread: taken is written."""
        with self._metrics:
            finished = self._trainer.take_losses()
            rate = self._trainer.learning_rate
            self._record(
                {"step": step, "stage": stage, "losses": losses, "lr": rate(step)}
                for stage, steps in enumerate(finished)
                for step, losses in steps
            )
            for recent, steps in zip(self._recent, finished, strict=True):
                recent.extend(losses for _, losses in steps)
            self._num_finished += sum(
                num_active(self._trainer.starts, step) == stage + 1
                for stage, steps in enumerate(finished)
                for step, _ in steps
            )

    def _record(self, rows: Iterable[dict[str, Any]]) -> None:
        """Adds rows to metrics.jsonl, and to TensorBoard where asked."""
        found = list(rows)
        self._files.append(found)
        if self._scalars is not None:
            self._scalars.add(found)

    def _close_scalars(self) -> None:
        if self._scalars is not None:
            self._scalars.close()

    def _restart_interval(self) -> None:
        """What the next row of the run tells of begins now."""
        self._trainer.take_usage()
        self._interval = (time.perf_counter(), self._samples_finished())

    def _samples_finished(self) -> float:
        """Samples that the last stage of their step has finished, all batches taken as equal."""
        submitted = self._trainer.num_steps - self._first_step
        return self._num_samples * self._num_finished / max(submitted, 1)

    def _write_usage(self) -> None:
        """Writes a row of the run: its rate and how each stage spent its time since the last."""
        with self._metrics:
            start, before = self._interval
            now, samples = time.perf_counter(), self._samples_finished()
            if samples <= before:
                return
            usage = self._trainer.take_usage()
            self._interval = (now, samples)
            self._record([{
                "step": self._trainer.num_steps - 1,
                "samples_per_second": (samples - before) / max(now - start, 1e-9),
                "waiting": [stage.waiting for stage in usage],
                "queue_fill": [stage.queue_fill for stage in usage],
            }])  # fmt: skip

    def _log(self) -> None:
        """Writes the losses of what the stages have finished, and shows their latest mean."""
        self._write_losses()
        self._write_usage()
        if self._progress is not None:
            rate = self._samples_finished() / max(time.perf_counter() - self._start, 1e-9)
            self._progress.show(self._trainer.num_steps, self._losses(), rate, self._validation)

    def _losses(self) -> list[dict[str, float]]:
        """Per stage the mean of each loss over the last --log-every steps that it has finished."""
        with self._metrics:
            return [_mean(list(recent)) for recent in self._recent]

    def after_epoch(self, epoch: int, loader: Loader) -> None:
        """Accuracy on the validation split, for choosing between runs; the test split waits.

        After the last epoch too, even if --steps ends within it. Its time is no training time.
        """
        self._trainer.drain()
        self._log()
        start = time.perf_counter()
        accuracy = self._trainer.evaluate(loader.evaluation("validation")).accuracy
        step = self._trainer.num_steps - 1
        with self._metrics:
            self._record([{"step": step, "epoch": epoch, "validation_accuracy": accuracy}])
        self._validation = accuracy
        self._restart_interval()
        self._start += time.perf_counter() - start  # as if training had begun so much later

    def finish(self, loader: Loader) -> dict[str, Any]:
        """Drain, write final.safetensors, read the test split once, write and print the result."""
        trainer = self._trainer
        trainer.drain()
        seconds = time.perf_counter() - self._start
        self._log()
        trainer.wait_saved()
        self._files.save_final(trainer.state_dict(), trainer.num_steps, self.plan.untrained)
        trainer.save_exits(self.directory)
        self._stack.close()
        if self.options.trace:  # now that the workers have told of their last actions too
            self._files.save_trace(chrome_trace(trainer.all_events()))
        found = trainer.evaluate(loader.evaluation("test"))
        is_trained = trainer.num_steps > self._first_step  # else all was done before the resume
        result: dict[str, Any] = {
            **evaluation_facts(found),
            "losses": self._losses(),
            "samples_per_second": self._num_samples / seconds if is_trained else None,
            "seconds": seconds,
            "steps": trainer.num_steps,
            "schedule": trainer.schedule,
            "engine": "threads" if self._ranks is None else "ranks",
            "replicas": 1 if self._ranks is None else self._ranks.num_replicas,
            "devices": [str(device) for device in trainer.devices],
            "threads_per_stage": trainer.threads_per_stage,
            "versions": versions(),
        }
        self._files.save_result(result)
        self._tell(result)
        return result

    def _tell(self, result: Mapping[str, Any]) -> None:
        rate = result.get("samples_per_second")
        say(
            f"{accuracy_text(result)} on the test split after {result['steps']} steps, "
            f"{f'{rate:.0f} samples/s; ' if rate is not None else ''}weights in {self._files.final}"
        )
        if notice := untrained_notice(self.plan):
            say(notice)
        if self.options.json and leads():
            print(json.dumps(result), flush=True)


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of the losses that the last row has; rows read from a file may have others."""
    names = rows[-1] if rows else {}
    found = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}
