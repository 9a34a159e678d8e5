"""The weak geometry, the photometric views and the CutMix box: their distributions, and that draws and pixels agree."""

import numpy as np
import pytest
from PIL import Image

from allspark.data.transforms import PHOTOMETRIC, Geometry, cutmix_box, draw_geometry

CROP = 64


def coordinates(height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 whose red and green grow with the column and the row; blue is 255."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / (width - 1), y * 255 / (height - 1), np.full_like(x, 255)], -1).round().astype(np.uint8)


def geometries(count: int, width: int, height: int, crop: int = CROP):
    return [draw_geometry(np.random.default_rng([5, i]), width, height, crop) for i in range(count)]


def test_long_side_is_uniform_and_aspect_kept():
    drawn = geometries(3000, width=80, height=40)
    long = np.array([g.size[0] for g in drawn])
    assert long.min() == 40 and long.max() == 160  # 0.5 and 2 times, both ends included
    assert abs(long.mean() - 100) < 2 and abs((long < 70).mean() - 30 / 121) < 0.03
    assert all(abs(g.size[1] - g.size[0] / 2) <= 0.5 for g in drawn)
    assert draw_geometry(np.random.default_rng(0), 40, 80, CROP, (1.0, 1.0)).size == (40, 80)


def test_window_is_uniform_and_inside():
    drawn = [draw_geometry(np.random.default_rng([6, i]), 67, 64, CROP, (1, 1)) for i in range(2000)]
    lefts = np.bincount([g.offset[0] for g in drawn])
    assert len(lefts) == 4 and lefts.min() > 400 and {g.offset[1] for g in drawn} == {0}
    assert 900 < sum(g.flip for g in drawn) < 1100


def test_draws_do_not_depend_on_pixels_and_repeat():
    assert geometries(20, 90, 50) == geometries(20, 90, 50)
    assert len(set(geometries(20, 90, 50))) > 15


def test_crop_is_a_window_of_the_resized_image():
    image = coordinates(50, 90)
    for geometry in geometries(30, 90, 50):
        scaled = np.asarray(Image.fromarray(image).resize(geometry.size, Image.Resampling.BILINEAR))
        left, top = geometry.offset
        expected = scaled[top : top + CROP, left : left + CROP]
        expected = np.pad(expected, ((0, CROP - expected.shape[0]), (0, CROP - expected.shape[1]), (0, 0)))
        crop = geometry.image(image)
        assert crop.shape == (CROP, CROP, 3) and crop.dtype == np.uint8
        assert np.array_equal(crop[:, ::-1] if geometry.flip else crop, expected)


def test_valid_is_false_exactly_on_the_padding():
    image, mask = coordinates(50, 90), np.ones((50, 90), np.uint8)
    partly = 0
    for geometry in geometries(60, 90, 50):
        valid = geometry.valid()
        assert valid.dtype == bool and valid.shape == (CROP, CROP)
        assert np.array_equal(valid, geometry.image(image)[..., 2] == 255)  # blue is 255 in the image, 0 in the padding
        assert np.array_equal(valid, geometry.mask(mask, fill=255) == 1)
        partly += not valid.all()
    assert partly > 10
    small = Geometry((3, 5), (0, 0), 8, flip=True).valid()
    assert small.sum() == 15 and small[:5, 5:].all()


def test_image_and_mask_stay_aligned():
    """Red is the column and so is the mask: they must agree after any geometry, up to the rounding of nearest."""
    image = coordinates(60, 120)
    for geometry in geometries(40, 120, 60):
        crop, mask, valid = geometry.image(image), geometry.mask(image[..., 0], fill=255), geometry.valid()
        assert np.abs(crop[..., 0].astype(int) - mask)[valid].max() <= 4


def test_mask_is_never_interpolated():
    rng = np.random.default_rng(0)
    mask = rng.choice(np.array([0, 20, 255], np.uint8), (50, 90))
    for geometry in geometries(30, 90, 50):
        assert set(np.unique(geometry.mask(mask, fill=255))) <= {0, 20, 255}


def test_strong_view_keeps_its_place():
    """A photometric view moves no pixel: the edge between black and white stays where it is in the weak view."""
    image = np.zeros((CROP, CROP, 3), np.uint8)
    image[:, CROP // 2 :] = 255
    for seed in range(30):
        view = PHOTOMETRIC["strong"](image, np.random.default_rng(seed)).astype(int)
        assert view.shape == image.shape
        assert view[:, : CROP // 2 - 8].max() < view[:, CROP // 2 + 8 :].min()
        grey = view.sum(-1)[0]
        middle = (grey[0] + grey[-1]) / 2
        assert abs(int((grey < middle).sum()) - CROP // 2) <= 1


def test_strong_view_is_drawn_from_the_generator_alone():
    image = np.random.default_rng(0).integers(0, 256, (CROP, CROP, 3), np.uint8)
    views = [PHOTOMETRIC["strong"](image, np.random.default_rng(seed)) for seed in range(8)]
    again = [PHOTOMETRIC["strong"](image, np.random.default_rng(seed)) for seed in range(8)]
    assert all(np.array_equal(a, b) for a, b in zip(views, again, strict=True))
    assert len({view.tobytes() for view in views}) > 5
    assert PHOTOMETRIC["weak"](image, np.random.default_rng(0)) is image


def test_strong_view_takes_as_many_draws_whatever_it_does():
    image, left = np.zeros((4, 4, 3), np.uint8), set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        PHOTOMETRIC["strong"](image, rng)
        twin = np.random.default_rng(seed)
        twin.random(), twin.permutation(4), twin.uniform(size=3), twin.uniform(), twin.random(2), twin.uniform()
        left.add(rng.random() == twin.random())
    assert left == {True}


def test_frequencies_of_the_strong_view():
    """On coloured noise: equal channels mean grey (p 0.2); without jitter, grey and blur nothing changes (p 0.08)."""
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    views = [PHOTOMETRIC["strong"](image, np.random.default_rng([1, seed])) for seed in range(1500)]
    grey = np.mean([np.ptp(view, axis=-1).max() == 0 for view in views])
    same = np.mean([np.array_equal(view, image) for view in views])
    assert abs(grey - 0.2) < 0.04 and abs(same - 0.2 * 0.8 * 0.5) < 0.03


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


@pytest.mark.parametrize(("probability", "frequency"), [(0.0, 0), (1.0, 50)])
def test_cutmix_probability(probability, frequency):
    boxes = [cutmix_box(np.random.default_rng(seed), 64, probability).any() for seed in range(50)]
    assert sum(boxes) == frequency
