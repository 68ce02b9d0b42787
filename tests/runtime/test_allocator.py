"""Freed memory stays with the process: a step like the one before it faults no page in."""

import subprocess
import sys

import pytest

from scpl_compile.runtime.allocator import keep_freed_memory

STEPS = """
import resource, sys
import torch
from scpl_compile.runtime.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.set_num_threads(1)

def step():
    blocks = [torch.ones(2**20) for _ in range(8)]  # 4 MiB each
    return sum(float(block[-1]) for block in blocks)

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, environment: dict[str, str]) -> int:
    command = [sys.executable, "-c", STEPS, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_steps_fault_far_fewer_pages_in(environment: dict[str, str]) -> None:
    for name in [name for name in environment if name.startswith("MALLOC_")]:
        del environment[name]
    assert faults("keep", environment) * 10 < faults("leave", environment)


def test_the_users_own_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_memory()
