"""Files of data sets that somebody else wrote: ten thousand mutants for every reader."""

import gzip
import io
import json
import shutil
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from fuzzing import fuzz, mutate_bytes, mutate_json, mutate_png
from scpl_compile.ir import InputSpec
from scpl_compile.runtime.datasets import open_splits
from scpl_compile.runtime.splits import LazyImages, Splits

TEXT = (
    InputSpec(name="ids", dtype="int64", shape=(5,), high=30),
    InputSpec(name="mask", dtype="int64", shape=(5,), high=2),
)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory in memory where there is one: every mutant is a file."""
    parent = "/dev/shm" if Path("/dev/shm").is_dir() else None
    path = Path(tempfile.mkdtemp(dir=parent))
    yield path
    shutil.rmtree(path)


def read_all(splits: Splits) -> None:
    """Every part, and that it is no larger than a few kilobytes can be."""
    for split in (splits.train, splits.validation, splits.test):
        for values in split.inputs:
            assert values.shape[0] == len(split.labels) < 10**6


# ---------------------------------------------------------------------- idx


def idx(values: np.ndarray) -> bytes:
    """An idx file of bytes."""
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_idx(folder: Path, suffix: str) -> None:
    contents = {}
    for part, count in (("train", 24), ("t10k", 6)):
        images = np.arange(count * 20, dtype=np.uint8).reshape(count, 4, 5)
        contents[f"{part}-images-idx3-ubyte{suffix}"] = idx(images)
        contents[f"{part}-labels-idx1-ubyte{suffix}"] = idx(np.arange(count, dtype=np.uint8) % 10)

    def packed(content: bytes) -> bytes:
        return gzip.compress(content, 1) if suffix else content

    for name, content in contents.items():
        (folder / name).write_bytes(packed(content))
    changed = next(iter(contents))

    def feed(rng: Random) -> None:
        nonlocal changed
        (folder / changed).write_bytes(packed(contents[changed]))
        changed = rng.choice(list(contents))
        if suffix and rng.random() < 0.4:
            mutant = mutate_bytes(rng, packed(contents[changed]))
        else:
            mutant = packed(mutate_bytes(rng, contents[changed]))
        (folder / changed).write_bytes(mutant)

    fuzz(folder, feed, lambda: read_all(open_splits(f"fashion-mnist:{folder}")))


# ---------------------------------------------------------------------- npz


def npy(values: np.ndarray) -> bytes:
    """One array as np.save writes it."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def npz(members: dict[str, bytes], method: int) -> bytes:
    """An archive with right checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


_HEADER_WORDS = (
    (b"'<f4'", (b"'|O'", b"'<f8'", b"'>i2'", b"'<U9'", b"'V999999999999'", b"'<M8[s]'", b"[]",
                b"'c16'", b"[('a','<i4')]", b"3", b"'<f4,<f4'", b"'|u1'", b"'?'")),
    (b"False", (b"True", b"None", b"0", b"[False]")),
    (b"(20, 3, 2, 2)", (b"(20,)", b"()", b"(20, 0)", b"(20, 3, 0, 2)", b"(-1,)", b"(99999999999,)",
                        b"(20, 12)", b"(20, 10**9)", b"(4294967296, 4294967296)", b"20",
                        b"(20, True)", b"((" * 90, b"(240,)", b"(2.0,)")),
    (b"shape", (b"shapes", b"", b"__class__")),
)  # fmt: skip


def odd_header(rng: Random, content: bytes) -> bytes:
    """Another dtype, order or shape, with the length of the header set right."""
    (size,) = struct.unpack_from("<H", content, 8)
    header, data = content[10 : 10 + size], content[10 + size :]
    for old, new in rng.sample(_HEADER_WORDS, 2):
        header = header.replace(old, rng.choice(new))
    if rng.random() < 0.2:
        header = mutate_bytes(rng, header)
    return content[:8] + struct.pack("<H", len(header) % 2**16) + header + data


def test_npz(folder: Path) -> None:
    x = np.arange(20 * 12, dtype=np.float32).reshape(20, 3, 2, 2)
    members = {"x.npy": npy(x), "y.npy": npy(np.arange(20) % 2)}
    images = {"x.npy": npy(x.astype(np.uint8)), "y.npy": members["y.npy"]}
    path = folder / "a.npz"
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    whole = [npz(each, method) for each in (members, images) for method in methods]

    def feed(rng: Random) -> None:
        if rng.random() < 0.4:
            path.write_bytes(mutate_bytes(rng, rng.choice(whole)))
            return
        changed = dict(rng.choice((members, images)))
        name = rng.choice(list(changed))
        how = odd_header if rng.random() < 0.7 else mutate_bytes
        changed[name] = how(rng, changed[name])
        if rng.random() < 0.05:
            changed[rng.choice(("../../x.npy", "/etc/x.npy", "y_train.npy"))] = changed.pop(name)
        path.write_bytes(
            npz(changed, rng.choice((*methods, *methods, *methods, zipfile.ZIP_BZIP2)))
        )

    path.write_bytes(whole[0])
    fuzz(folder, feed, lambda: read_all(open_splits(f"npz:{path}")))


# ---------------------------------------------------------------------- images


def encoded(kind: str, mode: str) -> bytes:
    """A small picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def test_images(folder: Path) -> None:
    pictures = [encoded("PNG", mode) for mode in ("RGB", "P", "1", "RGBA", "LA")]
    jpegs = [encoded("JPEG", mode) for mode in ("RGB", "L", "CMYK")]
    path = folder / "0.png"
    images = LazyImages(paths=(path,), size=(3, 4, 4))

    def feed(rng: Random) -> None:
        if rng.random() < 0.7:
            path.write_bytes(mutate_png(rng, rng.choice(pictures)))
        else:
            path.write_bytes(mutate_bytes(rng, rng.choice(jpegs)))

    path.write_bytes(jpegs[0])
    images[torch.tensor([0])]
    path.write_bytes(pictures[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what it passes over
        fuzz(folder, feed, lambda: images[torch.tensor([0])])


# ---------------------------------------------------------------------- texts

ROWS = """text,label,split
"Good, good film!",pos,train
bad film,neg,train
"a ""film"" with a tail",pos,train
unseen words,neg,test
good,pos,validation
"""


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_texts(folder: Path, suffix: str) -> None:
    path = folder / f"a.{suffix}"
    content = ROWS.replace(",", "\t" if suffix == "tsv" else ",").encode()
    path.write_bytes(content)
    fuzz(
        folder,
        lambda rng: path.write_bytes(mutate_bytes(rng, content)),
        lambda: read_all(open_splits(f"csv:{path}", inputs=TEXT)),
    )


def test_facts(folder: Path) -> None:
    """That of a run, and texts that it numbers."""
    data, path = folder / "a.csv", folder / "data_facts.json"
    data.write_text(ROWS)
    words = ["film", "good", '"', "é"]
    text = json.dumps({"words": words, "labels": ["neg", "pos"], "mean": [0.5], "std": [0.25]})
    path.write_text(text)

    def feed(rng: Random) -> None:
        path.write_bytes(mutate_json(rng, text).encode("utf-8", "surrogateescape"))

    def read() -> None:
        splits = open_splits(f"csv:{data}", inputs=TEXT, facts=path)
        read_all(splits)
        assert splits.train.inputs[0].max() < 30 and splits.train.labels.max() < splits.num_classes

    fuzz(folder, feed, read)
