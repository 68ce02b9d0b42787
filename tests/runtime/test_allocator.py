"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

from scpl_compile.runtime.allocator import keep_freed_memory

STEPS = """
import ctypes, resource, sys
import torch
from scpl_compile.runtime.allocator import give_back_freed_memory, keep_freed_memory

class Account(ctypes.Structure):  # struct mallinfo2 of malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]

if sys.argv[1] != "mapped":
    assert keep_freed_memory()

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Account

others = mallinfo2().hblkhd  # blocks that go back to the system when they are freed

def step():
    blocks = [torch.ones(2**20) for _ in range(8)]  # 4 MiB each
    mapped = mallinfo2().hblkhd - others
    assert all(float(block[-1]) == 1 for block in blocks)
    return mapped

mapped = step()
assert (mapped >= 2**22) == (sys.argv[1] == "mapped")
for _ in range(2):
    step()
if sys.argv[1] == "give back":
    before = resident()
    give_back_freed_memory()
    print(before - resident())
else:
    print(mapped if sys.argv[1] == "mapped" else mallinfo2().fordblks)
"""
MIB = 2**20


def measured(how: str, environment: dict[str, str]) -> int:
    """Bytes, of steps that need 32 MiB at once. "mapped": of a step's blocks, where freed memory is
    not kept; "keep": that the process holds, unused, after some steps; "give back": of these.
    """
    command = [sys.executable, "-c", STEPS, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_what_a_step_frees_is_there_for_the_next_one(environment: dict[str, str]) -> None:
    for name in [name for name in environment if name.startswith("MALLOC_")]:
        del environment[name]
    assert measured("mapped", environment) >= 4 * MIB
    assert measured("keep", environment) >= 32 * MIB


def test_what_was_kept_can_be_given_back(environment: dict[str, str]) -> None:
    for name in [name for name in environment if name.startswith("MALLOC_")]:
        del environment[name]
    assert measured("give back", environment) >= 24 * MIB


def test_the_users_own_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_memory()
