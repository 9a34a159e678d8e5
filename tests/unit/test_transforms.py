"""Geometry, photometric views and CutMix boxes: their distributions, and that draws and pixels agree."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter
from torchvision.transforms import functional as TF

from allspark.data import resize_crop
from allspark.data.transforms import CV2, PHOTOMETRIC, PILLOW, Geometry, cutmix_box, draw_geometry, draw_jitter

CROP = 64


def coordinates(height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 whose red and green grow with the column and the row; blue is 255."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / (width - 1), y * 255 / (height - 1), np.full_like(x, 255)], -1).round().astype(np.uint8)


def geometries(count: int, width: int, height: int, crop: int = CROP):
    return [draw_geometry(np.random.default_rng([5, i]), width, height, crop) for i in range(count)]


def test_long_side_is_uniform():
    drawn = geometries(3000, width=80, height=40)
    long = np.array([g.size[0] for g in drawn])
    assert long.min() == 40 and long.max() == 160  # 0.5 and 2 times, both ends included
    assert abs(long.mean() - 100) < 2 and abs((long < 70).mean() - 30 / 121) < 0.03
    assert all(abs(g.size[1] - g.size[0] / 2) <= 0.5 for g in drawn)
    assert draw_geometry(np.random.default_rng(0), 40, 80, CROP, (1.0, 1.0)).size == (40, 80)


def test_window_is_uniform():
    drawn = [draw_geometry(np.random.default_rng([6, i]), 67, 64, CROP, (1, 1)) for i in range(2000)]
    lefts = np.bincount([g.offset[0] for g in drawn])
    assert len(lefts) == 4 and lefts.min() > 400 and {g.offset[1] for g in drawn} == {0}
    assert 900 < sum(g.flip for g in drawn) < 1100


def test_flips_and_rotations_are_drawn_when_asked():
    every = [
        draw_geometry(np.random.default_rng([7, i]), 90, 50, (32, 48), (1, 1), True, True, True) for i in range(800)
    ]
    drawn = Counter((g.flip, g.vertical_flip, g.turns) for g in every)
    assert len(drawn) == 16 and 20 < min(drawn.values()) and max(drawn.values()) < 90
    assert {(g.turns % 2, g.size) for g in every} == {(0, (90, 50)), (1, (50, 90))}
    usual = [(g.flip, g.vertical_flip, g.turns) for g in geometries(100, 90, 50)]
    none = [draw_geometry(np.random.default_rng([5, i]), 90, 50, CROP, horizontal_flip=False) for i in range(100)]
    assert {pair[1:] for pair in usual} == {(False, 0)} and not any(g.flip for g in none)
    assert [(g.size, g.offset) for g in none] == [(g.size, g.offset) for g in geometries(100, 90, 50)]


def test_draws_are_independent_of_pixels():
    assert geometries(20, 90, 50) == geometries(20, 90, 50)
    assert len(set(geometries(20, 90, 50))) > 15


def resized_whole(geometry: Geometry, image: np.ndarray, resample: Image.Resampling, fill: int) -> np.ndarray:
    """The crop as it is defined: Pillow resizes the whole, turned image, then it is padded, cut and flipped."""
    turned = np.ascontiguousarray(np.rot90(image, geometry.turns))
    scaled = np.asarray(Image.fromarray(turned).resize(geometry.size, resample))
    left, top = geometry.offset
    crop = scaled[top : top + geometry.crop[0], left : left + geometry.crop[1]]
    room = [(0, whole - side) for whole, side in zip(geometry.crop, crop.shape[:2], strict=True)]
    crop = np.pad(crop, room + [(0, 0)] * (image.ndim - 2), constant_values=fill)
    return crop[:: -1 if geometry.vertical_flip else 1, :: -1 if geometry.flip else 1]


def any_geometries(count: int):
    """Images of 1 to 300 pixels a side, crops of all relations to them, and scales of 0.5 to 2, some of 0.1 to 8.

    Every second crop is not square, and its image may be turned and flipped either way.
    """
    for index in range(count):
        rng = np.random.default_rng([8, index])
        height, width = (int(rng.integers(1, 301 if rng.random() < 0.8 else 9)) for _ in range(2))
        scales = (0.1, 8) if index % 8 == 0 else (0.5, 2)
        if max(height, width) * scales[0] >= 1:
            crop = int(rng.integers(8, 200))
            crops = ((crop, scales), ((crop, int(rng.integers(8, 200))), scales, True, True, True))
            yield rng, height, width, draw_geometry(rng, width, height, *crops[index % 2])


@pytest.mark.parametrize("fast", [True, False], ids=["torch", "pillow"])
def test_image_within_2_gray_levels(monkeypatch, fast):
    """The worst there is: noise, of all values and of black and white alone. On a smooth image 1 in a few pixels."""
    monkeypatch.setattr(resize_crop, "FAST_TORCH", fast)
    kinds, worst, cut = (lambda v: v, lambda v: v // 128 * 255), [], 0
    for index, (rng, height, width, geometry) in enumerate(any_geometries(400)):
        image = kinds[index % 2](rng.integers(0, 256, (height, width, 3), np.uint8))
        crop = geometry.image(image)
        assert crop.shape == (*geometry.crop, 3) and crop.dtype == np.uint8
        expected = resized_whole(geometry, image, Image.Resampling.BILINEAR, fill=0)
        worst.append(np.abs(crop.astype(int) - expected).max())
        cut += geometry.offset != (0, 0)
    assert max(worst) <= 2 and cut > 100

    image = coordinates(50, 90)
    for geometry in geometries(40, 90, 50):
        expected = resized_whole(geometry, image, Image.Resampling.BILINEAR, fill=0)
        distance = np.abs(geometry.image(image).astype(int) - expected)
        assert distance.max() <= 1 and distance.mean() < 0.1


def test_fast_resize_work(monkeypatch):
    """Of sides of 2048 pixels for crops of 801: that is what makes it fast."""
    drawn = [draw_geometry(np.random.default_rng([9, i]), 2048, 1024, 801) for i in range(300)]
    spans = [resize_crop.plan_side(g.offset[0], 801, g.size[0], 2048) for g in drawn]
    made = [(one.last - one.first) * one.factor / min(g.size[0], 801) for one, g in zip(spans, drawn, strict=True)]
    assert np.mean(made) < 1.3 and np.mean(np.array(made) > 2) < 0.05


def test_unscaled_image_is_cropped():
    image = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    crop = Geometry((70, 90), (3, 20), (CROP, CROP), flip=False).image(image)
    assert np.array_equal(crop, image[20:84, 3:67])


def test_mask_equals_whole_resize():
    """To the pixel: nearest has ties wherever sizes have common divisors."""
    for rng, height, width, geometry in any_geometries(400):
        mask = rng.integers(0, 256, (height, width), np.uint8)
        expected = resized_whole(geometry, mask, Image.Resampling.NEAREST, fill=255)
        assert np.array_equal(geometry.mask(mask, fill=255), expected), (height, width, geometry)


def test_work_follows_crop_size():
    """A view of a memory-mapped file is read where the crop needs it: the rest may be anything."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (600, 1200, 3), np.uint8)
    geometry = Geometry((1801, 901), (1300, 700), (CROP, CROP), flip=False)
    other = image.copy()
    other[:100], other[:, :200] = 0, 0
    assert np.array_equal(geometry.image(image), geometry.image(other))


def test_valid_is_false_on_padding():
    image, mask = coordinates(50, 90), np.ones((50, 90), np.uint8)
    partly = 0
    for geometry in geometries(60, 90, 50):
        valid = geometry.valid()
        assert valid.dtype == bool and valid.shape == (CROP, CROP)
        assert np.array_equal(valid, geometry.image(image)[..., 2] == 255)  # blue is 255 in the image, 0 in the padding
        assert np.array_equal(valid, geometry.mask(mask, fill=255) == 1)
        partly += not valid.all()
    assert partly > 10
    small = Geometry((3, 5), (0, 0), (8, 9), flip=True).valid()
    assert small.shape == (8, 9) and small.sum() == 15 and small[:5, 6:].all()
    assert Geometry((3, 5), (0, 0), (8, 9), flip=False, vertical_flip=True).valid()[3:, :3].all()


def test_image_and_mask_are_aligned():
    """Red is the column and so is the mask: they must agree after any geometry, up to the rounding of nearest."""
    image = coordinates(60, 120)
    for geometry in geometries(40, 120, 60):
        crop, mask, valid = geometry.image(image), geometry.mask(image[..., 0], fill=255), geometry.valid()
        assert np.abs(crop[..., 0].astype(int) - mask)[valid].max() <= 4


def test_mask_is_not_interpolated():
    rng = np.random.default_rng(0)
    mask = rng.choice(np.array([0, 20, 255], np.uint8), (50, 90))
    for geometry in geometries(30, 90, 50):
        assert set(np.unique(geometry.mask(mask, fill=255))) <= {0, 20, 255}


def test_strong_view_is_aligned():
    """A photometric view moves no pixel: the edge between black and white stays where it is in the weak view."""
    image = np.zeros((CROP, CROP, 3), np.uint8)
    image[:, CROP // 2 :] = 255
    for seed in range(30):
        view = PHOTOMETRIC["strong"](image, np.random.default_rng(seed)).astype(int)
        assert view.shape == image.shape
        assert view[:, : CROP // 2 - 8].max() < view[:, CROP // 2 + 8 :].min()
        gray = view.sum(-1)[0]
        middle = (gray[0] + gray[-1]) / 2
        assert abs(int((gray < middle).sum()) - CROP // 2) <= 1


def test_color_strength_scales_the_jitter():
    for seed in range(30):
        whole, half, none = (dict(draw_jitter(np.random.default_rng(seed), strength)) for strength in (1.0, 0.5, 0.0))
        assert set(none.values()) == {0.0, 1.0}
        for name, neutral in {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0}.items():
            assert half[name] - neutral == pytest.approx((whole[name] - neutral) / 2)
    image = photograph()
    same = [PHOTOMETRIC["pseudoseg"](image, np.random.default_rng(seed), CV2, 0.0) for seed in range(4)]
    assert max(np.abs(view.astype(int) - image).max() for view in same) <= 3  # a round trip through HSV


def test_strong_view_uses_generator():
    image = np.random.default_rng(0).integers(0, 256, (CROP, CROP, 3), np.uint8)
    views = [PHOTOMETRIC["strong"](image, np.random.default_rng(seed)) for seed in range(8)]
    again = [PHOTOMETRIC["strong"](image, np.random.default_rng(seed)) for seed in range(8)]
    assert all(np.array_equal(a, b) for a, b in zip(views, again, strict=True))
    assert len({view.tobytes() for view in views}) > 5
    assert PHOTOMETRIC["weak"](image, np.random.default_rng(0)) is image


def test_strong_view_draw_count():
    image, left = np.zeros((4, 4, 3), np.uint8), set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        PHOTOMETRIC["strong"](image, rng)
        twin = np.random.default_rng(seed)
        twin.random(), twin.permutation(4), twin.uniform(size=3), twin.uniform(), twin.random(2), twin.uniform()
        left.add(rng.random() == twin.random())
    assert left == {True}


def test_strong_view_equals_draws():
    """With the exact operations, against Pillow for the same draws."""
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        jitters, order = rng.random() < 0.8, rng.permutation(4)
        strengths = (*rng.uniform(0.5, 1.5, size=3), rng.uniform(-0.25, 0.25))
        grays, blurs, radius = rng.random() < 0.2, rng.random() < 0.5, rng.uniform(0.1, 2.0)
        expected = Image.fromarray(image)
        for index in order if jitters else ():
            expected = adjust[index](expected, strengths[index])
        expected = TF.to_grayscale(expected, 3) if grays else expected
        expected = expected.filter(ImageFilter.GaussianBlur(radius)) if blurs else expected
        view = PHOTOMETRIC["strong"](image, np.random.default_rng(seed), PILLOW)
        assert np.array_equal(view, np.asarray(expected)), seed


def photograph() -> np.ndarray:
    """(120, 160, 3) uint8 as smooth as one: noise at four sizes, the coarse ones strongest, in two colors."""
    rng, layers = np.random.default_rng(0), []
    for side, weight in ((4, 90), (12, 40), (40, 15), (120, 3)):
        noise = rng.normal(size=(side, side * 4 // 3, 3)) @ np.array([[0.9, 0.9, 0.9], [0.3, 0, -0.3], [0, 0.1, 0]])
        layers.append([np.asarray(Image.fromarray(noise[..., c]).resize((160, 120))) for c in range(3)])
        layers[-1] = weight * np.stack(layers[-1], -1)
    return (sum(layers) + 120).clip(0, 255).astype(np.uint8)


# Strengths, and the largest and the mean difference on a photograph and on noise: what the comment on CV2 says
DIFFERENCES = {
    "brightness": ((0.1, 1.5), (0, 0), (0, 0)),
    "contrast": ((0.1, 1.5), (0, 0), (0, 0)),
    "saturation": ((0.1, 1.5), (1, 0.002), (1, 0.002)),
    "gray": ((0, 1), (1, 0.002), (1, 0.002)),
    "hue": ((-0.25, 0.5), (9, 0.3), (13, 1.2)),
    "blur": ((0.1, 2.0), (3, 0.4), (3, 0.5)),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_fast_operations_are_close(name):
    (low, high), *bounds = DIFFERENCES[name]
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    for image, (largest, mean) in zip((photograph(), noise), bounds, strict=True):
        before, means = image.copy(), []
        for strength in np.linspace(low, high, 25).tolist():
            distance = np.abs(CV2[name](image, strength).astype(int) - PILLOW[name](image, strength))
            if name == "blur":  # the border is the one place where it is further off
                assert distance.max() <= (25 if image is not noise else 40)
                distance = distance[6:-6, 6:-6]
            assert distance.max() <= largest, strength
            means.append(distance.mean())
        assert np.mean(means) <= mean
        assert np.array_equal(image, before), "an operation changed its input"


def test_fast_operations_exist():
    assert CV2.keys() == PILLOW.keys() and {name for name in CV2 if CV2[name] is not PILLOW[name]} == set(DIFFERENCES)


def test_strong_view_frequencies():
    """On colored noise: equal channels mean gray (p 0.2); without jitter, gray and blur nothing changes (p 0.08)."""
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    views = [PHOTOMETRIC["strong"](image, np.random.default_rng([1, seed])) for seed in range(1500)]
    gray = np.mean([np.ptp(view, axis=-1).max() == 0 for view in views])
    same = np.mean([np.array_equal(view, image) for view in views])
    assert abs(gray - 0.2) < 0.04 and abs(same - 0.2 * 0.8 * 0.5) < 0.03


def test_cutmix_box_distribution():
    size, boxes = 100, []
    for seed in range(3000):
        box = cutmix_box(np.random.default_rng([2, seed]), size, probability=0.5)
        assert box.shape == (size, size) and box.dtype == bool
        if box.any():
            rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
            assert (
                box.sum() == len(rows) * len(columns) == np.ptp(rows) * np.ptp(columns) + len(rows) + len(columns) - 1
            )
            boxes.append((len(rows), len(columns), rows[0], columns[0]))
    assert abs(len(boxes) / 3000 - 0.5) < 0.04
    height, width, top, left = np.array(boxes).T
    area, ratio = height * width / size**2, height / width
    assert 0.017 < area.min() < 0.03 and 0.36 < area.max() <= 0.4
    assert 0.26 < ratio.min() < 0.4 and 2.5 < ratio.max() < 3.9
    assert top.min() == 0 and left.min() == 0 and (top + height).max() == size == (left + width).max()


def test_cutmix_box_specification():
    """Against a literal loop with other random numbers: Kolmogorov and Smirnov's largest distance, at p = 0.001."""
    size, count, drawn = 200, 2000, []
    for seed in range(count):
        box = cutmix_box(np.random.default_rng([3, seed]), size, probability=1.0)
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        drawn.append((len(rows), len(columns), rows[0], columns[0]))
    numbers, expected = random.Random(0), []
    while len(expected) < count:
        area = numbers.uniform(0.02, 0.4) * size**2
        fits = False
        while not fits:
            ratio = numbers.uniform(0.3, 1 / 0.3)
            width, height = math.floor(math.sqrt(area / ratio)), math.floor(math.sqrt(area * ratio))
            left, top = numbers.randrange(size), numbers.randrange(size)
            fits = left + width <= size and top + height <= size
        expected.append((height, width, top, left))

    def largest_distance(first, second):
        first, second = np.sort(first), np.sort(second)
        both = np.concatenate((first, second))
        return np.abs(np.searchsorted(first, both, "right") - np.searchsorted(second, both, "right")).max() / count

    ours, theirs = np.array(drawn, float).T, np.array(expected, float).T
    for name, of in {
        "area": lambda h, w, top, left: h * w,
        "ratio": lambda h, w, top, left: h / w,
        "top": lambda h, w, top, left: top,
        "left": lambda h, w, top, left: left,
        "place in what is left": lambda h, w, top, left: left / np.maximum(size - w, 1),
    }.items():
        assert largest_distance(of(*ours), of(*theirs)) < 1.95 * math.sqrt(2 / count), name
    share = ours[0] * ours[1] / size**2
    assert 0.017 < share.min() < 0.022 and 0.39 < share.max() <= 0.4
    place = ours[3] / np.maximum(size - ours[1], 1)  # uniform, whatever the size
    assert np.abs(np.quantile(place, [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.04


def test_cutmix_box_fits_crops_that_are_not_square():
    boxes = np.array([cutmix_box(np.random.default_rng(seed), (40, 160), 1.0) for seed in range(400)])
    assert boxes.shape == (400, 40, 160)
    area = boxes.mean((1, 2))
    assert 0.01 < area.min() and area.max() <= 0.4 and boxes.any((0, 1)).all() and boxes.any((0, 2)).all()


@pytest.mark.parametrize("size", [(64, 1024), (1600, 64)])
def test_cutmix_box_of_long_crops_ends(size):
    """Two fifths of such a crop fit in it at no aspect ratio."""
    area = np.array([cutmix_box(np.random.default_rng(seed), size, 1.0).sum() for seed in range(200)])
    assert area.min() > 0 and area.max() <= min(size) ** 2


@pytest.mark.parametrize(("probability", "frequency"), [(0.0, 0), (1.0, 50)])
def test_cutmix_probability(probability, frequency):
    boxes = [cutmix_box(np.random.default_rng(seed), 64, probability).any() for seed in range(50)]
    assert sum(boxes) == frequency
