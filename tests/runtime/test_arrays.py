"""Data sets of the user's own arrays, and every way in which they can be wrong."""

import io
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from scpl_compile.errors import DataError
from scpl_compile.ir import InputSpec
from scpl_compile.runtime.datasets import open_splits


def spec(name, shape, dtype="float32", high=None):
    return InputSpec(name=name, dtype=dtype, shape=shape, high=high)


IMAGE = (spec("x", (3, 6, 8)),)
TEXT = (spec("ids", (5,), "int64", 100), spec("mask", (5,), "int64", 2))


# --- npz


def text_arrays(count, suffix, seed=0):
    random = np.random.default_rng(seed)
    return {
        f"mask{suffix}": np.ones((count, 5), dtype=np.int64),
        f"ids{suffix}": random.integers(0, 100, (count, 5)),
        f"y{suffix}": random.integers(0, 3, count),
    }


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_npz_arrays_go_to_the_models_inputs_by_name(tmp_path, validation):
    arrays = {
        **text_arrays(30, "_train"),
        **text_arrays(5, f"_{validation}", 1),
        **text_arrays(6, "_test", 2),
    }
    np.savez(tmp_path / "text.npz", **arrays)
    splits = open_splits(f"npz:{tmp_path}/text.npz", inputs=TEXT)
    assert (splits.kind, splits.facts.mean, splits.note) == ("tensor", (), "")
    for part, suffix in (
        (splits.train, "train"),
        (splits.validation, validation),
        (splits.test, "test"),
    ):
        assert np.array_equal(part.inputs[0].numpy(), arrays[f"ids_{suffix}"])
        assert np.array_equal(part.inputs[1].numpy(), arrays[f"mask_{suffix}"])
        assert np.array_equal(part.labels.numpy(), arrays[f"y_{suffix}"])


def test_npz_with_x_train_and_x_takes_x_train(tmp_path):
    part = {"x_train": np.ones((20, 2)), "y_train": np.arange(20) % 2}
    np.savez(tmp_path / "a.npz", x=np.zeros((30, 2)), y=np.zeros(30, dtype=int), **part)
    assert open_splits(f"npz:{tmp_path}/a.npz").train.inputs[0].all()


def test_npz_of_labels_alone_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", y=np.arange(2))
    with pytest.raises(
        DataError, match="holds the inputs none; the model takes one: .*x_train, y_"
    ):
        open_splits(f"npz:{tmp_path}/a.npz")


def test_npz_of_x_and_y_is_split(tmp_path):
    x = np.random.default_rng(0).normal(size=(100, 4))
    np.savez_compressed(tmp_path / "a.npz", x=x, y=np.arange(100, dtype=np.uint8)[:, None] % 2)
    splits = open_splits(f"npz:{tmp_path}/a.npz", inputs=(spec("features", (4,)),))
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [70, 10, 20]
    assert splits.train.labels.shape == (70,) and splits.train.labels.dtype == torch.int64
    assert splits.note != ""


@pytest.mark.parametrize("shape", [(20, 8, 9), (20, 3, 8, 9), (20, 8, 9, 3), (20, 8, 9, 1)])
def test_npz_of_uint8_images_in_any_order_of_channels(tmp_path, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x_train=pixels, y_train=np.arange(20) % 2)
    splits = open_splits(f"npz:{tmp_path}/a.npz", inputs=IMAGE)
    channels = 3 if 3 in shape else 1
    images = splits.train.inputs[0]
    assert splits.kind == "image" and images.shape[1:] == (channels, 8, 9)
    assert len(splits.facts.mean) == channels
    whole = torch.cat([s.inputs[0] for s in (splits.train, splits.validation, splits.test)])
    assert sorted(whole.flatten().tolist()) == sorted(pixels.flatten().tolist())


def test_uint8_for_a_model_of_integers_is_no_image(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((20, 3, 8), dtype=np.uint8), y=np.arange(20) % 2)
    ids = (spec("ids", (3, 8), "int64", 256),)
    assert open_splits(f"npz:{tmp_path}/a.npz", inputs=ids).kind == "tensor"


def test_the_test_arrays_of_npz_are_not_read_before_they_are_asked_for(tmp_path):
    arrays = {**text_arrays(30, "_train"), **text_arrays(6, "_test")}
    arrays["ids_test"] = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "a.npz", **arrays)
    splits = open_splits(f"npz:{tmp_path}/a.npz", inputs=TEXT)
    assert len(splits.train) == 27  # a tenth is for validation
    with pytest.raises(DataError, match="a.npz is damaged or cannot be read: .*Object arrays"):
        _ = splits.test


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": np.zeros(3)}, "a.npz has no y_train and no y; its arrays: x_train"),
        (
            {"x": np.zeros((9, 2)), "y": np.zeros(9)},
            r"train: labels must be integers \(N,\), not float64 \(9,\)$",
        ),
        (
            {"x": np.zeros((9, 2)), "y": np.eye(9, dtype=int)},
            r"\(9, 9\); one-hot .* argmax\(1\), supported .* --task multi-label .* not .*token",
        ),
        ({"x": np.zeros((8, 2)), "y": np.arange(9)}, "train: input 0 has 8 samples and 9 labels"),
        ({"x": np.array(["a", "b"]), "y": np.arange(2)}, "train inputs are no array of numbers"),
        ({"x": np.float32(3), "y": np.arange(2)}, "inputs are one number, not an array"),
        ({"y": np.arange(2)}, "holds the inputs none; the model takes x: .*like x_train, y_train"),
        ({"a": np.zeros(9), "b": np.zeros(9), "y": np.arange(9)}, "holds the inputs a, b; the mod"),
        (
            {"x_train": np.zeros((9, 2)), "y_train": np.arange(9), "y_val": np.arange(2)},
            "a.npz has no x_val; its arrays: x_train, y_train, y_val",
        ),
    ],
)
def test_npz_files_that_hold_something_else(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_splits(f"npz:{tmp_path}/a.npz", inputs=(spec("x", (2,)),))


def test_a_missing_torn_or_foreign_npz_file_is_named(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(DataError, match="the file .*a.npz is missing"):
        open_splits(f"npz:{path}")
    np.savez(path, **text_arrays(300, "_train"))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (b"", b"text", whole[:100], whole[:-30], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(DataError, match="a.npz is damaged or cannot be read"):
            open_splits(f"npz:{path}", inputs=TEXT)
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"a.npy is damaged or cannot be read: .*not a zip file"):
        open_splits(f"npz:{tmp_path}/a.npy")


def claiming(shape, dtype="|u1"):
    """An array file whose header claims this, with 20 bytes behind it."""
    buffer = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + bytes(20)


@pytest.mark.parametrize(
    "content",
    [
        claiming((10**11,)),
        claiming((10**30,)),
        claiming((2**32, 2**32)),
        claiming((20,), "<i8"),
        claiming((20,), "|V999999999"),
        claiming((19,)),
        claiming((20,)).replace(b"(20,)", b"((20,"),
        claiming((20,)).replace(b"\x93NUMPY\1", b"\x93NUMPY\3"),
        b"\x80\4K\1.",
    ],
)
def test_an_array_whose_header_claims_something_else_takes_no_memory(tmp_path, content):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content)
        archive.writestr("y.npy", claiming((20,)))
    tracemalloc.start()
    with pytest.raises(DataError, match="a.npz is damaged or cannot be read: "):
        open_splits(f"npz:{tmp_path}/a.npz")
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_an_archive_that_claims_more_than_it_can_unpack_to_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((20, 2)), y=np.arange(20))
    whole = path.read_bytes()
    place = whole.index(b"PK\1\2") + 24  # of the archive's entry of x: its size
    path.write_bytes(whole[:place] + (2**31).to_bytes(4, "little") + whole[place + 4 :])
    with pytest.raises(DataError, match="claims to hold 2147483648 bytes, which its size does not"):
        open_splits(f"npz:{path}")


def test_more_than_this_machine_has_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((20, 2)), y=np.arange(20))
    monkeypatch.setattr(os, "sysconf", lambda name: 10)
    with pytest.raises(DataError, match=r"holds \d+ bytes, this machine has 100; take a part"):
        open_splits(f"npz:{path}")


def test_an_archive_of_another_compression_is_refused(tmp_path):
    """Of bzip2 a few bytes unpack to a gigabyte."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("x.npy", claiming((20,)))
        archive.writestr("y.npy", claiming((20,)))
    with pytest.raises(DataError, match="x.npy is compressed in another way than by np.savez_comp"):
        open_splits(f"npz:{tmp_path}/a.npz")


def test_samples_without_values_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((20, 3, 0, 2), dtype=np.uint8), y=np.arange(20) % 2)
    with pytest.raises(DataError, match=r"inputs of the shape \(20, 3, 0, 2\) have no values"):
        open_splits(f"npz:{tmp_path}/a.npz")


# --- file.py:callable

OWN = """
import numpy as np
import torch

def one():
    x = torch.arange(20.0).view(20, 1)
    return {"train": (x, np.arange(20) % 2), "test": (x[:4], [0, 1, 0, 1])}

def several():
    ids, mask = np.zeros((20, 5), dtype=np.uint16), torch.ones(20, 5, dtype=torch.int64)
    part = ((ids, mask), torch.zeros(20, dtype=torch.int32))
    return {"train": part, "validation": part, "test": part}

def big_endian(): return {"train": (np.arange(9, dtype=">f4"), np.zeros(9, ">i2"))} | one()
def a_list(): return [1]
def no_test(): return {"train": one()["train"]}
def odd(): return one() | {"valid": 1}
def no_pair(): return {"train": 3, "test": 4}
def fails(): raise RuntimeError("no corpus")
text = "data"
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py"


def test_a_function_of_the_user_gives_one_input(own):
    splits = open_splits(f"{own}:one")
    assert len(splits.train) + len(splits.validation) == 20
    assert splits.note == "10 % for validation taken out of its training samples"
    assert torch.equal(splits.train.inputs[0].view(-1) % 2, splits.train.labels.float())
    assert splits.test.labels.tolist() == [0, 1, 0, 1]
    assert splits.kind == "tensor"


def test_a_function_of_the_user_gives_several_inputs(own):
    splits = open_splits(f"{own}:several", inputs=TEXT)
    ids, mask = splits.train.inputs
    assert (ids.dtype, mask.dtype, splits.train.labels.dtype) == (torch.int64,) * 3
    assert ids.shape == mask.shape == (20, 5)
    assert len(splits.validation) == len(splits.test) == 20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a_list", "gave list; it must return .*train"),
        ("no_test", "gave train; it must return"),
        ("odd", "gave train, test, valid; it must return"),
        ("no_pair", r"train must be a pair \(inputs, labels\)"),
        ("fails", "own.py:fails failed with RuntimeError: no corpus"),
        ("text", "own.py:text is of type str, not a callable"),
        ("absent", "own.py has no 'absent'; its callables"),
    ],
)
def test_functions_that_give_no_data(own, name, message):
    with pytest.raises(DataError, match=message):
        open_splits(f"{own}:{name}")


def test_a_missing_file_of_the_user_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="the file .*absent.py is missing"):
        open_splits(f"{tmp_path}/absent.py:data")


# --- several labels per sample


@pytest.mark.parametrize("dtype", [np.int64, np.float32, np.uint8, bool])
def test_npz_labels_of_several_become_bool(tmp_path, dtype):
    flags = (np.arange(90).reshape(30, 3) % 4 == 0).astype(dtype)
    np.savez(tmp_path / "a.npz", x=np.zeros((30, 2)), y=flags)
    splits = open_splits(f"npz:{tmp_path}/a.npz", task="multi-label")
    parts = (splits.train, splits.validation, splits.test)
    assert [part.labels.shape for part in parts] == [(21, 3), (3, 3), (6, 3)]
    assert {part.labels.dtype for part in parts} == {torch.bool}
    assert splits.num_classes == 3
    assert sum(int(part.labels.sum()) for part in parts) == flags.sum()


def test_a_function_may_give_several_labels(tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\ndef data():\n"
        "    part = (torch.zeros(9, 2), torch.eye(9, 4))\n"
        "    return {'train': part, 'validation': part, 'test': part}\n"
    )
    splits = open_splits(f"{tmp_path}/own.py:data", task="multi-label")
    assert torch.equal(splits.test.labels, torch.eye(9, 4).bool())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(9), r"train: labels must be \(N, classes\) zeros and ones .*, not int64 \(9,\)"),
        (np.zeros((9, 2, 2)), r"not float64 \(9, 2, 2\)"),
        (np.full((9, 2), 3), "train: label 0 of sample 0 is 3; give 1 where"),
        (np.full((9, 2), 0.5), r"label 0 of sample 0 is 0\.5"),
    ],
)
def test_npz_labels_that_are_not_several(tmp_path, labels, message):
    np.savez(tmp_path / "a.npz", x=np.zeros((9, 2)), y=labels)
    with pytest.raises(DataError, match=message):
        open_splits(f"npz:{tmp_path}/a.npz", task="multi-label")
