"""Runs triton_*.py in a process of their own: what the interpreter has loaded cannot be compiled,
and what was loaded without it cannot be interpreted.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = sorted(map(str, Path(__file__).parent.glob("triton_*.py")))


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.timeout(900)  # one process for all cases, most of a minute each where cores are few
@pytest.mark.parametrize("interpret", ["1", pytest.param("0", marks=[pytest.mark.cuda, ON_GPU])])
def test_the_cases_hold(environment: dict[str, str], interpret: str) -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if interpret == "1" else {}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CASES],
        env={**environment, **hidden, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout
