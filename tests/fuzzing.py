"""Mutated files for the readers: seeded, cheap, and with checksums and lengths set right again, so
that a mutant reaches what lies behind them.
"""

import json
import math
import resource
import struct
import sys
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from random import Random
from time import thread_time
from typing import Any

from scpl_compile.errors import ScplError

NUM_MUTANTS = 10_000
MAX_BYTES, MAX_SECONDS = 2**29, 5.0
"""What one mutant may take. A byte of a PNG file may stand for 8256 pixels, and Pillow holds some
images three times: of a kilobyte that is 100 MB.
"""

_DEEP = "@deep@"
_PATHS = ("../../x", "/etc/passwd", "..", "a/../../b", "~/x", "file:///x", "C:\\x")
_ODD = (
    None, True, False, 0, 1, -1, 7, 2**31, -(2**31), 2**53, 2**63, -(2**63), 2**64, 10**400, 0.5,
    -0.0, 1e308, math.nan, math.inf, -math.inf, "", "x", "0", "\0", "\ud800", "é", "9" * 5000, [],
    {}, [[]], [0], [None], {"a": 1}, {"": {}}, _DEEP, *_PATHS,
)  # fmt: skip
_TOKENS = (
    b"", b"\0", b"\xff" * 8, b"{", b"}", b"[", b'"', b",", b":", b"\n", b"null", b"NaN", b"1e999",
    b"-1", b"9" * 400, b"../../x", b"/etc/passwd", b"\x80\x04K\x01.", b"PK\x03\x04",
    b"\x93NUMPY", b"[" * 1200,
)  # fmt: skip
_INTEGERS = (0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def mutate_bytes(rng: Random, content: bytes) -> bytes:
    """One to three changes: flips, cuts, repeats, splices, huge integers, odd tokens."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, end = rng.randrange(len(changed) + 1), rng.randrange(len(changed) + 1)
        size = min(rng.choice((1, 2, 4, 8, 40)), len(changed) - at)
        match rng.randrange(8):
            case 0 | 1 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                changed[at : at + size] = rng.randbytes(size)
            case 3:
                del changed[at:]
            case 4:
                del changed[at : at + size]
            case 5:
                changed[at:at] = changed[min(at, end) : max(at, end)]
            case 6:
                width, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
                value = rng.choice(_INTEGERS) % 2 ** (8 * width)
                changed[at : at + width] = value.to_bytes(width, order)
            case _:
                changed[at : at + rng.choice((0, size))] = rng.choice(_TOKENS)
    return bytes(changed)


def mutate_json(rng: Random, text: str) -> str:
    """A tree with one or two odd places; a quarter of the time the text itself is damaged."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, text.encode()).decode("utf-8", "surrogateescape")
    tree = [json.loads(text)]
    for _ in range(rng.choice((1, 1, 2))):
        _change(rng, tree)
    dumped = json.dumps(tree[0] if tree else None)
    depth = rng.choice((30, 300, 900, 960, 100_000))
    start, end = rng.choice((("[", "]"), ('{"a":', "}")))
    return dumped.replace(f'"{_DEEP}"', f"{start * depth}1{end * depth}")


def _change(rng: Random, tree: Any) -> None:
    """One place below the root, any depth."""
    place, key = tree, 0
    while place and isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.85:
        place = place[key]
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    if not place:
        return
    match rng.randrange(8):
        case 0:
            del place[key]
        case 1 if isinstance(place, dict):
            place[rng.choice(("x", "", "__class__", *_PATHS))] = place[key]
        case 1:
            place.append(place[key])
        case 2 if isinstance(place, dict):
            place[rng.choice(_PATHS)] = place.pop(key)
        case 3 if type(place[key]) in (int, float):
            value = place[key]
            place[key] = rng.choice((-value, value + 1, value * 2**40, f"{value}", [value]))
        case 4:
            place[key] = [place[key]]
        case _:
            place[key] = deepcopy(rng.choice(_ODD))  # a list of it is changed later


def mutate_tensors(rng: Random, content: bytes) -> bytes:
    """A safetensors file: its bytes, its header, or the JSON text within its metadata."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    (size,) = struct.unpack_from("<Q", content)
    text, data = content[8 : 8 + size].decode(), content[8 + size :]
    header = json.loads(text)
    inner = header.get("__metadata__")
    if inner and rng.random() < 0.6:
        key = rng.choice(list(inner))
        inner[key] = mutate_json(rng, inner[key])
        text = json.dumps(header)
    elif rng.random() < 0.3:
        tensor = header[rng.choice([name for name in header if name != "__metadata__"])]
        tensor["dtype"] = rng.choice(("F32", "I64", "F8_E5M2", "F4", "BOOL", "C64", "X"))
        tensor["shape"] = [rng.choice((0, 1, 3, 24, 2**31, 2**62, 2**63, 2**64 - 1)) for _ in "ab"]
        tensor["data_offsets"][1] = tensor["data_offsets"][rng.randrange(2)]
        text = json.dumps(header)
    else:
        text = mutate_json(rng, text)
    changed = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(changed)) + changed + data


def mutate_png(rng: Random, content: bytes) -> bytes:
    """Bytes, or those of one chunk under a right checksum."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    chunks, at = [], 8
    while at < len(content):
        (size,) = struct.unpack_from(">I", content, at)
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += size + 12
    index = rng.randrange(len(chunks))
    kind, data = chunks[index]
    kind = rng.choice((kind, kind, kind, b"tEXt", b"zTXt", b"iCCP", b"PLTE", b"acTL", b"IEND"))
    if kind == b"IHDR" and rng.random() < 0.5:
        sizes = [rng.choice((0, 1, 2, 6, 2000, 13000, 60000, 2**31 - 1, 2**31)) for _ in range(2)]
        data = struct.pack(">II", *sizes) + data[8:]
    elif kind == b"IDAT" and rng.random() < 0.5:
        data = zlib.compress(mutate_bytes(rng, zlib.decompress(data)))
    else:
        data = mutate_bytes(rng, data)
    chunks[index] = (kind, data)
    return content[:8] + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# ---------------------------------------------------------------------- watching


_watched: list[Path] = []
_seen: set[str] = set()
_FORBIDDEN = ("exec", "pickle.find_class", "subprocess.Popen", "os.system", "os.exec",
              "os.posix_spawn", "os.fork", "socket.connect")  # fmt: skip


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """What Python does while a mutant is read."""
    if not _watched:
        return
    if event in _FORBIDDEN:
        _seen.add(f"{event} {arguments[0]!r:.80}")
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path = arguments[0] if isinstance(arguments[0], str) else arguments[0].decode()
        if not Path(path).resolve().is_relative_to(_watched[0]):
            _seen.add(f"open {path}")


sys.addaudithook(_audit)


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """No code runs inside, no file outside of `folder` is opened, and little memory is taken.

    The hook stays, as Python's do, and passes over everything else.
    """
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    _seen.clear()
    _watched.append(folder.resolve())
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, before[1]))
    try:
        yield
    finally:
        _watched.clear()
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(
    folder: Path,
    feed: Callable[[Random], object],
    read: Callable[[], object],
    *,
    refuses: bool = True,
) -> None:
    """`feed` writes a mutant, `read` loads it or raises an error of ours; anything else fails.

    refuses: False where a reader passes over what is damaged.
    """
    read()  # which also imports what it needs
    rng = Random(0)
    ends: Counter[str] = Counter()
    others: dict[str, str] = {}
    with watched(folder):
        for number in range(NUM_MUTANTS):
            feed(rng)
            start = thread_time()
            try:
                read()
                ends["loaded"] += 1
            except ScplError:
                ends["refused"] += 1
            except Exception as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{type(error).__name__} at {frame.name}"
                others.setdefault(place, f"mutant {number}: {error!s:.200}")
            assert thread_time() - start < MAX_SECONDS, f"mutant {number} takes too long"
    assert not others, "\n".join(f"{place}, {text}" for place, text in others.items())
    assert not _seen, sorted(_seen)
    assert ends["loaded"] and bool(ends["refused"]) == refuses, "mutants all alike test nothing"
