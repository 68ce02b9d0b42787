"""The pipeline: a model becomes a plan, a plan becomes a program, a program trains."""

import shutil
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from scpl_compile.capture import Capture, capture, coarsen
from scpl_compile.cost import DEVICES, node_costs
from scpl_compile.emit import check_target, program_directory, write_program
from scpl_compile.errors import EmitError, ProgramError, SourceError
from scpl_compile.inputs import describe_inputs, forward_parameters
from scpl_compile.ir import InputSpec, ModelSource, Plan, Scalar
from scpl_compile.methods import make_method
from scpl_compile.methods.cuts import cut_problem, split_nodes
from scpl_compile.methods.plan import PlanFacts, build_plan
from scpl_compile.partition import Partition, partition
from scpl_compile.partition import split_at as split_where
from scpl_compile.runtime.lane import default_threads, split_devices
from scpl_compile.runtime.program import (
    Verification,
    assemble,
    load_stages,
    read_plan,
    write_verification,
)
from scpl_compile.runtime.progress import say
from scpl_compile.runtime.run import evaluation_facts, open_loader, versions
from scpl_compile.runtime.trainer import Trainer
from scpl_compile.sources import (
    Shapes,
    check_output,
    example_inputs,
    load_model,
    output_shapes,
    parse_inputs,
)
from scpl_compile.verify import verify as verify_stages

__all__ = ["Program", "compile_model", "evaluate_program", "plan_model"]

Inputs = str | Tensor | Sequence[Tensor] | Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """A plan with the graph that it was made from."""

    plan: Plan
    model: nn.Module
    capture: Capture
    stage_of: Mapping[str, int]


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


def plan_model(model: nn.Module | str, inputs: Inputs, **options: Any) -> Plan:
    """Where the model would be cut and what every stage would cost; options as compile_model."""
    return _plan(model, inputs, **options).plan


def compile_model(
    model: nn.Module | str,
    inputs: Inputs,
    *,
    out: Path | str | None = None,
    force: bool = False,
    verify: bool = True,
    **options: Any,
) -> Program:
    """Compile `model` into a program.

    Args:
        model: a module, or where it comes from ("torchvision:resnet18", "net.py:build").
        inputs: example inputs (one tensor, several, or a mapping; batch first), or their shapes
            without the batch ("3x32x32").
        out: the program's directory; None keeps it in a temporary one, to train from Python.
        force: replace a program in `out`. verify: compare the stages with the model first.
        options: num_classes (default: what the model gives), num_stages (default: the number of
            devices, else 2), split_at, devices, method, preset, options (of heads and losses),
            config (of the constructor), weights, source (where a module object comes from: needed
            for `out`), batch_size, threads_per_stage.

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
        random_stages=None, recompute_stages=None, checks={},
    )  # fmt: skip
    if verify:
        found = verify_stages(
            plan,
            planned.model,
            load_stages(directory, plan).STAGES,
            lambda batch_size: example_inputs(plan.inputs, batch_size),
            weights_sha256=sha256,
            select_output=_only_tensor,
        )
    write_verification(directory, found)
    return found


def _only_tensor(output: object) -> Tensor:
    assert isinstance(output, Tensor), "check_output has refused other outputs"
    return output


def _plan(
    model: nn.Module | str,
    inputs: Inputs,
    *,
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
    batch_size: int | None = None,
    threads_per_stage: int | None = None,
) -> _Planned:
    module, model_source, name = _resolve_model(model, source, num_classes, config, weights)
    specs, example_size = _resolve_inputs(module, inputs)
    placement = _placement(devices, num_stages, split_at)
    chosen = make_method(method, preset=preset, is_text=_is_text(specs), options=options)
    fine = capture(module, specs, batch_size=max(2, batch_size or example_size or 128))
    num_classes = check_output(
        _output_shapes(fine), num_classes=num_classes, batch_size=fine.batch_size
    )
    device = DEVICES["cuda" if placement[0].startswith("cuda") else "cpu"]
    costs = node_costs(fine, device)
    problem = cut_problem(fine, costs, chosen, num_classes, device)
    found: Partition
    if split_at:
        found = split_where(problem, split_nodes(fine, split_at))
    else:
        found = partition(problem, len(placement))
    stage_of = {name: k for k, names in enumerate(found.stages) for name in names}
    coarse, coarse_stage_of = coarsen(fine, stage_of)
    facts = PlanFacts(
        model=name,
        num_classes=num_classes,
        placement=placement,
        threads_per_stage=threads_per_stage or default_threads(len(placement)),
        optimizer={"name": "adam", "lr": 1e-3},
        solver=found.solver,
        stage_us=found.stage_us,
        lower_bound_us=found.lower_bound_us,
        opaque=fine.opaque,
        source=model_source,
        versions=versions(),
    )
    plan = build_plan(coarse, coarse_stage_of, chosen, facts)
    return _Planned(plan=plan, model=module, capture=coarse, stage_of=coarse_stage_of)


def _resolve_model(
    model: nn.Module | str,
    source: str | None,
    num_classes: int | None,
    config: Mapping[str, Scalar] | None,
    weights: Path | None,
) -> tuple[nn.Module, ModelSource | None, str]:
    """(module, where it comes from, its name)."""
    if isinstance(model, str):
        module, found = load_model(model, num_classes=num_classes, config=config, weights=weights)
        return module, found, model
    if not isinstance(model, nn.Module):
        raise SourceError(
            f"the model is of type {type(model).__name__}; give an nn.Module, or name a callable: "
            "'file.py:build'"
        )
    if weights is not None:
        raise SourceError("weights= goes with a model that is named; load them into your object")
    if source is None:
        if config:
            raise SourceError("config= goes with a model that is named, or with source=")
        return model, None, type(model).__name__
    again, found = load_model(source, num_classes=num_classes, config=config)
    given, built = _traits(model), _traits(again)
    if odd := sorted(
        name for name in given.keys() | built.keys() if given.get(name) != built.get(name)
    ):
        raise SourceError(
            f"source {source!r} builds another model than the one given: they differ in {odd[0]!r} "
            f"({given.get(odd[0], 'absent')}, built: {built.get(odd[0], 'absent')}); do in the "
            "callable what was done to the object"
        )
    return model, found, source


def _traits(model: nn.Module) -> dict[str, str]:
    """Shape, dtype and whether it trains, of every tensor of the model's state."""
    trains = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    return {
        name: f"{tuple(value.shape)} {value.dtype}{'' if name in trains else ', does not train'}"
        for name, value in model.state_dict().items()
    }


def _resolve_inputs(model: nn.Module, inputs: Inputs) -> tuple[tuple[InputSpec, ...], int | None]:
    """(specs, batch size of the examples or None)."""
    if isinstance(inputs, str):
        return parse_inputs(inputs, forward_parameters(model)), None
    return describe_inputs(model, inputs)


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


def _output_shapes(found: Capture) -> Shapes:
    """What the model gives, for check_output, with its dicts and tuples."""

    def described(node: fx.Node) -> Tensor | None:
        meta = node.meta["tensor"]
        return None if meta is None else torch.empty(meta.shape, device="meta")

    return output_shapes(fx.map_arg(found.graph.output_node().args[0], described))


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
) -> dict[str, Any]:
    """Accuracy of a program's trained weights (RUN/final.safetensors, or `weights`) on `data`.

    devices: the stages run one after another on these; "auto": GPUs where there are any.

    Raises:
        ProgramError: the program or its weights are missing or damaged.
    """
    plan = read_plan(directory)
    path = weights or directory / run_dir / "final.safetensors"
    if not path.is_file():
        raise ProgramError(
            f"{path} is missing; train first: python {directory / 'train.py'}, or name "
            "--run-dir or --weights"
        )
    stages = load_stages(directory, plan)
    loader = open_loader(plan, data, batch_size=batch_size)
    names = split_devices(devices, plan.num_stages)
    with stages.build_trainer(devices=names, weights=path) as trainer:
        start = time.perf_counter()
        found = trainer.evaluate(loader.evaluation(split))
        seconds = time.perf_counter() - start
        how = {
            "schedule": trainer.schedule,
            "devices": [str(device) for device in trainer.devices],
            "threads_per_stage": trainer.threads_per_stage,
        }
    return {
        **evaluation_facts(found),
        "losses": [{"cross_entropy": loss} for loss in found.losses],
        "samples_per_second": found.num_samples / seconds,
        "seconds": seconds,
        **how,
        "data": data,
        "split": split,
        "weights": str(path),
        "versions": versions(),
    }
