"""Every data set that a user can name, and every way in which its files can be wrong."""

import gzip
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scpl_compile.errors import DataError
from scpl_compile.ir import InputSpec
from scpl_compile.runtime.datasets import open_splits
from scpl_compile.runtime.splits import LazyImages


def spec(name, shape, dtype="float32", high=None):
    return InputSpec(name=name, dtype=dtype, shape=shape, high=high)


IMAGE = (spec("x", (3, 6, 8)),)
TEXT = (spec("ids", (5,), "int64", 100), spec("mask", (5,), "int64", 2))


def same(one, other):
    pairs = zip(one.inputs, other.inputs, strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and torch.equal(one.labels, other.labels)


# --- digits


def test_digits_are_the_scans_and_split_in_a_fixed_stratified_way():
    splits = open_splits("digits", seed=1)
    parts = (splits.train, splits.validation, splits.test)
    assert [len(part) for part in parts] == [1259, 179, 359]
    assert (splits.kind, splits.num_classes, splits.flip_safe) == ("image", 10, False)
    assert splits.note == ""
    for part in parts:
        counts = part.labels.bincount(minlength=10) / len(part)
        assert (counts - 0.1).abs().max() < 0.01
    torch.manual_seed(5)
    again = open_splits("digits", seed=2)
    assert all(map(same, parts, (again.train, again.validation, again.test)))


def test_digits_keep_all_samples_and_their_grey_levels():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    splits = open_splits("digits")
    parts = (splits.train, splits.validation, splits.test)
    pixels = torch.cat([part.inputs[0] for part in parts])
    assert pixels.shape == (1797, 1, 8, 8) and pixels.dtype == torch.uint8
    ours = torch.cat([pixels.flatten(1), torch.cat([p.labels for p in parts])[:, None]], 1)
    levels = torch.from_numpy(np.rint(images * 255 / 16)).long()
    theirs = torch.cat([levels, torch.from_numpy(labels)[:, None].long()], 1)
    assert sorted(ours.tolist()) == sorted(theirs.tolist())


# --- fashion-mnist


def idx_bytes(values):
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_idx(folder, part, images, labels, is_gzipped):
    folder.mkdir(exist_ok=True)
    for name, values in (
        (f"{part}-images-idx3-ubyte", images),
        (f"{part}-labels-idx1-ubyte", labels),
    ):
        content = idx_bytes(values)
        if is_gzipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


@pytest.fixture(params=[True, False], ids=["gz", "plain"])
def fashion(request, tmp_path):
    """24 training and 6 test images of 4x5; image i of train is full of i."""
    folder = tmp_path / "fashion"
    images = np.full((24, 4, 5), np.arange(24)[:, None, None], dtype=np.uint8)
    write_idx(folder, "train", images, np.arange(24, dtype=np.uint8) % 10, request.param)
    write_idx(folder, "t10k", images[:6] + 100, np.arange(6, dtype=np.uint8), request.param)
    return folder


def test_fashion_mnist_reads_idx_files_and_keeps_a_twelfth_for_validation(fashion):
    splits = open_splits(f"fashion-mnist:{fashion}")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (22, 2, 6)
    assert splits.train.inputs[0].shape == (22, 1, 4, 5)
    for part in (splits.train, splits.validation):
        assert torch.equal(part.inputs[0][:, 0, 0, 0].long() % 10, part.labels)
    values = torch.cat([splits.train.inputs[0], splits.validation.inputs[0]])[:, 0, 0, 0]
    assert values.sort().values.tolist() == list(range(24))
    assert splits.test.inputs[0][:, 0, 3, 4].tolist() == [100, 101, 102, 103, 104, 105]
    assert splits.flip_safe and splits.kind == "image"
    assert same(open_splits(f"fashion-mnist:{fashion}", seed=7).validation, splits.validation)


def test_the_test_files_are_not_needed_for_training(fashion):
    for path in fashion.glob("t10k*"):
        path.unlink()
    splits = open_splits(f"fashion-mnist:{fashion}")
    assert len(splits.train) == 22
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte.gz is missing"):
        _ = splits.test


def test_a_missing_fashion_mnist_says_how_to_install_it(tmp_path):
    with pytest.raises(
        DataError, match="train-images-.*.gz is missing; apt-get install dataset-fa"
    ):
        open_splits(f"fashion-mnist:{tmp_path}")


def test_a_torn_or_foreign_idx_file_is_named(fashion):
    images = next(fashion.glob("train-images*"))
    whole = images.read_bytes()
    for content in (b"", whole[:3], whole[:-1], b"\0\0\10\1" + whole[4:], b"GIF89a" * 9):
        images.write_bytes(content)
        with pytest.raises(DataError, match=f"{images.name} is damaged"):
            open_splits(f"fashion-mnist:{fashion}")


def test_an_idx_file_that_claims_more_than_it_holds_takes_no_memory(fashion):
    images = next(fashion.glob("train-images*"))
    for shape in ((2**31, 1, 1), (2**32 - 1,) * 3, (0, 4, 5), (2**20, 1, 1)):
        content = struct.pack(">4B3I", 0, 0, 8, 3, *shape) + bytes(9)
        images.write_bytes(gzip.compress(content) if images.suffix == ".gz" else content)
        tracemalloc.start()
        with pytest.raises(DataError, match=f"{images.name} is damaged"):
            open_splits(f"fashion-mnist:{fashion}")
        assert tracemalloc.get_traced_memory()[1] < 10**6
        tracemalloc.stop()


def test_images_and_labels_of_different_number_are_refused(fashion):
    labels = np.zeros(3, dtype=np.uint8)
    for path in fashion.glob("train-labels*"):
        content = idx_bytes(labels)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    with pytest.raises(DataError, match="fashion has 24 train images and 3 labels"):
        open_splits(f"fashion-mnist:{fashion}")


def test_the_real_fashion_mnist():
    if not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("apt-get install dataset-fashion-mnist")
    splits = open_splits("fashion-mnist")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (55000, 5000, 10000)
    assert splits.test.labels.bincount().tolist() == [1000] * 10
    # Published figures of the 60,000 training images (shared by torchvision's examples).
    assert (splits.facts.mean[0], splits.facts.std[0]) == pytest.approx((0.2860, 0.3530), abs=1e-3)


# --- imagefolder


@pytest.fixture
def folder(tmp_path):
    """DIR/{train,val,test}/{cat,dog}: 20, 3, 2 images of each; cats are dark, dogs bright."""
    for part, count in (("train", 20), ("val", 3), ("test", 2)):
        for name, value in (("cat", 10), ("dog", 200)):
            home = tmp_path / part / name
            home.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((7, 5 + i, 3), value, dtype=np.uint8)
                Image.fromarray(pixels).save(home / f"{i}.{'png' if i % 2 else 'JPG'}")
            (home / "notes.txt").write_text("not an image")
    return tmp_path


def test_an_image_folder_has_a_class_per_folder_and_the_models_size(folder):
    splits = open_splits(f"imagefolder:{folder}", inputs=IMAGE)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [40, 6, 4]
    assert (splits.num_classes, splits.note) == (2, "")
    images = splits.train.inputs[0]
    assert isinstance(images, LazyImages) and images.shape == (40, 3, 6, 8)
    pixels = images[torch.arange(40)].float().mean((1, 2, 3))
    assert torch.equal(pixels > 100, splits.train.labels == 1)
    assert splits.facts.mean == pytest.approx([105 / 255] * 3, abs=0.01)


def test_missing_parts_of_an_image_folder_come_out_of_train(folder):
    for part in ("val", "test"):
        (folder / part).rename(folder / f"other_{part}")
    splits = open_splits(f"imagefolder:{folder}", inputs=IMAGE)
    sizes = [s.labels.bincount().tolist() for s in (splits.train, splits.validation, splits.test)]
    assert sizes == [[14, 14], [2, 2], [4, 4]]
    parts = (splits.train, splits.validation, splits.test)
    assert len({path for part in parts for path in part.inputs[0].paths}) == 40
    assert splits.note.startswith("10 % for validation and 20 % for test")


def test_a_grey_model_gets_grey_images(folder):
    splits = open_splits(f"imagefolder:{folder}", inputs=(spec("x", (1, 4, 4)),))
    assert splits.train.inputs[0].shape == (40, 1, 4, 4)
    assert len(splits.facts.mean) == 1


def test_a_damaged_test_image_is_found_when_it_is_read(folder):
    (folder / "test" / "cat" / "0.JPG").write_bytes(b"torn")
    splits = open_splits(f"imagefolder:{folder}", inputs=IMAGE)
    with pytest.raises(DataError, match=r"test/cat/0.JPG is damaged"):
        splits.test.inputs[0][torch.arange(4)]


def test_an_image_that_claims_more_pixels_than_it_holds_is_refused(folder):
    path = folder / "test" / "cat" / "1.png"
    whole = path.read_bytes()
    head = b"IHDR" + struct.pack(">II", 9000, 9000) + whole[24:29]
    path.write_bytes(whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole[33:])
    test = open_splits(f"imagefolder:{folder}", inputs=IMAGE).test
    with pytest.raises(DataError, match="1.png is damaged .*81000000 pixels cannot be in a file"):
        test.inputs[0][torch.arange(4)]


def test_only_the_formats_that_are_named_are_decoded(folder):
    """Pillow would hand PostScript to another program."""
    path = folder / "test" / "cat" / "1.png"
    test = open_splits(f"imagefolder:{folder}", inputs=IMAGE).test
    for kind in ("EPS", "GIF", "BMP"):
        Image.new("RGB", (5, 5)).save(path, kind)
        with pytest.raises(DataError, match="1.png is damaged or no image"):
            test.inputs[0][torch.arange(4)]


def test_image_folders_that_do_not_fit(folder, tmp_path):
    name = f"imagefolder:{folder}"
    with pytest.raises(DataError, match="needs a model of one input 3xHxW .*takes x:float32:12"):
        open_splits(name, inputs=(spec("x", (12,)),))
    with pytest.raises(DataError, match="takes nothing known"):
        open_splits(name)
    (folder / "test" / "cow").mkdir()
    with pytest.raises(DataError, match=r"test/cow is no class that is trained \(cat, dog\)"):
        _ = open_splits(name, inputs=IMAGE).test
    (folder / "train" / "cow").mkdir()
    with pytest.raises(DataError, match="train/cow holds no .png or .jpg image"):
        open_splits(name, inputs=IMAGE)
    with pytest.raises(DataError, match=r"absent/train is missing; images lie in .*CLASS"):
        open_splits(f"imagefolder:{tmp_path}/absent", inputs=IMAGE)


# --- random, and names that are none


def test_random_images_and_labels_are_uniform():
    splits = open_splits("random:500", inputs=IMAGE, num_classes=4)
    images = splits.train.inputs[0]
    assert images.shape == (500, 3, 6, 8) and images.dtype == torch.uint8
    assert splits.kind == "image" and splits.facts.mean == pytest.approx([0.5] * 3, abs=0.01)
    counts = splits.train.labels.bincount(minlength=4)
    assert len(counts) == 4 and counts.min() > 80
    assert (len(splits.validation), len(splits.test)) == (100, 100)
    assert not torch.equal(splits.test.inputs[0], splits.validation.inputs[0])


def test_random_takes_the_models_dtypes_and_bounds_and_the_seed():
    inputs = (*TEXT, spec("value", (2,), "bfloat16"), spec("flag", (), "bool"))
    splits = open_splits("random:300", inputs=inputs, num_classes=2)
    ids, mask, value, flag = splits.train.inputs
    assert (ids.min(), ids.max()) == (0, 99)
    assert mask.unique().tolist() == [0, 1] and mask[:, 0].all()
    assert value.dtype == torch.bfloat16 and flag.dtype == torch.bool
    assert same(open_splits("random:300", 0, inputs=inputs, num_classes=2).train, splits.train)
    assert not same(open_splits("random:300", 1, inputs=inputs, num_classes=2).train, splits.train)


def test_random_labels_of_several_are_two_of_ten():
    labels = open_splits(
        "random:500", inputs=IMAGE, num_classes=10, task="multi-label"
    ).train.labels
    assert labels.dtype == torch.bool and labels.shape == (500, 10)
    assert labels.sum(1).float().mean() == pytest.approx(2, abs=0.3)
    assert labels.sum(0).min() > 50
    few = open_splits("random:500", inputs=IMAGE, num_classes=2, task="multi-label").train.labels
    assert len(few.unique(dim=0)) == 4


@pytest.mark.parametrize("name", ["random:0", "random:many", "random:-3"])
def test_random_needs_a_number(name):
    with pytest.raises(DataError, match=f"'{name}' is not random:N"):
        open_splits(name, inputs=IMAGE)


def test_random_needs_the_models_inputs():
    with pytest.raises(DataError, match="random:5 needs the model's inputs"):
        open_splits("random:5")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "no data set 'digit'; did you mean digits"),
        ("fashion_mnist", r"did you mean fashion-mnist\[:DIR\]"),
        ("cifar10", "no data set 'cifar10'; known are digits, .*random:N"),
        ("npz", "did you mean npz:FILE"),
        ("digits:8", "no data set 'digits:8'"),
        ("", "no data set ''"),
    ],
)
def test_an_unknown_data_set_gives_the_known_ones(name, message):
    with pytest.raises(DataError, match=message):
        open_splits(name, inputs=IMAGE)
