"""The loader: every batch a pure function of (seed, epoch, index), fitted to the model."""

import random
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scpl_compile.errors import DataError
from scpl_compile.ir import InputSpec
from scpl_compile.runtime.data import Batch, Loader
from scpl_compile.runtime.datasets import open_splits
from scpl_compile.runtime.splits import Split, make_splits

IMAGE = InputSpec(name="x", dtype="float32", shape=(3, 16, 16))
NUMBER = InputSpec(name="number", dtype="int64", shape=(), high=1000)


def image_splits(count=50, flip_safe=True):
    images = torch.randint(
        256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
    )
    train = Split(inputs=(images,), labels=torch.arange(count) % 10)
    few = train.subset(torch.arange(min(7, count)))
    return make_splits("pictures", "image", train, few, lambda: few, flip_safe=flip_safe)


def image_loader(splits=None, **options):
    arguments = {"batch_size": 16, "augment": "strong", "seed": 3, **options}
    return Loader(splits or image_splits(), inputs=(IMAGE,), num_classes=10, **arguments)


def numbered_loader(count=50, **options):
    """Samples whose value is their row."""
    train = Split(inputs=(torch.arange(count),), labels=torch.arange(count) % 10)
    splits = make_splits("numbers", "tensor", train, train, lambda: train)
    arguments = {"batch_size": 16, "num_classes": 10, **options}
    return Loader(splits, inputs=(NUMBER,), **arguments)


def same(one, other):
    assert one.views == other.views
    pairs = zip((*one.inputs, one.labels), (*other.inputs, other.labels), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def rng_states():
    return (
        torch.get_rng_state().tolist(),
        [value.tolist() if hasattr(value, "tolist") else value for value in np.random.get_state()],
        random.getstate(),
    )


# --- a pure function


@pytest.mark.parametrize("augment", ["none", "basic", "strong"])
def test_a_batch_is_the_same_in_any_order_and_in_any_loader(augment):
    loader = image_loader(augment=augment)
    in_order = [loader.batch(epoch, i) for epoch in range(2) for i in range(loader.num_batches)]
    torch.manual_seed(77)
    fresh = image_loader(augment=augment)
    places = [(epoch, i) for epoch in range(2) for i in range(fresh.num_batches)]
    for place, expected in reversed(list(zip(places, in_order, strict=True))):
        assert same(fresh.batch(*place), expected)
        assert same(loader.batch(*place), expected)


@pytest.mark.parametrize("augment", ["none", "strong"])
def test_seeds_epochs_and_batches_differ(augment):
    loader, other = image_loader(augment=augment), image_loader(augment=augment, seed=4)
    first = loader.batch(0, 0).inputs[0]
    for batch in (loader.batch(0, 1), loader.batch(1, 0), other.batch(0, 0)):
        assert not torch.equal(batch.inputs[0], first)


def test_a_sample_is_augmented_anew_in_every_epoch():
    one = image_splits(count=1)
    loader = image_loader(one, augment="basic", batch_size=1)
    seen = [loader.batch(epoch, 0).inputs[0] for epoch in range(12)]
    assert not all(torch.equal(image, seen[0]) for image in seen)


def test_the_processs_generators_are_neither_read_nor_moved():
    loader = image_loader()
    before = rng_states()
    batches = [*loader.epoch(0), *loader.evaluation("validation"), loader.batch(3, 1)]
    open_splits("random:20", inputs=(IMAGE,))
    assert batches and rng_states() == before


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 5), st.integers(0, 2**62))
def test_an_epoch_holds_every_sample_once(count, batch_size, epoch, seed):
    loader = numbered_loader(count, batch_size=batch_size, seed=seed)
    batches = list(loader.epoch(epoch))
    assert len(batches) == loader.num_batches == -(-count // batch_size)
    assert all(len(batch.labels) == batch_size for batch in batches[:-1])
    rows = torch.cat([batch.inputs[0] for batch in batches])
    assert torch.equal(rows.sort().values, torch.arange(count))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), rows % 10)


def test_drop_last_leaves_whole_batches():
    loader = numbered_loader(50, drop_last=True)
    assert loader.num_batches == 3
    assert [len(batch.labels) for batch in loader.epoch(0)] == [16, 16, 16]
    with pytest.raises(DataError, match="numbers has 5 training samples, no whole batch of 16"):
        numbered_loader(5, drop_last=True)


def test_a_batch_size_above_the_split_gives_one_batch():
    loader = numbered_loader(5)
    assert loader.num_batches == 1
    assert len(next(loader.epoch(0)).labels) == 5


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_resuming_in_the_middle_gives_the_rest(start):
    loader = image_loader()
    whole = list(loader.epoch(2))
    rest = list(image_loader().epoch(2, start))
    assert len(rest) == len(whole) - start
    assert all(map(same, rest, whole[start:]))


def test_a_batch_that_is_not_there():
    loader = numbered_loader()
    for index in (-1, loader.num_batches):
        with pytest.raises(IndexError, match=f"batch {index} of 4"):
            loader.batch(0, index)


# --- what a batch holds


def test_strong_has_two_views_and_the_labels_once():
    loader = image_loader(augment="strong")
    batch, plain = loader.batch(0, 0), image_loader(augment="none").batch(0, 0)
    assert batch.inputs[0].shape == (32, 3, 16, 16) and batch.inputs[0].dtype == torch.float32
    assert (batch.views, plain.views) == (2, 1)
    assert batch.labels.shape == (16,) and torch.equal(batch.labels, plain.labels)
    basic = image_loader(augment="basic").batch(0, 0)
    assert torch.equal(batch.inputs[0][:16], basic.inputs[0])  # the weak view comes first
    assert loader.batch(0, 3).inputs[0].shape[0] == 4  # the last batch of 50 has 2 samples


@pytest.mark.parametrize("flip_safe", [True, False])
def test_a_data_set_that_must_not_be_mirrored_is_not(flip_safe):
    ramps = torch.arange(0, 160, 10, dtype=torch.uint8).expand(300, 1, 16, 16)
    train = Split(inputs=(ramps,), labels=torch.arange(300) % 10)
    splits = make_splits("ramps", "image", train, train, lambda: train, flip_safe=flip_safe)
    (images,) = image_loader(splits, augment="strong", batch_size=300).batch(0, 0).inputs
    is_mirrored = images[:, :, 8, 4].mean(1) > images[:, :, 8, 11].mean(1)
    assert is_mirrored.any() == flip_safe


def test_digits_are_fitted_and_it_is_said():
    spec = InputSpec(name="x", dtype="float32", shape=(3, 32, 32))
    splits = open_splits("digits")
    loader = Loader(splits, inputs=(spec,), num_classes=10, batch_size=64)
    assert loader.fit_notice == "digits: 8x8 images resized to 32x32, one channel repeated to 3"
    assert next(loader.epoch(0)).inputs[0].shape == (64, 3, 32, 32)
    same_size = InputSpec(name="x", dtype="float32", shape=(1, 8, 8))
    assert Loader(splits, inputs=(same_size,), num_classes=10, batch_size=64).fit_notice is None


def test_splits_that_were_taken_out_of_train_are_said():
    train = Split(inputs=(torch.arange(100),), labels=torch.arange(100) % 10)
    splits = make_splits("mine", "tensor", train, train)
    loader = Loader(splits, inputs=(NUMBER,), num_classes=10, batch_size=64)
    assert loader.fit_notice == "mine: 20 % for test taken out of its training samples"


def test_tensors_are_given_in_the_models_dtype():
    values = torch.randn(20, 4, dtype=torch.float64)
    train = Split(inputs=(values,), labels=torch.arange(20) % 2)
    splits = make_splits("mine", "tensor", train, train, lambda: train)
    spec = InputSpec(name="x", dtype="bfloat16", shape=(4,))
    loader = Loader(splits, inputs=(spec,), num_classes=2, batch_size=20)
    (batch,) = loader.evaluation("train")
    assert torch.equal(batch.inputs[0], values.to(torch.bfloat16))
    assert loader.fit_notice is None


@pytest.mark.parametrize(("name", "count"), [("train", 50), ("validation", 7), ("test", 7)])
def test_evaluation_is_in_file_order_and_not_augmented(name, count):
    splits = image_splits()
    loader = image_loader(splits, augment="strong", batch_size=3)
    batches = list(loader.evaluation(name))
    assert torch.equal(torch.cat([b.labels for b in batches]), torch.arange(count) % 10)
    assert {batch.views for batch in batches} == {1}
    plain = list(image_loader(splits, augment="none", batch_size=50).evaluation(name))[0]
    torch.testing.assert_close(torch.cat([b.inputs[0] for b in batches]), plain.inputs[0])


def test_there_are_three_splits():
    loader = numbered_loader()
    with pytest.raises(DataError, match="numbers has no split 'valid'; train, validation or test"):
        loader.evaluation("valid")


# --- the background thread


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_no_thread_is_left_by_an_epoch_that_ends_early():
    loader = image_loader()
    batches = loader.epoch(0)
    next(batches)
    assert len(prefetch_threads()) == 1
    del batches
    for _ in loader.epoch(0):
        break
    list(loader.epoch(0))
    assert prefetch_threads() == []


def test_a_damaged_image_reaches_the_training_loop_by_name(tmp_path):
    for part, name in ((p, n) for p in ("train", "test") for n in ("cat", "dog")):
        home = tmp_path / part / name
        home.mkdir(parents=True)
        for i in range(10):
            Image.fromarray(np.zeros((5, 5), dtype=np.uint8)).save(home / f"{i}.png")
    splits = open_splits(f"imagefolder:{tmp_path}", inputs=(IMAGE,))
    loader = image_loader(splits, batch_size=2)
    assert len(list(loader.epoch(0))) == loader.num_batches == 9
    damaged = splits.train.inputs[0].paths[0]
    damaged.write_bytes(b"torn")
    with pytest.raises(DataError, match=f"{damaged.name} is damaged"):
        list(loader.epoch(0))


# --- replicas, and ranks that need no inputs


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 3))
def test_shares_are_equal_and_hold_every_view_of_their_samples(count, views, rest, each):
    size = count * each + min(rest, count - 1)
    rows = torch.arange(size)
    values = torch.cat([rows + 100 * view for view in range(views)])
    batch = Batch(inputs=(values, values.unsqueeze(1).float()), labels=rows % 7, views=views)
    shares = [batch.share(index, count) for index in range(count)]
    for index, share in enumerate(shares):
        own = torch.arange(index * each, (index + 1) * each)
        assert share.labels.tolist() == (own % 7).tolist() and share.views == views
        expected = torch.cat([own + 100 * view for view in range(views)])
        assert torch.equal(share.inputs[0], expected)
        assert torch.equal(share.inputs[1], expected.unsqueeze(1).float())


def test_a_loader_gives_its_share_of_training_batches_and_all_of_the_others():
    whole = image_loader()
    halves = [image_loader(share=(index, 2)) for index in range(2)]
    for index in range(whole.num_batches):
        batch = whole.batch(1, index)
        for replica, half in enumerate(halves):
            assert same(half.batch(1, index), batch.share(replica, 2))
    for one, other in zip(halves[1].evaluation("test"), whole.evaluation("test"), strict=True):
        assert same(one, other)


class Untouchable(torch.Tensor):
    """Tells whoever reads a value."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            raise AssertionError("an input was read")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("augment", ["none", "strong"])
@pytest.mark.parametrize("share", [(0, 1), (1, 2)])
def test_a_loader_that_reads_nothing_has_the_same_shapes_and_labels(augment, share):
    pairs = [
        (image_loader, {"augment": augment, "share": share}),
        (numbered_loader, {"share": share}),
    ]
    for make, options in pairs:
        reading, blind = make(**options), make(**options, reads=False)
        splits = blind.splits
        untouchable = tuple(values.as_subclass(Untouchable) for values in splits.train.inputs)
        train = Split(inputs=untouchable, labels=splits.train.labels)
        object.__setattr__(splits, "train", train)
        with pytest.raises(AssertionError, match="an input was read"):
            reading._make(train, torch.arange(2), torch.Generator())
        batches = [(reading.epoch(1), blind.epoch(1))]
        batches += [(reading.evaluation(name), blind.evaluation(name)) for name in ("test",)]
        for one, other in (pair for both in batches for pair in zip(*both, strict=True)):
            assert torch.equal(one.labels, other.labels) and one.views == other.views
            for values, shape_only in zip(one.inputs, other.inputs, strict=True):
                assert (values.shape, values.dtype) == (shape_only.shape, shape_only.dtype)
                assert shape_only.is_meta


# --- what is refused, before anything is trained


def test_train_and_validation_are_checked_at_once_and_test_when_it_is_read():
    good = Split(inputs=(torch.arange(20),), labels=torch.arange(20) % 10)
    bad = Split(inputs=(torch.arange(20),), labels=torch.full((20,), 12))
    loading = {"inputs": (NUMBER,), "num_classes": 10, "batch_size": 4}
    for part, arguments in (("train", (bad, good)), ("validation", (good, bad))):
        splits = make_splits("mine", "tensor", *arguments, lambda: good)
        with pytest.raises(DataError, match=f"mine: label 12 at {part} sample 0 .*classes 13"):
            Loader(splits, **loading)
    loader = Loader(make_splits("mine", "tensor", good, good, lambda: bad), **loading)
    with pytest.raises(DataError, match="mine: label 12 at test sample 0"):
        loader.evaluation("test")


def test_data_that_is_only_evaluated_on_needs_no_training_samples():
    good = Split(inputs=(torch.arange(20),), labels=torch.arange(20) % 10)
    none = good.subset(torch.arange(0))
    splits = replace(make_splits("mine", "tensor", good, good, lambda: good), train=none)
    loading = {"inputs": (NUMBER,), "num_classes": 10, "batch_size": 4}
    with pytest.raises(DataError, match="mine: train has no sample"):
        Loader(splits, **loading)
    loader = Loader(splits, **loading, trains=False)
    assert loader.num_batches == 0 and len(list(loader.evaluation("test"))) == 5
    with pytest.raises(DataError, match="mine: train has no sample"):
        loader.evaluation("train")
    bad = Split(inputs=(torch.arange(20),), labels=torch.full((20,), 12))
    with pytest.raises(DataError, match="mine: label 12 at validation sample 0"):
        Loader(replace(splits, validation=bad), **loading, trains=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "the batch size is 0; give at least 1"),
        ({"augment": "srtong"}, "augment 'srtong' is not one of none, basic, strong"),
        ({"augment": "basic"}, "augment 'basic' needs images, and numbers has none; pass --aug"),
        ({"num_classes": 5}, "label 9 at train sample 9 is out of range for 5 classes"),
    ],
)
def test_options_that_do_not_go_with_the_data(options, message):
    with pytest.raises(DataError, match=message):
        numbered_loader(**options)


def test_inputs_that_do_not_go_with_the_data():
    other = InputSpec(name="ids", dtype="int64", shape=(4,), high=9)
    with pytest.raises(DataError, match="pictures has images alone; the model takes x:.*, ids:"):
        Loader(image_splits(), inputs=(IMAGE, other), num_classes=10, batch_size=4)
    with pytest.raises(DataError, match="numbers: train has 1 inputs, the model takes 2"):
        Loader(numbered_loader().splits, inputs=(NUMBER, other), num_classes=10, batch_size=4)


def test_a_split_of_one_class_is_loaded():
    train = Split(inputs=(torch.arange(9),), labels=torch.zeros(9, dtype=torch.int64))
    splits = make_splits("mine", "tensor", train, train, lambda: train)
    loader = Loader(splits, inputs=(NUMBER,), num_classes=10, batch_size=4)
    assert [batch.labels.sum().item() for batch in loader.epoch(0)] == [0, 0, 0]
