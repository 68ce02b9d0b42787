"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

from scpl_compile.runtime.allocator import keep_freed_memory

STEPS = """
import ctypes, sys
import torch
from scpl_compile.runtime.allocator import keep_freed_memory

class Account(ctypes.Structure):  # struct mallinfo2 of malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]

if sys.argv[1] == "keep":
    assert keep_freed_memory()
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Account

def step():
    blocks = [torch.ones(2**20) for _ in range(8)]  # 4 MiB each
    return sum(float(block[-1]) for block in blocks)

for _ in range(3):
    step()
print(mallinfo2().fordblks)
"""
MIB = 2**20


def free_bytes(how: str, environment: dict[str, str]) -> int:
    """What the process holds, unused, after steps that needed 32 MiB at once."""
    command = [sys.executable, "-c", STEPS, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_what_a_step_frees_is_there_for_the_next_one(environment: dict[str, str]) -> None:
    for name in [name for name in environment if name.startswith("MALLOC_")]:
        del environment[name]
    assert free_bytes("keep", environment) >= 32 * MIB
    assert free_bytes("leave", environment) < 16 * MIB


def test_the_users_own_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_memory()
