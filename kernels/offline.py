"""What the compilers make of the kernels, for four architectures and without a GPU.

::

    POINTS ─ route ─▶ variants ─ triton.compile ─▶ cubin or amdgcn ─▶ Facts ─▶ budget.json

Every (batch, dim, dtype, temperature) of POINTS is routed as a launch would route it, for sm_80,
sm_90, sm_100 and gfx942, and each different kernel is compiled. Registers, spills and shared memory
come from the compilers' own reports; matrix instructions and instructions for each element of the
B x B similarities from the inner loop of the machine code, without what happens once per row block.
Nothing here is a time: overlap, caches and clocks are not in the machine code.

    python -m scpl_compile.kernels.offline [ARCHITECTURE …] [--names REGEX]     JSON on stdout
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from scpl_compile.kernels import triton_kernels, triton_rows, triton_triangle
from scpl_compile.kernels.routes import Route, route

__all__ = [
    "ARCHITECTURES",
    "BUDGET",
    "Facts",
    "Variant",
    "facts",
    "measure",
    "occupancy",
    "over_budget",
    "variants",
]

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
BUDGET = Path(__file__).with_name("budget.json")
POINTS = [
    (batch, dim, dtype, temperature)
    for dtype, dims in (
        (torch.bfloat16, (16, 32, 64, 128, 256, 1024)),
        (torch.float16, (32, 64, 128, 1024)),
        (torch.float32, (16, 32, 64, 256, 1024)),
    )
    for dim in dims
    for batch, temperature in (
        *((batch, 0.1) for batch in (dim, 1024, 6144, 8192, 16384, 65536, 262144)), (65536, 0.005),
    )
]  # fmt: skip
SHARED_KIB = {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # of a multiprocessor
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REPORTED = ("occupancy", "matrix")  # more is not worse
MATRIX = re.compile(r"HGMMA|HMMA|UTC\w*MMA|v_mfma\w*")
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One kernel as it is compiled: its constants, the types of its arguments, launch options."""

    name: str
    kernel: str
    constants: dict[str, Any]
    types: dict[str, str]
    num_warps: int
    num_stages: int
    elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """registers: of a thread, vector and accumulation. spills: bytes of a thread, or registers on
    AMD. shared: bytes of a block. occupancy: blocks that fit on a multiprocessor at a time by
    registers, shared memory and warps. matrix: matrix instructions of the inner loop. per_element:
    its instructions, times threads, for each element of the tile, of which one of the triangle is
    two elements of the B x B matrix; None where its loop is another.
    """

    registers: int
    spills: int
    shared: int
    occupancy: int
    matrix: int
    per_element: float | None


def variants(architecture: str) -> dict[str, Variant]:
    """Every kernel that POINTS launch on an architecture, by name."""
    found = {}
    for batch, dim, dtype, temperature in POINTS:
        way = route(batch, dim, dtype, architecture, temperature, True)
        for variant in (*_forwards(way), _backward(way), *_row_kernels(way)):
            found[variant.name] = variant
    return found


def _forwards(way: Route) -> list[Variant]:
    """One forward, or where E is made again two: of the sums, and of E."""
    options, sums = way.forward_options(), {"rows_ptr", "dots_ptr", "counts_ptr"}
    absent = set() if way.labels else {"labels_ptr", "dots_ptr", "counts_ptr"}
    if way.stored:
        return [_variant("forward_kernel", "keeps", way, options | {"SUMS": True}, absent)]
    if way.distances:
        word = "tall" * (way.forward.block_m > 128)
        return [_variant("triangle_kernel", word, way, way.triangle_options(), set())]
    absent |= {"kept_ptr"}
    found = [_variant("forward_kernel", "", way, options | {"SUMS": True}, absent)]
    if not way.resident:
        found.append(_variant("forward_kernel", "again", way, options | {"SUMS": False}, sums))
    return found


def _backward(way: Route) -> Variant:
    absent = set() if way.online else {"weight_ptr"}
    if not way.resident:
        return _variant("product_kernel", "", way, way.backward_options(), absent)
    if not way.labels:
        absent |= {"labels_ptr", "c_ptr"}
    return _variant("backward_kernel", "", way, way.backward_options(), absent)


def _row_kernels(way: Route) -> list[Variant]:
    size = {"D_PAD": way.dim_pad, "NORMALIZE": True, "BLOCK_M": 32, "num_warps": 4, "num_stages": 3}
    size |= {"BLOCK_D": min(way.dim_pad, 128)}
    last = {"KHOSLA": False, "MEAN": True, "ONLINE": way.online, "BLOCK": 1024}
    last |= {"num_warps": 8, "num_stages": 3}
    return [
        _variant("prologue_kernel", "", way, size, set()),
        _variant("finalise_kernel", "", way, last, set()),
        _variant("project_kernel", "", way, size, set()),
    ]


def _variant(
    kernel: str, word: str, way: Route, options: dict[str, Any], absent: set[str]
) -> Variant:
    """absent: pointers that are None."""
    arguments = _function(kernel).arg_names
    absent = absent if way.descriptors else absent | {"columns"}
    constants = {n: v for n, v in options.items() if n.isupper()} | dict.fromkeys(absent)
    constants = {n: value for n, value in constants.items() if n in arguments}
    operand = TYPES[way.dtype]
    special = {
        "columns": f"tensordesc<{operand[1:]}[{options.get('BLOCK_N')}, {way.dim_pad}]>",
        **dict.fromkeys(("x_ptr", "features_ptr", "out_ptr"), operand),
        "labels_ptr": "*i64",
        "kept_ptr": TYPES[way.kept_dtype],
        "root": "fp32",
    }
    names = [n for n in arguments if n not in constants]
    words = [kernel.removesuffix("_kernel"), word, operand[1:], f"D{way.dim_pad}"]
    words += ["online"] * way.online + ["labels"] * way.labels
    if kernel in ("prologue_kernel", "project_kernel", "finalise_kernel"):
        words = words[:1] + (words[2:4] if "D_PAD" in constants else ["online"] * way.online)
    is_tile = way.resident and "BLOCK_N" in constants
    is_half = kernel == "triangle_kernel"
    return Variant(
        name=" ".join(filter(None, words)),
        kernel=kernel,
        constants=constants,
        types={n: special.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in names},
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        elements=options["BLOCK_M"] * options["BLOCK_N"] * (1 + is_half) if is_tile else 0,
    )


def _function(kernel: str) -> Any:
    modules = (triton_kernels, triton_rows, triton_triangle)
    return next(getattr(module, kernel) for module in modules if hasattr(module, kernel))


def measure(variant: Variant, architecture: str) -> Facts:
    """Compile one variant, a few seconds, and read what came out."""
    function = _function(variant.kernel)
    names = function.arg_names
    aligned = [n for n in variant.types if n.endswith("_ptr") or n in ("B_PAD", "group_size")]
    source = ASTSource(
        function,
        {n: variant.types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in variant.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    is_amd = architecture.startswith("gfx")
    number = 0 if is_amd else int(architecture.removeprefix("sm_"))
    target = GPUTarget("hip", architecture, 64) if is_amd else GPUTarget("cuda", number, 32)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    read = _read_amd if is_amd else _read_nvidia
    registers, spills, loops = read(compiled.asm)
    inner = next(filter(_matrix, loops), [])  # of plain tiles: those with masks come after
    lanes = variant.num_warps * target.warp_size
    per_element = round(len(inner) * lanes / variant.elements, 2) if variant.elements else None
    return Facts(
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        occupancy=occupancy(architecture, registers, compiled.metadata.shared, variant.num_warps),
        matrix=_matrix(inner),
        per_element=per_element,
    )


def occupancy(architecture: str, registers: int, shared: int, num_warps: int) -> int:
    """Blocks of num_warps warps that fit on a multiprocessor (AMD: compute unit) at a time.

    registers: of a thread. shared: bytes of a block. Source: CUDA C++ programming guide, compute
    capabilities (65,536 registers given out 8 a thread at a time, 64 warps, 1 KiB of each block's
    shared memory taken by the system); CDNA 3 ISA (4 SIMDs of 512 registers a lane and 8 waves).
    """
    rounded = -(-max(registers, 1) // 8) * 8
    if architecture.startswith("gfx"):
        by_warps = 4 * min(8, 512 // rounded) // num_warps
        return min(by_warps, (64 * 1024) // max(shared, 1))
    by_warps = min(64, 65536 // (32 * rounded)) // num_warps
    return min(by_warps, SHARED_KIB[architecture] * 1024 // (shared + 1024))


def _matrix(loop: list[str]) -> int:
    return sum(bool(MATRIX.match(operation)) for operation in loop)


def _read_nvidia(asm: Any) -> tuple[int, int, list[list[str]]]:
    """Registers, bytes of stack and local memory, loops."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    numbers = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", usage)
    assert numbers, usage
    registers, stack, local = map(int, numbers.groups())
    line = re.compile(r"\s*(?:/\*\w+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)\b[^;]*;")
    return registers, stack + local, _loops(code, line, r"\.L_x_\d+", "BRA")


def _read_amd(asm: Any) -> tuple[int, int, list[list[str]]]:
    """Vector and accumulation registers, spilled registers, loops."""
    code = asm["amdgcn"]

    def number(name: str) -> int:
        return sum(int(n) for n in re.findall(rf"^\s*\.{name}:\s+(\d+)", code, re.MULTILINE))

    registers = number("vgpr_count")  # the accumulation registers are in it
    spills = number("vgpr_spill_count")  # scalar registers spill into vector registers
    line = re.compile(r"\s+([svdbg][a-z]*_\w+)\b.*")
    return registers, spills, _loops(code, line, r"\.LBB\d+_\d+", "s_cbranch")


def _tool(name: str, *arguments: str) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _loops(code: str, line: re.Pattern[str], label: str, branch: str) -> list[list[str]]:
    """The operations from each label to the last branch back to it; inner loops before outer."""
    operations: list[str] = []
    places: dict[str, int] = {}
    loops: dict[int, int] = {}
    for text in code.splitlines():
        if place := re.match(rf"\s*({label}):", text):
            places[place[1]] = len(operations)
        elif found := line.match(text):
            operations.append(found[1])
            target = re.search(label, text)
            if found[1].startswith(branch) and target and target[0] in places:
                loops[places[target[0]]] = len(operations)
    return [operations[first:end] for first, end in loops.items()]


def over_budget(found: dict[str, dict[str, Any]]) -> list[str]:
    """What exceeds `BUDGET`, a sentence each; found: facts by architecture and name."""
    budget = json.loads(BUDGET.read_text())
    return [
        f"{architecture}: {name}: {fact} is {value}, budgeted {budget[architecture][name][fact]}"
        for architecture, facts in found.items()
        for name, one in facts.items()
        for fact, value in one.items()
        if fact not in REPORTED and value is not None and value > budget[architecture][name][fact]
    ]


def facts(
    architectures: Sequence[str] = ARCHITECTURES, names: str = ""
) -> dict[str, dict[str, Any]]:
    """By architecture and name, of the variants whose name matches the regular expression."""
    return {
        architecture: {
            name: asdict(measure(variant, architecture))
            for name, variant in variants(architecture).items()
            if re.search(names, name)
        }
        for architecture in architectures
    }


def main(arguments: list[str]) -> None:
    """Print the facts as JSON."""
    parser = argparse.ArgumentParser(description="What the compilers make of the kernels: JSON.")
    parser.add_argument("architectures", nargs="*", help=", ".join(ARCHITECTURES))
    parser.add_argument("--names", default="", metavar="REGEX", help="default: all")
    options = parser.parse_args(arguments)
    json.dump(facts(options.architectures or ARCHITECTURES, options.names), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main(sys.argv[1:])
