"""The generated data set: pixels, classes, and files."""

import hashlib
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allspark.data.datasets import shapes
from allspark.data.spec import IGNORE_INDEX
from allspark.utils.errors import UserError

# As first written: sha256 of the mask, every 32nd pixel, mean per channel. A change here voids recorded results.
GOLDEN = {
    ("train", 0): {
        "mask": "d2f493a12a6bb182bd7ca0c5e514324d96d5cb6b31ef5f37d7a5f53972d2edeb",
        "pixels": "b3c8af8d928d8ea59794939b5493806a6b2c694ea9cde9cd7aab6d53344d924387dcbecdced0d28336819b95a0658a80",
        "mean": [136.267, 137.433, 140.421],
    },
    ("train", 479): {
        "mask": "56418484bbb76df28ebbb222b86ca0b6c00074ef0ef5ac669cc5b5d7ee85ba10",
        "pixels": "596d762d5b1527184f9aee74536f76596572380d6b660ee2525f74eed7504e646f455d6a4d656ccf96d04e5c694a5961",
        "mean": [94.271, 99.962, 114.398],
    },
    ("val", 7): {
        "mask": "c4ddcefc84749f87287fa34df17c514f306f20d218824567046d76cf3d6d9f01",
        "pixels": "87954f8976898a6c6b9f6350667a425d7241af6951694e8980747c85727f8a6b7c8574898277838766812faea5384560",
        "mean": [120.086, 109.98, 105.104],
    },
}
FEW = {"train": 3, "val": 2}


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("split", "index"), list(GOLDEN))
def test_pixels_are_recorded(split, index):
    image, mask = shapes.render(split, index)
    assert hashlib.sha256(mask.tobytes()).hexdigest() == GOLDEN[split, index]["mask"]
    rows = image[16::32, 16::32].reshape(-1, 3).astype(int)
    recorded = np.frombuffer(bytes.fromhex(GOLDEN[split, index]["pixels"]), np.uint8).reshape(-1, 3)
    assert np.abs(rows - recorded).max() <= 1  # another libm may round one value the other way
    assert np.allclose(image.mean((0, 1)), GOLDEN[split, index]["mean"], atol=0.01)


def test_images_are_independent_of_earlier_draws():
    first = shapes.render("train", 5)
    shapes.render("val", 5)
    again = shapes.render("train", 5)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], shapes.render("val", 5)[0])


def test_every_class_occurs():
    masks = np.stack([shapes.render("val", index)[1] for index in range(40)])
    assert masks.shape[1:] == (shapes.SIZE, shapes.SIZE)
    assert set(np.unique(masks)) == {*range(shapes.SPEC.num_classes), IGNORE_INDEX}
    share = np.bincount(masks.ravel(), minlength=256) / masks.size
    objects = share[1 : shapes.SPEC.num_classes]
    assert objects.max() < 3 * objects.min()
    assert 0.4 < share[0] < 0.8
    assert share[IGNORE_INDEX] < 0.05


@pytest.mark.parametrize("outline", [outline for outline, _ in shapes.OBJECTS.values()])
def test_outline_areas(outline):
    reach, distance = outline(np.random.default_rng(0), 20.0)
    v, u = np.mgrid[-60:60:0.5, -60:60:0.5] + 0.1
    inside = distance(u, v) < 0
    assert abs(inside.sum() * 0.5**2 - np.pi * 20**2) < 0.03 * np.pi * 20**2
    assert np.hypot(u, v)[inside].max() <= reach
    slope = np.hypot(*np.gradient(distance(u, v), 0.5))
    assert 0.95 < np.median(slope) < 1.05  # a distance in pixels, not only a sign


def test_spec_is_complete():
    assert len(shapes.SPEC.classes) == len(shapes.SPEC.palette) == len(set(shapes.SPEC.palette)) == 7
    assert shapes.SPEC.prepare is shapes.generate


def test_generate_writes_render(tmp_path):
    root = tmp_path / "data" / "shapes"
    shapes.generate(root, FEW)
    for split, count in FEW.items():
        assert len(list((root / "images" / split).iterdir())) == len(list((root / "labels" / split).iterdir())) == count
        image, mask = shapes.render(split, 1)
        with Image.open(root / "images" / split / "0001.png") as stored:
            assert stored.mode == "RGB" and np.array_equal(np.asarray(stored), image)
        with Image.open(root / "labels" / split / "0001.png") as stored:
            assert stored.mode == "L" and np.array_equal(np.asarray(stored), mask)
    assert [path.name for path in root.parent.iterdir()] == ["shapes"]  # nothing temporary is left


def test_finished_folder_is_untouched(tmp_path):
    root = tmp_path / "shapes"
    root.mkdir()  # an empty folder is fine
    shapes.generate(root, FEW)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    shapes.generate(root, FEW)
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="another data_root"):
        shapes.generate(tmp_path, FEW)
    with pytest.raises(UserError, match=r"precious\.txt/below: cannot be written \(Not a directory\)"):
        shapes.generate(tmp_path / "precious.txt" / "below", FEW)
    assert files(tmp_path) == {"precious.txt": b"mine"}


def test_killed_generation_is_cleaned_up(tmp_path):
    """Its folder is removed when it is old; a recent one may belong to a running process."""
    old, recent = (tmp_path / f".shapes.{digit * 32}" for digit in "ab")
    for folder in (old, recent):
        (folder / "images").mkdir(parents=True)
    os.utime(old, (0, 0))
    shapes.generate(tmp_path / "shapes", FEW)
    assert {path.name for path in tmp_path.iterdir()} == {"shapes", recent.name}


@pytest.mark.parametrize("marker", [b"", b'{"name": "sha', b"\xff\x00", b"[" * 100_000, b"9" * 5000])
def test_damaged_marker_is_refused(tmp_path, marker):
    (tmp_path / "shapes.json").write_bytes(marker)
    with pytest.raises(UserError, match="not a complete shapes data set"):
        shapes.generate(tmp_path, FEW)


def test_concurrent_generation(tmp_path):
    root = tmp_path / "shapes"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=shapes.generate, args=(root, FEW)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    shapes.generate(tmp_path / "alone", FEW)
    assert files(root) == files(tmp_path / "alone")
    assert {path.name for path in tmp_path.iterdir()} == {"shapes", "alone"}
