"""Doubts about lists: few steps, masks of other images, frames of one video on both sides; and none without reason."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from allspark.data.plausibility import doubts, few_steps, mismatched_masks, neighboring_frames
from allspark.data.spec import DatasetSpec, ImageReading, Sample, voc_palette
from allspark.data.splits import Lists

SPEC = DatasetSpec("two", ("out", "in"), voc_palette(2))
COUNT = 24


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Photos of a box and their masks; the frames of a camera that turns, all with one mask."""
    folder, rng = tmp_path_factory.mktemp("doubts"), np.random.default_rng(0)
    for name in ("photo", "mask", "frame"):
        (folder / name).mkdir()
    for index in range(COUNT):
        mask = np.zeros((64, 80), np.uint8)
        y, x = rng.integers(0, 40, 2)
        mask[y : y + 20, x : x + 24] = 1
        photo = rng.integers(0, 60, (64, 80, 3)) + 120 * mask[..., None] + rng.integers(0, 60)
        Image.fromarray(photo.astype(np.uint8)).save(folder / "photo" / f"{index:02}.png")
        Image.fromarray(mask).save(folder / "mask" / f"{index:02}.png")
    scene = np.cumsum(rng.integers(-9, 10, (64, 400, 3)), axis=1) + 128
    for index in range(60):
        view = scene[:, 4 * index : 4 * index + 80].clip(0, 255).astype(np.uint8)
        Image.fromarray(view).save(folder / "frame" / f"f{index}.png")
    return folder


def pairs(root, mask_of=lambda index: index, photos=range(COUNT)):
    return tuple(Sample(root / f"photo/{i:02}.png", root / f"mask/{mask_of(i) % COUNT:02}.png") for i in photos)


def frames(root, numbers):
    return tuple(Sample(root / f"frame/f{number}.png", root / "mask/00.png") for number in numbers)


def lists(labeled, val=(), unlabeled=()):
    return Lists(labeled, unlabeled, val, "", "folders")


def test_good_lists(root):
    """Also numbered photos, of which neighbors are no more alike than others."""
    assert doubts(lists(pairs(root, photos=range(0, COUNT, 2)), pairs(root, photos=range(1, COUNT, 2))), SPEC) == []
    assert few_steps(lists(pairs(root)), "labeled", epochs=40, steps=3, batch_size=8) == []


@pytest.mark.parametrize("shift", [1, -1])
def test_shifted_masks(root, shift):
    (told,) = mismatched_masks(pairs(root, lambda index: index + shift), SPEC)
    assert "is the list of masks shifted by one?" in told and ("next" if shift == 1 else "previous") in told


def test_shuffled_masks(root):
    (told,) = mismatched_masks(pairs(root, lambda index: 7 * index + 5), SPEC)
    assert "do masks belong to their images?" in told
    assert mismatched_masks(pairs(root, lambda index: 7 * index + 5, range(5)), SPEC) == []  # too few to tell


def test_neighboring_frames(root):
    (told,) = neighboring_frames(lists(frames(root, range(1, 60, 5)), frames(root, range(0, 60, 5))), SPEC)
    assert told.startswith("12 of 12 val images seem to be frames within 30 frames of a training image")
    assert "splits make --val SIZE --group REGEX" in told
    assert len(neighboring_frames(lists((), frames(root, range(0, 60, 5)), frames(root, range(3, 60, 9))), SPEC)) == 1
    assert neighboring_frames(lists(frames(root, range(12)), frames(root, range(45, 60))), SPEC) == []
    assert neighboring_frames(lists(frames(root, range(12)), frames(root, range(12))), SPEC) == []


@pytest.mark.parametrize("folders", [("train", "val"), ("train/a", "val/a"), ("labeled/a", "test/a_val")])
def test_neighboring_frames_in_two_folders(root, tmp_path, folders):
    """A video of which every fifth frame was moved to the folder of validation images."""
    found = []
    for number, folder in enumerate(folders):
        (tmp_path / folder).mkdir(parents=True)
        for frame in frames(root, range(number, 60, 5)):
            shutil.copy(frame.image, tmp_path / folder)
        found.append(tuple(Sample(path) for path in sorted((tmp_path / folder).iterdir())))
    (told,) = neighboring_frames(lists(*found), SPEC)
    assert told.startswith("12 of 12 val images seem to be frames")


def test_many_bands(tmp_path):
    """OpenCV averages at most four bands."""
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed")
    spec, rng = replace(SPEC, reading=ImageReading(channels=6)), np.random.default_rng(0)
    for index in range(16):
        tifffile.imwrite(tmp_path / f"{index:02}.tif", rng.integers(0, 255, (200, 300, 6), np.uint8), planarconfig=1)
        Image.fromarray(rng.integers(0, 2, (200, 300), np.uint8)).save(tmp_path / f"{index:02}.png")
    samples = tuple(Sample(tmp_path / f"{i:02}.tif", tmp_path / f"{i:02}.png") for i in range(16))
    (told,) = doubts(lists(samples[::2], samples[1::2]), spec)
    assert "do masks belong to their images?" in told


def test_few_steps(root):
    labeled, three = pairs(root), frames(root, range(3))
    (told,) = few_steps(lists(labeled, unlabeled=labeled), "unlabeled", epochs=2, steps=12, batch_size=2)
    assert told == "only 24 steps in all, 2 passes over 24 unlabeled images: raise epochs"
    (told,) = few_steps(lists(labeled, unlabeled=three), "unlabeled", epochs=10, steps=1, batch_size=2)
    assert told == (
        "only 10 steps in all, 10 passes over 3 unlabeled images; 4 of 24 labeled images are never used: raise epochs "
        "or set epoch_of=labeled"
    )
