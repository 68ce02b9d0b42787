"""Samples become what the model takes, or an error names what does not fit."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from scpl_compile.errors import DataError
from scpl_compile.ir import InputSpec
from scpl_compile.runtime.fit import ImageFit, check_images, check_split, luminance
from scpl_compile.runtime.splits import Split, make_splits


def spec(shape, dtype="float32", high=None, name="x"):
    return InputSpec(name=name, dtype=dtype, shape=shape, high=high)


def images_of(channels, height=8, width=8, count=30):
    values = torch.randint(256, (count, channels, height, width), dtype=torch.uint8)
    split = Split(inputs=(values,), labels=torch.arange(count) % 3)
    return make_splits("pictures", "image", split, split, lambda: split)


def fitted(splits, item):
    """The training images as the model gets them, by `ImageFit`."""
    fit = ImageFit.of(splits, item)
    return fit.finish(fit.resize(splits.train.inputs[0]).float() / 255)


def test_equal_size_and_channels_are_only_normalised():
    splits = images_of(3)
    result = fitted(splits, spec((3, 8, 8)))
    assert ImageFit.of(splits, spec((3, 8, 8))).describe() == []
    moments = result.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(moments.mean(1), torch.zeros(3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        moments.std(1, correction=0), torch.ones(3).double(), rtol=1e-6, atol=0
    )


def test_one_channel_is_repeated_and_the_image_resized():
    splits = images_of(1)
    fit = ImageFit.of(splits, spec((3, 32, 24)))
    result = fitted(splits, spec((3, 32, 24)))
    assert result.shape == (30, 3, 32, 24) and result.is_contiguous()
    assert torch.equal(result[:, 0], result[:, 1]) and torch.equal(result[:, 0], result[:, 2])
    resized = F.interpolate(splits.train.inputs[0].double(), (32, 24), mode="bilinear")
    expected = (resized[:, 0] / 255 - splits.facts.mean[0]) / splits.facts.std[0]
    torch.testing.assert_close(  # the resized image is rounded to grey levels
        result[:, 0].double(), expected, rtol=0, atol=1.01 / 255 / splits.facts.std[0]
    )
    assert fit.describe() == ["8x8 images resized to 32x24", "one channel repeated to 3"]


@pytest.mark.parametrize("size", [(5, 3), (16, 20), (4, 20)])
def test_shrinking_is_antialiased_and_growing_is_plain_bilinear(size):
    images = images_of(3).train.inputs[0]
    resized = ImageFit.of(images_of(3), spec((3, *size))).resize(images)
    assert resized.dtype == torch.uint8
    expected = F.interpolate(images.double(), size, mode="bilinear", antialias=True)
    assert (resized - expected).abs().max() < 1.01  # rounded once for each direction
    if size > (8, 8):
        plain = F.interpolate(images.double(), size, mode="bilinear")
        torch.testing.assert_close(plain, expected)


def test_three_channels_become_one_by_luminance():
    splits = images_of(3)
    result = fitted(splits, spec((1, 8, 8))).double()
    gray = tv.rgb_to_grayscale(splits.train.inputs[0].double() / 255)
    assert result.mean().abs() < 1e-5
    # Independent channels: luminance varies less than its channels do.
    correlation = torch.corrcoef(torch.stack([result.flatten(), gray.flatten()]))[0, 1]
    assert correlation == pytest.approx(1, abs=1e-6) and 0.5 < result.std() <= 1
    assert ImageFit.of(splits, spec((1, 8, 8))).describe() == ["three channels to one (luminance)"]


def test_luminance_is_torchvisions():
    images = torch.rand(4, 3, 5, 6)
    torch.testing.assert_close(luminance(images), tv.rgb_to_grayscale(images))
    assert torch.equal(luminance(images[:, :1]), images[:, :1])


@pytest.mark.parametrize("shape", [(64,), (8, 8), (4, 16)])
def test_images_are_read_as_a_vector_or_as_rows(shape):
    splits = images_of(1)
    result = fitted(splits, spec(shape))
    assert torch.equal(result, fitted(splits, spec((1, 8, 8))).view(-1, *shape))
    text = "x".join(map(str, shape))
    assert ImageFit.of(splits, spec(shape)).describe() == [f"1x8x8 images read as {text}"]


def test_the_models_dtype_is_given():
    splits = images_of(1)
    assert fitted(splits, spec((1, 8, 8), "float64")).dtype == torch.float64
    assert fitted(splits, spec((1, 8, 8), "bfloat16")).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (spec((3, 8, 8), "int64", 9), "has 1x8x8 images; input 'x' is int64, not floats"),
        (spec((4, 8, 8)), "input 'x' takes 4x8x8, which they become only as 1xHxW, 3xHxW or 64 va"),
        (spec((65,)), "input 'x' takes 65, which"),
        (spec(()), "input 'x' takes one number, which"),
    ],
)
def test_images_that_cannot_become_the_input(item, message):
    with pytest.raises(DataError, match=message):
        ImageFit.of(images_of(1), item)


def check(inputs, labels, items, num_classes=10, part="train"):
    split = Split(inputs=inputs, labels=torch.as_tensor(labels))
    check_split("mine", part, split, inputs=items, num_classes=num_classes)


def test_what_fits_passes():
    ids = torch.tensor([[0, 99], [5, 3]])
    check(
        (ids, torch.zeros(2, 3, dtype=torch.float64)),
        [0, 9],
        (spec((2,), "int64", 100), spec((3,))),
    )
    check((torch.zeros(2, dtype=torch.int64),), [1, 1], (spec((), "float32"),))  # one class is fine


@pytest.mark.parametrize(
    ("labels", "task", "message"),
    [
        (torch.arange(3), "multi-label", "mine has one label per sample; .* --task multi-label"),
        (torch.ones(3, 10).bool(), "single-label", "mine has several labels per sample; .* single"),
        (
            torch.ones(3, 7).bool(),
            "multi-label",
            r"mine: train has 7 labels \(columns\), the model gives 10 .* with --num-classes 7",
        ),
        (torch.zeros(0, 10).bool(), "multi-label", "mine: train has no sample"),
    ],
)
def test_labels_of_another_task_are_refused(labels, task, message):
    split = Split(inputs=(torch.zeros(len(labels), 3),), labels=labels)
    with pytest.raises(DataError, match=message):
        check_split("mine", "train", split, (spec((3,)),), 10, task)
    splits = images_of(1)
    split = Split(inputs=(splits.train.inputs[0][: len(labels)],), labels=labels)
    with pytest.raises(DataError, match=message):
        check_images("mine", "train", split, ImageFit.of(splits, spec((1, 8, 8))), 10, task)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [0, 12, 3],
            "mine: label 12 at train sample 1 is out of range for 10 .*; pass --num-classes 13",
        ),
        ([0, 10, 11], "label 11 at train sample 2 .*pass --num-classes 12"),
        ([0, 3, -1], "mine: label -1 at train sample 2 is out of range; labels go from 0"),
        ([], "mine: train has no sample"),
    ],
)
def test_labels_out_of_range_are_named_with_their_sample(labels, message):
    labels = torch.tensor(labels, dtype=torch.int64)
    with pytest.raises(DataError, match=message):
        check((torch.zeros(len(labels), 3),), labels, (spec((3,)),))
    splits = images_of(1)
    split = Split(inputs=(splits.train.inputs[0][: len(labels)],), labels=labels)
    with pytest.raises(DataError, match=message):
        check_images("mine", "train", split, ImageFit.of(splits, spec((1, 8, 8))), 10)


@pytest.mark.parametrize(
    ("values", "item", "message"),
    [
        (
            torch.zeros(3, 4),
            spec((5,)),
            "mine: validation input 'x' has the shape 4 per sample, .* 5",
        ),
        (torch.zeros(3), spec((5,)), "has the shape one number per sample, the model takes 5"),
        (torch.zeros(3, 2, 4), spec((2, 5)), "has the shape 2x4 per sample, the model takes 2x5"),
        (torch.zeros(3, 5), spec((5,), "int64", 9), "input 'x' is float32, the model takes int64"),
        (torch.zeros(3, 5).cfloat(), spec((5,)), "input 'x' is complex64, the model takes float32"),
        (
            torch.tensor([[1, 1], [2, 9], [9, 1]]),
            spec((2,), "int8", 9),
            "9 at sample 1, .*takes 0 to 8",
        ),
        (
            torch.tensor([[1, 1], [2, 3], [-4, 1]]),
            spec((2,), "int8", 9),
            "value -4 at sample 2, the mo",
        ),
    ],
)
def test_an_input_that_does_not_fit_is_named(values, item, message):
    with pytest.raises(DataError, match=message):
        check((values,), [0, 1, 2], (item,), part="validation")


def test_another_number_of_inputs_is_refused():
    items = (spec((2,), "int64", 5, "ids"), spec((2,), "int64", 2, "mask"))
    with pytest.raises(DataError, match=r"train has 1 inputs, the model takes 2 \(ids:int64:2<5, "):
        check((torch.zeros(1, 2),), [0], items)


def test_a_split_of_another_kind_than_train_is_refused():
    fit = ImageFit.of(images_of(1), spec((1, 8, 8)))
    check_images("mine", "test", images_of(1, 9, 4).train, fit, 3)  # another size is resized
    with pytest.raises(DataError, match="test has torch.uint8 3x8x8, train has uint8 images 1x8x8"):
        check_images("mine", "test", images_of(3).train, fit, 3)
    floats = Split(inputs=(torch.zeros(2, 1, 8, 8),), labels=torch.tensor([0, 1]))
    with pytest.raises(DataError, match=r"test has torch.float32 1x8x8"):
        check_images("mine", "test", floats, fit, 3)
