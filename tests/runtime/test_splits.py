"""Train, validation and test, and the statistics of images."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scpl_compile.errors import DataError
from scpl_compile.runtime.splits import (
    LazyImages,
    Split,
    channel_statistics,
    make_splits,
    stratified,
)


def numbered(labels):
    """Samples whose value is their row."""
    return Split(inputs=(torch.arange(len(labels)),), labels=torch.as_tensor(labels))


@given(
    st.lists(st.integers(-2, 4), min_size=1, max_size=200),
    st.lists(st.floats(0, 0.45), max_size=2),
)
def test_stratified_parts_are_a_partition_with_every_class_in_its_share(labels, shares):
    labels = torch.tensor(labels)
    parts = stratified(labels, shares)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(labels)))
    for share, rows in zip(shares, parts[1:], strict=True):
        assert torch.equal(rows, rows.sort().values)
        for label in labels.unique():
            here, everywhere = (labels[rows] == label).sum(), (labels == label).sum()
            assert abs(here - share * everywhere) <= 0.5 + 1e-6


def test_stratified_is_fixed_whatever_was_seeded():
    labels = torch.arange(60) % 3
    first = stratified(labels, (0.2,))
    torch.manual_seed(99)
    assert all(map(torch.equal, first, stratified(labels, (0.2,))))
    assert not torch.equal(first[1], torch.arange(12))  # mixed


def test_rows_of_several_labels_are_divided_by_chance():
    labels = torch.rand(100, 3) < 0.4
    parts = stratified(labels, (0.1, 0.2))
    assert [len(rows) for rows in parts] == [70, 10, 20]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(100))
    assert not torch.equal(parts[1], torch.arange(10))


def test_a_row_that_alone_has_a_label_stays_in_the_rest():
    labels = torch.rand(100, 3) < 0.4
    before = stratified(labels, (0.1, 0.2))
    rare = torch.zeros(100, 2, dtype=torch.bool)
    rare[before[1][3], 0] = rare[before[2][5], 0] = rare[before[0][0], 1] = True
    rare[before[2][6], 1] = True  # which another row of the rest has
    parts = stratified(torch.cat([labels, rare], 1), (0.1, 0.2))
    assert [len(rows) for rows in parts] == [72, 9, 19]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(100))
    assert rare[parts[0]].sum(0).tolist() == [2, 1]
    assert all(torch.equal(rows, rows.sort().values) for rows in parts)


def test_missing_parts_come_out_of_train_and_the_note_says_so():
    splits = make_splits("mine", "tensor", numbered([0, 1] * 50))
    sizes = (len(splits.train), len(splits.validation), len(splits.test))
    assert sizes == (70, 10, 20)
    rows = torch.cat([s.inputs[0] for s in (splits.train, splits.validation, splits.test)])
    assert torch.equal(rows.sort().values, torch.arange(100))
    assert splits.test is splits.test
    assert splits.note == (
        "10 % for validation and 20 % for test taken out of its training samples"
    )


def test_parts_that_are_there_are_kept_and_test_is_read_when_it_is_asked_for():
    reads = []

    def read_test():
        reads.append(1)
        return numbered([2])

    train, validation = numbered([0, 1, 4]), numbered([1])
    splits = make_splits("mine", "tensor", train, validation, read_test)
    assert splits.train is train and splits.validation is validation
    assert (splits.num_classes, splits.note, reads) == (5, "", [])
    assert splits.test is splits.test and reads == [1]


def test_a_data_set_that_is_too_small_to_share_is_refused():
    with pytest.raises(DataError, match="mine has 2 training samples, too few to take a valida"):
        make_splits("mine", "tensor", numbered([0, 1]))
    with pytest.raises(DataError, match="mine has no training sample"):
        make_splits("mine", "tensor", numbered([]))


def test_inputs_and_labels_of_different_length_are_refused():
    with pytest.raises(DataError, match="input 1 has 4 samples and 3 labels"):
        Split(inputs=(torch.zeros(3), torch.zeros(4)), labels=torch.zeros(3))


def test_statistics_are_those_of_all_pixels():
    images = torch.randint(256, (37, 3, 9, 11), dtype=torch.uint8)
    mean, std = channel_statistics(images)
    pixels = images.double().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(torch.tensor(mean).double(), pixels.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.tensor(std).double(), pixels.std(1, correction=0), rtol=1e-6, atol=0
    )
    assert channel_statistics(images.flip(0)) == (mean, std)


def test_a_constant_channel_has_std_1():
    images = torch.full((200, 1, 64, 64), 77, dtype=torch.uint8)
    assert channel_statistics(images) == ((77 / 255,), (1.0,))


@pytest.fixture
def image_files(tmp_path):
    """Four 6x4 colour images, lossless, and their pixels (4, 3, 4, 6)."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 6, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    paths = tuple(tmp_path / f"{i}.png" for i in range(4))
    return paths, torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_lazy_images_are_decoded_when_indexed(image_files):
    paths, pixels = image_files
    images = LazyImages(paths=paths, size=(3, 4, 6))
    assert (len(images), images.shape, images.dtype) == (4, (4, 3, 4, 6), torch.uint8)
    rows = torch.tensor([2, 0, 2])
    assert torch.equal(images[rows], pixels[rows])
    assert torch.equal(images.subset(rows)[torch.tensor([1])], pixels[[0]])
    assert images[torch.tensor([], dtype=torch.int64)].shape == (0, 3, 4, 6)
    assert channel_statistics(images) == channel_statistics(pixels)


def test_lazy_images_are_resized_and_made_grey(image_files):
    paths, pixels = image_files
    images = LazyImages(paths=paths, size=(1, 2, 3))[torch.arange(4)]
    assert images.shape == (4, 1, 2, 3) and images.dtype == torch.uint8
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    gray = (pixels * weights).sum(1, keepdim=True)
    expected = torch.nn.functional.interpolate(gray, (2, 3), mode="bilinear", antialias=True)
    torch.testing.assert_close(images.float(), expected, rtol=0, atol=2)


def test_a_damaged_image_is_named(image_files):
    paths, _ = image_files
    whole = paths[1].read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        paths[1].write_bytes(content)
        with pytest.raises(DataError, match=r"1.png is damaged or no image"):
            LazyImages(paths=paths, size=(3, 4, 6))[torch.arange(4)]
