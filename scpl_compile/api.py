"""The pipeline: a model becomes a plan, a plan becomes a program, a program trains."""

import shutil
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scpl_compile.capture import Capture, coarsen
from scpl_compile.capture.refusals import check_usable
from scpl_compile.cost import DEVICES
from scpl_compile.cutting import Captures, CutRequest, cut_model
from scpl_compile.emit import check_target, program_directory, write_program
from scpl_compile.errors import EmitError, ProgramError, SourceError
from scpl_compile.ir import SINGLE_LABEL, InputSpec, Plan, Scalar
from scpl_compile.methods import make_method
from scpl_compile.methods.plan import PlanFacts, build_plan
from scpl_compile.runtime.data_facts import DATA_FACTS
from scpl_compile.runtime.engine import while_all_rest
from scpl_compile.runtime.evaluation import evaluation_facts
from scpl_compile.runtime.lane import default_threads, split_devices
from scpl_compile.runtime.launch import versions
from scpl_compile.runtime.open_loader import open_loader
from scpl_compile.runtime.program import (
    Verification,
    assemble,
    load_stages,
    read_plan,
    untrained_notice,
    write_verification,
)
from scpl_compile.runtime.progress import say
from scpl_compile.runtime.run_directory import trained_by_another, trained_in, trained_steps
from scpl_compile.runtime.trainer import Trainer
from scpl_compile.sources import (
    Inputs,
    OutputPath,
    example_inputs,
    output_name,
    pick_output,
    resolve_inputs,
    resolve_model,
)
from scpl_compile.verify import verify as verify_stages

__all__ = ["Program", "compile_model", "evaluate_program", "plan_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """A plan with the graph that it was made from; output: where the model gives the logits."""

    plan: Plan
    model: nn.Module
    capture: Capture
    stage_of: Mapping[str, int]
    output: OutputPath


class Program:
    """A compiled program: its plan, and the directory in which its files are.

    Without `out` the directory is a temporary one that goes with this object.
    """

    def __init__(
        self, plan: Plan, directory: Path, model: nn.Module, verification: Verification
    ) -> None:
        self.plan = plan
        self.directory = directory
        self.model = model
        self.verification = verification

    def trainer(self, *, inplace: bool = False, **options: Any) -> Trainer:
        """A trainer of a copy of the model; options: those of runtime.Trainer.

        inplace: train the model object itself instead of a copy.
        """
        stages = load_stages(self.directory, self.plan)
        return assemble(
            self.directory,
            stages.build_model,
            stages.STAGES,
            model=self.model,
            inplace=inplace,
            **options,
        )


def plan_model(model: nn.Module | str, inputs: Inputs | None = None, **options: Any) -> Plan:
    """Where the model would be cut and what every stage would cost; options as compile_model."""
    with while_all_rest():
        return _plan(model, inputs, **options).plan


def compile_model(
    model: nn.Module | str,
    inputs: Inputs | None = None,
    *,
    out: Path | str | None = None,
    force: bool = False,
    verify: bool = True,
    **options: Any,
) -> Program:
    """Compile `model` into a program. Trainers of this process finish their steps first.

    Args:
        model: a module, or where it comes from ("torchvision:resnet18", "timm:resnet18",
            "hf:bert", "hf:config.json", "net.py:build").
        inputs: example inputs (one tensor, several, or a mapping; batch first), or their shapes
            without the batch ("3x32x32"). None: from the configuration of a library's model.
        out: the program's directory; None keeps it in a temporary one, to train from Python.
        force: replace a program in `out`. verify: compare the stages with the model first.
        options: num_classes (default: what the model gives), num_stages (default: the number of
            devices, else 2), split_at, devices, method, preset, options (of heads and losses),
            config (of the constructor), weights, source (where a module object comes from: needed
            for `out`), output (which of several outputs is the logits: "logits", "0"), frontend
            ("fx" or "record"; default: the first that allows a balanced cut), batch_size,
            threads_per_stage, captures (a `Captures`, to be given again with the same model: cut
            into several numbers of stages, it is traced once), task ("single-label", or
            "multi-label": any number of labels per sample, as (B, num_classes) zeros and ones).

    Raises:
        ScplError: see errors.py; nothing is left in `out`.
    """
    target = None if out is None else Path(out)
    if target is not None:
        check_target(target, force=force)
        if isinstance(model, nn.Module) and options.get("source") is None:
            raise EmitError(
                "a model given as an object trains in process; to write a program, say where its "
                "code is: source='file.py:callable' or 'package.module:callable'"
            )
    with while_all_rest():
        planned = _plan(model, inputs, **options)
        with (
            _telling_write_errors(target),
            program_directory(target, force=force, notice=say) as directory,
            _removed_on_error(directory),
        ):
            found = _fill(directory, planned, verify)
    program = Program(planned.plan, target or directory, planned.model, found)
    if target is None:
        weakref.finalize(program, shutil.rmtree, directory, ignore_errors=True)
    return program


@contextmanager
def _telling_write_errors(target: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EmitError(
            f"{target or 'a temporary directory'} cannot be written ({error}); make room, or "
            "choose another -o"
        ) from error


@contextmanager
def _removed_on_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _fill(directory: Path, planned: _Planned, verify: bool) -> Verification:
    """Write the program's files; gives what verify found."""
    plan = planned.plan
    sha256 = write_program(directory, plan, planned.capture, planned.stage_of)
    found = Verification(
        plan=plan.digest, weights_sha256=sha256, is_verified=False,
        random_stages=None, recompute_stages=None, partial_stages=None, checks={},
    )  # fmt: skip
    if verify:
        found = verify_stages(
            plan,
            planned.model,
            load_stages(directory, plan).STAGES,
            lambda batch_size: example_inputs(plan.inputs, batch_size),
            weights_sha256=sha256,
            select_output=partial(pick_output, path=planned.output),
        )
    write_verification(directory, found)
    return found


def _plan(
    model: nn.Module | str,
    inputs: Inputs | None,
    *,
    task: str = SINGLE_LABEL,
    num_classes: int | None = None,
    num_stages: int | None = None,
    split_at: Sequence[str] = (),
    devices: Sequence[str] | str | None = None,
    method: str = "scpl",
    preset: str = "default",
    options: Mapping[str, Scalar] | None = None,
    config: Mapping[str, Scalar] | None = None,
    weights: Path | None = None,
    source: str | None = None,
    output: str | None = None,
    frontend: str | None = None,
    batch_size: int | None = None,
    threads_per_stage: int | None = None,
    captures: Captures | None = None,
) -> _Planned:
    module, model_source, name = resolve_model(model, source, num_classes, config, weights, say)
    check_usable(module)
    specs, example_size = resolve_inputs(module, inputs, model_source, say)
    placement = _placement(devices, num_stages, split_at)
    chosen = make_method(method, preset=preset, is_text=_is_text(specs), options=options)
    chosen.check_task(task)
    device = DEVICES["cuda" if placement[0].startswith("cuda") else "cpu"]
    cutting = cut_model(
        module,
        CutRequest(
            inputs=specs,
            batch_size=max(2, batch_size or example_size or 128),
            output=output,
            num_classes=num_classes,
            method=chosen,
            device=device,
            num_stages=len(placement),
            split_at=tuple(split_at),
            frontend=frontend,
            task=task,
        ),
        captures,
    )
    if cutting.dropped:
        say(
            f"the logits are the output {output_name(cutting.output)}; dropped: "
            f"{', '.join(cutting.dropped)} (see --output)"
        )
    fine, found = cutting.capture, cutting.partition
    stage_of = {name: k for k, names in enumerate(found.stages) for name in names}
    coarse, coarse_stage_of = coarsen(fine, stage_of)
    facts = PlanFacts(
        model=name,
        num_classes=cutting.num_classes,
        placement=placement,
        threads_per_stage=threads_per_stage or default_threads(len(placement)),
        optimizer={"name": "adam", "lr": 1e-3},
        solver=found.solver,
        stage_us=found.stage_us,
        lower_bound_us=found.lower_bound_us,
        opaque=fine.opaque,
        source=model_source,
        versions=versions(),
        task=task,
        device=device,
    )
    plan = build_plan(coarse, coarse_stage_of, chosen, facts)
    if notice := untrained_notice(plan):
        say(notice)
    return _Planned(
        plan=plan, model=module, capture=coarse, stage_of=coarse_stage_of, output=cutting.output
    )


def _placement(
    devices: Sequence[str] | str | None, num_stages: int | None, split_at: Sequence[str]
) -> tuple[str, ...]:
    """The device of each stage; devices need not be on this machine."""
    names = split_devices(devices, 10**6) if isinstance(devices, str) else tuple(devices or ())
    if split_at and num_stages not in (None, len(split_at) + 1):
        raise SourceError(
            f"--split-at names {len(split_at)} cuts, which make {len(split_at) + 1} stages, not "
            f"{num_stages}; leave out --stages"
        )
    num_devices = 0 if devices == "auto" and names == ("cpu",) else len(names)
    num_stages = num_stages or (len(split_at) + 1 if split_at else 0) or num_devices or 2
    names = names or ("cpu",)
    if len(names) > num_stages:
        raise SourceError(f"{len(names)} devices for {num_stages} stages; name at most one each")
    for name in names:
        try:
            torch.device(name)
        except RuntimeError as error:
            raise SourceError(f"{name!r} is no device; write cpu, cuda:0, …") from error
    return tuple(names[k * len(names) // num_stages] for k in range(num_stages))


def _is_text(specs: Sequence[InputSpec]) -> bool:
    return not specs[0].dtype.startswith(("float", "bfloat"))


def evaluate_program(
    directory: Path,
    *,
    data: str,
    run_dir: str = "run",
    weights: Path | None = None,
    batch_size: int = 128,
    split: str = "test",
    devices: str = "auto",
    exit_rule: str | None = None,
    amp: str | None = None,
) -> dict[str, Any]:
    """Accuracy of a program's trained weights (RUN/final.safetensors, or `weights`) on `data`.

    Words and labels are numbered, and images normalised, by the data_facts.json beside the weights.

    devices: the stages run one after another on these; "auto": GPUs where there are any.
    exit_rule: samples leave early, as in `Trainer.evaluate`.
    amp: "none", "bf16" or "fp16"; None: as the run that wrote the weights was trained (its
    channels_last too), "none" for weights of no run of this program.
    The result's steps are those of the run that wrote the weights, None for any other file.

    Raises:
        ProgramError: the program or its weights are missing or damaged, or those of its own run
            are of another plan; with an exit_rule, those of its exits, these are of another step;
            for texts data_facts.json.
        DataError: the data do not fit; a text has a label that the run did not know.
        MethodError: the exit_rule is none, or the method has one exit; there is no such amp.
    """
    plan = read_plan(directory)
    path = weights or directory / run_dir / "final.safetensors"
    if not path.is_file():
        raise ProgramError(
            f"{path} is missing; train first: python {directory / 'train.py'}, or name "
            "--run-dir or --weights"
        )
    if other := trained_by_another(path, plan.digest):
        if weights is None:
            raise ProgramError(f"{other}; train again, or name the file with --weights")
        say(other)
    stages = load_stages(directory, plan)
    loader = open_loader(
        plan, data, batch_size=batch_size, facts=path.with_name(DATA_FACTS), trains=False
    )
    names = split_devices(devices, plan.num_stages)
    steps = trained_steps(path, plan.digest)
    how_trained = trained_in(path, plan.digest) | ({} if amp is None else {"amp": amp})
    with stages.build_trainer(devices=names, weights=path, **how_trained) as trainer:
        start = time.perf_counter()
        missing = trainer.load_exits(path.parent, steps)
        is_needed = exit_rule is not None or "0D" in plan.inference
        if missing is not None and is_needed:
            raise ProgramError(
                f"{missing} is missing, the weights of a head that inference needs: a run of "
                "train.py writes it beside final.safetensors"
            )
        found = trainer.evaluate(loader.evaluation(split), exit_rule=exit_rule)
        if missing is not None:  # only the model's own is trained
            found = replace(found, accuracies=found.accuracies[-1:], losses=found.losses[-1:])
        seconds = time.perf_counter() - start
        how = {
            "schedule": trainer.schedule,
            "devices": [str(device) for device in trainer.devices],
            "threads_per_stage": trainer.threads_per_stage,
            "amp": how_trained.get("amp", "none"),
        }
    return {
        **evaluation_facts(found),
        "losses": [{"cross_entropy": loss} for loss in found.losses],
        "samples_per_second": found.num_samples / seconds,
        "seconds": seconds,
        "steps": steps,
        **how,
        "data": data,
        "split": split,
        "weights": str(path),
        "versions": versions(),
    }
