"""Crop, mirror and colour: what they may do to an image, drawn from nothing but the generator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from scpl_compile.errors import DataError
from scpl_compile.runtime import augment as module
from scpl_compile.runtime.augment import augment, crop_and_mirror, jitter, num_views


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(count=16, channels=3, height=16, width=16):
    return torch.randint(256, (count, channels, height, width), dtype=torch.uint8)


@settings(max_examples=20)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3]), st.booleans())
def test_a_crop_is_a_window_of_the_framed_image_mirrored_or_not(height, width, channels, mirror):
    images = pixels(8, channels, height, width)
    cropped = crop_and_mirror(images, seeded(), mirror=mirror)
    assert cropped.shape == images.shape and cropped.dtype == torch.uint8
    framed = F.pad(images, (width // 8, width // 8, height // 8, height // 8))
    windows = framed.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, top, left, H, W)
    for i in range(8):
        hits = [(windows[i] == cropped[i][:, None, None]).all(-1).all(-1).all(0).any()]
        if mirror:
            turned = cropped[i].flip(-1)
            hits.append((windows[i] == turned[:, None, None]).all(-1).all(-1).all(0).any())
        assert any(hits)


def test_every_offset_is_drawn_and_half_of_the_images_are_mirrored():
    columns = torch.arange(1, 33, dtype=torch.uint8)
    images = (columns + columns[:, None] * 5).to(torch.uint8).expand(4000, 1, 32, 32).contiguous()
    marked = torch.zeros_like(images)
    marked[:, :, 16, 16] = 255
    cropped = crop_and_mirror(marked, seeded(3), mirror=False)
    rows, found = (cropped == 255).flatten(1).nonzero().unbind(1)
    assert torch.equal(rows, torch.arange(4000))
    offsets = torch.stack([found // 32, found % 32]) - 12  # 16 + padding 4 - offset
    for axis in offsets:
        assert (axis.bincount(minlength=9) - 4000 / 9).abs().max() < 100
    assert len(axis.unique()) == 9
    flipped = crop_and_mirror(images, seeded(), mirror=True)
    is_mirrored = flipped[:, 0, 16, 10] > flipped[:, 0, 16, 20]
    assert is_mirrored.float().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("factor", [-0.4, -0.13, 0.0, 0.31, 0.4])
@pytest.mark.parametrize(
    ("change", "reference"),
    [
        (module._brightness, tv.adjust_brightness),
        (module._contrast, tv.adjust_contrast),
        (module._saturation, tv.adjust_saturation),
    ],
)
def test_colour_changes_are_torchvisions(change, reference, factor):
    images = torch.rand(5, 3, 9, 7)
    for batch in (images, images[:, :1]):
        expected = torch.stack([reference(image, 1 + factor) for image in batch])
        factors = torch.full((5, 1, 1, 1), factor)
        torch.testing.assert_close(change(batch, factors), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.03, 0.0, 0.07, 0.1, 0.5])
def test_hue_is_torchvisions(turn):
    images = torch.rand(5, 3, 9, 7)
    images[0, :, 0] = images[0, :1, 0]  # grey
    images[1, 1:, 0] = images[1, 1, 0]  # two channels equal
    images[2] = 0
    images[3] = 1
    expected = tv.adjust_hue(images, turn)
    ours = module._hue(images, torch.full((5, 1, 1, 1), turn))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert torch.equal(module._hue(images[:, :1], torch.tensor(turn)), images[:, :1])


def test_jitter_changes_four_in_five_and_greys_one_in_five():
    images = torch.rand(4000, 3, 2, 2) * 0.5 + 0.25
    changed = jitter(images, seeded())
    assert changed.shape == images.shape
    assert changed.min() >= 0 and changed.max() <= 1
    is_gray = (changed.amax(1) - changed.amin(1)).flatten(1).amax(1) < 1e-6
    assert is_gray.float().mean() == pytest.approx(0.2, abs=0.02)
    is_same = (changed == images).flatten(1).all(1)
    assert is_same.float().mean() == pytest.approx(0.2 * 0.8, abs=0.02)


def test_jitter_of_one_image_follows_its_own_draws(monkeypatch):
    """Image by image through torchvision, with the strengths and orders that jitter drew."""
    images = torch.rand(40, 3, 6, 5)
    draws = seeded(4)
    factors = (2 * torch.rand(40, 4, generator=draws) - 1) * torch.tensor([0.4, 0.4, 0.4, 0.1])
    order = torch.rand(40, 4, generator=draws).argsort(1)
    is_changed = torch.rand(40, generator=draws) < 0.8
    is_gray = torch.rand(40, generator=draws) < 0.2
    changes = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for at_a_time in (1, 300, 10**6):  # images are worked on in groups of any size
        monkeypatch.setattr(module, "_AT_A_TIME", at_a_time)
        result = jitter(images, seeded(4))
        for i, image in enumerate(images):
            for number in order[i].tolist() if is_changed[i] else ():
                shift = 0 if number == 3 else 1
                image = changes[number](image, shift + float(factors[i, number]))
            if is_gray[i]:
                image = tv.rgb_to_grayscale(image, 3)
            torch.testing.assert_close(result[i], image, rtol=0, atol=3e-5)


def test_none_only_scales_and_basic_is_one_view():
    images = pixels()
    assert torch.equal(augment(images, "none", seeded(), mirror=True), images.float() / 255)
    basic = augment(images, "basic", seeded(1), mirror=True)
    assert torch.equal(basic, crop_and_mirror(images, seeded(1), mirror=True).float() / 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_strong_is_a_weak_and_a_strong_view_of_every_image(channels):
    images = pixels(12, channels)
    views = augment(images, "strong", seeded(1), mirror=True)
    assert views.shape == (24, channels, 16, 16) and views.dtype == torch.float32
    weak, strong = views.chunk(2)
    assert torch.equal(weak, augment(images, "basic", seeded(1), mirror=True))
    assert not any(torch.equal(one, other) for one, other in zip(weak, strong, strict=True))


def test_the_views_are_counted_and_an_unknown_augmentation_is_refused():
    assert [num_views(how) for how in module.AUGMENTS] == [1, 1, 2]
    with pytest.raises(DataError, match="augment 'storng' is not one of none, basic, strong"):
        num_views("storng")


@pytest.mark.parametrize("how", ["basic", "strong"])
def test_the_draws_follow_the_generator_alone(how):
    images = pixels()
    first = augment(images, how, seeded(5), mirror=True)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(augment(images, how, seeded(5), mirror=True), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(augment(images, how, seeded(6), mirror=True), first)


def test_the_number_of_threads_does_not_change_a_bit():
    images = pixels(3, 3, 200, 200)  # above the size at which torch divides the work
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(augment(images, "strong", seeded(2), mirror=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_the_images_are_left_as_they_were():
    images = pixels()
    before = images.clone()
    augment(images, "strong", seeded(), mirror=True)
    assert torch.equal(images, before)
