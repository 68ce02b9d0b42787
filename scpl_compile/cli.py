"""The command line: parses, calls the library, prints. torch is imported inside the commands, so
that `scpl --help` answers at once.
"""

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from scpl_compile.errors import ScplError
from scpl_compile.ir import TASKS
from scpl_compile.version import __version__

__all__ = ["main"]

_LIBRARIES = ("torchvision", "timm", "hf")
"""Whose models know their inputs."""


def _telling_errors(command: Callable[..., None]) -> Callable[..., None]:
    """An error of ours is one sentence on stderr and exit code 1."""

    @wraps(command)
    def run(**options: Any) -> None:
        try:
            command(**options)
        except ScplError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)

    return run


def _model_options(command: Callable[..., None]) -> Callable[..., None]:
    """What `compile` and `plan` have in common."""
    options = [
        click.argument("model"),
        click.option(
            "--input", "inputs", metavar="SPEC",
            help="Shapes without the batch: 3x32x32, or ids:int64:128<30000,mask:int64:128<2; "
                 "a library's model knows its own.",
        ),
        click.option("--output", metavar="NAME",
                     help="Which output is the logits, of several: logits, 0, …"),
        click.option("--task", type=click.Choice(TASKS), default=TASKS[0], show_default=True,
                     help="Labels per sample: one, or any number."),
        click.option("--num-classes", type=click.IntRange(min=2), metavar="N",
                     help="Default: what the model gives."),
        click.option("--stages", "num_stages", type=click.IntRange(min=1), metavar="K",
                     help="Default: the number of devices, else 2."),
        click.option("--split-at", metavar="NAME,…", help="Cut after these modules instead."),
        click.option("--devices", metavar="D,…", help="cpu,cpu or cuda:0,cuda:1 or auto."),
        click.option("--gpus", type=click.IntRange(min=1), metavar="N",
                     help="Plan for N GPUs, here or on another machine."),
        click.option("--method", default="scpl", metavar="NAME", show_default=True,
                     help="scpl, bp, early_exit, al, predsim, deinforeg, dascpl, or file.py:Class "
                          "of your own; gpipe, 1f1b, zb, ddp: bp with that schedule."),
        click.option("--preset", default="default", metavar="NAME", show_default=True,
                     help="default, or paper: scpl as released; al with its activations."),
        click.option("--option", "options", multiple=True, metavar="KEY=VALUE",
                     help="Of heads and losses: head=mlp, pooling=avg:4, temperature=0.1, …"),
        click.option("--config", default="", metavar="KEY=VALUE,…",
                     help="Arguments of the model's constructor, or hf: configuration."),
        click.option("--weights", type=click.Path(path_type=Path), metavar="FILE",
                     help="Start from this safetensors file."),
        click.option("--batch-size", default=128, show_default=True, type=click.IntRange(min=2),
                     metavar="N", help="At which costs are weighed."),
        click.option("--threads-per-stage", type=click.IntRange(min=1), metavar="N",
                     help="Default: the cores, shared among the stages."),
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _request(options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of api.compile_model that the shared options stand for."""
    if options["inputs"] is None and options["model"].split(":")[0] not in _LIBRARIES:
        raise click.MissingParameter(param_type="option", param_hint="'--input'")
    from scpl_compile.errors import context
    from scpl_compile.sources import parse_config

    gpus, devices = options.pop("gpus"), options.pop("devices")
    if gpus and devices:
        raise click.UsageError("--gpus and --devices both name the devices; give one of them")
    split_at = options.pop("split_at")
    with context("--option"):
        loss_options = parse_config(",".join(options.pop("options")))
    return {
        **options,
        "devices": tuple(f"cuda:{i}" for i in range(gpus)) if gpus else devices,
        "split_at": tuple(name.strip() for name in split_at.split(",")) if split_at else (),
        "options": loss_options,
        "config": parse_config(options.pop("config")),
    }


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Compile a PyTorch model into stages that train at the same time."""


@main.command()
@_model_options
@_telling_errors
def plan(as_json: bool, **options: Any) -> None:
    """Show where MODEL would be cut, and its cost.

    MODEL is torchvision:NAME, timm:NAME, hf:TYPE, hf:PATH/config.json, FILE.py:CALLABLE or
    PACKAGE.MODULE:CALLABLE.
    """
    request = _request(options)
    from scpl_compile.api import plan_model
    from scpl_compile.report import print_plan

    found = plan_model(**request)
    print_plan(found)
    if as_json:
        click.echo(json.dumps(_plan_object(found)))


@main.command(name="compile")
@_model_options
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Where the program is written.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace a program in DIR; DIR/run stays.")
@click.option("--verify/--no-verify", "verify", default=True, show_default=True,
              help="Compare the stages with the model first.")  # fmt: skip
@_telling_errors
def compile_(as_json: bool, **options: Any) -> None:
    """Write MODEL as a training program into DIR.

    MODEL is torchvision:NAME, timm:NAME, hf:TYPE, hf:PATH/config.json, FILE.py:CALLABLE or
    PACKAGE.MODULE:CALLABLE.
    """
    request = _request(options)
    from scpl_compile.api import compile_model
    from scpl_compile.report import print_plan

    program = compile_model(**request)
    print_plan(program.plan)
    if not request["verify"]:
        click.echo("not verified (--no-verify)", err=True)
    click.echo(f"wrote {program.directory}; try: python {program.directory}/train.py", err=True)
    if as_json:
        facts = {**_plan_object(program.plan), "directory": str(program.directory)}
        click.echo(json.dumps(facts))


def _plan_object(plan: Any) -> dict[str, Any]:
    """The plan, each stage with what a script asks for first."""
    from scpl_compile.ir import to_json
    from scpl_compile.report import plan_facts

    facts = {**to_json(plan), "digest": plan.digest}
    for stage, more in zip(facts["stages"], plan_facts(plan), strict=True):
        stage.update(more)
    return facts


@main.command(context_settings={"allow_interspersed_args": False}, options_metavar="")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@_telling_errors
def train(directory: Path, arguments: tuple[str, ...]) -> None:
    """Run DIRECTORY/train.py.

    Its options follow: scpl train DIRECTORY --epochs 2. DIRECTORY --help lists them. Stages that
    work at the same time get a process each; --engine threads keeps them in one.
    """
    from scpl_compile.train_command import run_command, train_command

    sys.exit(run_command(train_command(directory, arguments)))


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--data", default="digits", show_default=True, metavar="SPEC",
              help="As train.py takes it.")  # fmt: skip
@click.option("--run-dir", default="run", show_default=True, metavar="NAME",
              help="Of the training run.")  # fmt: skip
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE",
              help="Default: final.safetensors of the run.")  # fmt: skip
@click.option("--batch-size", default=128, show_default=True, type=click.IntRange(min=1),
              metavar="N")  # fmt: skip
@click.option("--split", default="test", show_default=True,
              type=click.Choice(["train", "validation", "test"]))  # fmt: skip
@click.option("--devices", default="auto", show_default=True, metavar="D,…")
@click.option("--exit", "exit_rule", metavar="RULE",
              help="Samples leave early: confidence:0.9 or agreement:2.")  # fmt: skip
@click.option("--amp", type=click.Choice(["none", "bf16", "fp16"]),
              help="Default: as the run was trained.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@_telling_errors
def evaluate(as_json: bool, **options: Any) -> None:
    """Tell how accurate the program in DIRECTORY is."""
    from scpl_compile.api import evaluate_program
    from scpl_compile.runtime.evaluation import accuracy_text

    result = evaluate_program(**options)
    precision = "" if result["amp"] == "none" else f", {result['amp']}"
    click.echo(
        f"{accuracy_text(result)} of {result['num_samples']} samples "
        f"({options['data']}, {options['split']}{precision})",
        err=True,
    )
    if "exit_shares" in result:
        shares = ", ".join(f"{100 * share:.0f} %" for share in result["exit_shares"])
        compute = "compute not counted (recurrent layers)"
        if result["compute"] is not None:
            compute = f"{100 * result['compute']:.0f} % of the model's compute"
        click.echo(f"{compute}; left by exit: {shares}", err=True)
    if as_json:
        click.echo(json.dumps(result))


@main.command()
@click.option("-o", "--out", default=Path("out/demo"), show_default=True,
              type=click.Path(path_type=Path), metavar="DIR")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@_telling_errors
def demo(out: Path, as_json: bool) -> None:
    """Train a small CNN in two stages on real digits.

    Takes less than a minute; DIR gets the program, DIR-bp the same model by backpropagation.
    """
    from scpl_compile.demo import run_demo

    result = run_demo(out)
    if as_json:
        click.echo(json.dumps(result))


@main.group()
def bench() -> None:
    """Measure this machine."""


@bench.command()
@click.option("--offline", is_flag=True, help="Compile for four architectures; needs no GPU.")
@click.option("--quick", is_flag=True, help="Few sizes, without torch.compile.")
@click.option("-o", "--out", default=Path("out/bench"), show_default=True,
              type=click.Path(path_type=Path), metavar="DIR",
              help="For kernels.csv and kernels.png.")  # fmt: skip
@_telling_errors
def kernels(offline: bool, quick: bool, out: Path) -> None:
    """Time, memory and error of the contrastive loss, beside its alternatives.

    --offline tells registers, spills and instructions instead, and fails over budget.
    """
    from scpl_compile.bench import bench_kernels, bench_offline

    if offline:
        bench_offline("bf16 D128" if quick else "")
    else:
        bench_kernels(out, quick)
        click.echo(f"wrote {out / 'kernels.csv'}", err=True)
