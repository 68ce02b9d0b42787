"""`scpl demo`: the main job on an embedded default, SCPL beside backpropagation."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from scpl_compile.api import compile_model
from scpl_compile.errors import TrainingError
from scpl_compile.report import print_plan
from scpl_compile.runtime.progress import say

__all__ = ["run_demo"]

_MODEL = "scpl_compile.demo_net:build_net"
_EPOCHS = 16


def run_demo(out: Path) -> dict[str, Any]:
    """Compile the demo network into `out` (SCPL) and `out`-bp, train both on the digits.

    Gives both results. What an earlier demo left in these directories is replaced.

    Raises:
        TrainingError: a program did not run to its end.
    """
    start = time.perf_counter()
    results: dict[str, Any] = {}
    for method, directory in (("scpl", out), ("bp", out.with_name(f"{out.name}-bp"))):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # both methods begin with the same weights, in every run
            program = compile_model(
                _MODEL, "1x8x8", num_classes=10, num_stages=2, method=method, out=directory,
                force=True,
            )  # fmt: skip
        print_plan(program.plan)
        results[method] = _train(directory)
    results["seconds"] = time.perf_counter() - start
    scpl, bp = results["scpl"], results["bp"]
    say("")
    say(f"SCPL, 2 stages at once   {_row(scpl)}")
    say(f"backpropagation          {_row(bp)}")
    say("")
    say(f"The program is yours to read: {out}/stages.py and {out}/train.py. Try next:")
    say(f"  python {out}/train.py --epochs 5 --schedule sequential --run-dir run-2")
    say(
        "  scpl compile torchvision:resnet18 --input 3x32x32 --num-classes 10 --stages 2 "
        "-o out/resnet18"
    )
    return results


def _row(result: dict[str, Any]) -> str:
    return (
        f"{100 * result['accuracy']:.2f} % on the test split, "
        f"{result['samples_per_second']:.0f} samples/s"
    )


def _train(directory: Path) -> dict[str, Any]:
    command = [
        sys.executable, str(directory / "train.py"), "--data", "digits", "--epochs", str(_EPOCHS),
        "--batch-size", "64", "--force", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise TrainingError(f"{directory / 'train.py'} ended with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
