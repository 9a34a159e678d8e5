"""`allspark masks`: what each annotation format draws, pixel by pixel, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from allspark.__main__ import main
from allspark.utils.errors import run_main

SIZE = (40, 56)  # height, width
CLASSES = "ground,cell,nucleus"


@pytest.fixture
def convert(tmp_path, capsys):
    """convert(format, source, *words) -> exit code, masks by name, output, message."""
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(images / f"{name}.jpg")

    def run(kind, source, *words):
        capsys.readouterr()
        words = ("--images", images, "--out", tmp_path / "out", "--classes", CLASSES, *words)
        code = run_main(main, ["masks", kind, str(source), *map(str, words)])
        masks = {path.stem: np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").glob("*.png"))}
        printed = capsys.readouterr()
        assert printed.err.count("\n") == (code != 0), printed.err
        return code, masks, printed.out, printed.err

    return run


def expected(*boxes):
    """The mask with (class, rows, columns) drawn in order."""
    mask = np.zeros(SIZE, np.uint8)
    for index, rows, columns in boxes:
        mask[slice(*rows), slice(*columns)] = index
    return mask


@pytest.mark.parametrize("layout", ["{label}/{name}.png", "{name}_{label}.png"])
@pytest.mark.parametrize("stored", ["1-bit", "8-bit", "16-bit", "palette"])
def test_one_file_per_class(convert, tmp_path, layout, stored):
    regions = {"cell": expected((1, (3, 20), (5, 30))), "nucleus": expected((1, (25, 39), (40, 56)))}
    for label, region in regions.items():
        path = tmp_path / "marks" / layout.format(label=label, name="a")
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(region * 255)
        if stored == "1-bit":
            image = image.convert("1")
        elif stored == "16-bit":
            image = Image.fromarray(region.astype(np.uint16) * 40000)
        elif stored == "palette":  # index 0 is white, index 1 black
            image = Image.fromarray(1 - region)
            image.putpalette([255, 255, 255, 0, 0, 0])
        image.save(path)
    code, masks, out, _ = convert("per-class", tmp_path / "marks")
    assert code == 0 and list(masks) == ["a"] and "1 of 2 images have no annotation" in out
    assert np.array_equal(masks["a"], expected((1, (3, 20), (5, 30)), (2, (25, 39), (40, 56))))
    assert convert("per-class", tmp_path / "marks")[0] == 2  # exists already


def test_one_file_per_class_refused(convert, tmp_path):
    def write(label, region):
        (tmp_path / "marks" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(region).save(tmp_path / "marks" / label / "a.png")

    write("cell", expected((255, (0, 20), (0, 30))))
    write("nucleus", expected((255, (19, 30), (0, 30))))
    message = convert("per-class", tmp_path / "marks")[3]
    assert (
        f"{Path('nucleus', 'a.png')}: 30 pixels belong to another class, too (cell)" in message
        and "--nested" in message
    )
    write("nucleus", expected((255, (20, 30), (0, 30)), (254, (21, 22), (3, 4))))
    assert "more than black and one other value" in convert("per-class", tmp_path / "marks")[3]
    write("nucleus", expected()[1:])
    assert "56 x 39 pixels, its image has 56 x 40" in convert("per-class", tmp_path / "marks")[3]
    write("nucleus", expected())
    write("wall", expected())
    code, _, _, err = convert("per-class", tmp_path / "marks")
    assert code == 2 and "label 'wall' is not among --classes" in err
    assert convert("per-class", tmp_path / "marks", "--ignore-unknown")[0] == 0


def test_nested_classes(convert, tmp_path):
    """The order of --classes counts, not that of the names: a nucleus is seen in its cell, with debris below."""
    (tmp_path / "marks").mkdir()
    boxes = {"debris": ((0, 30), (0, 40)), "cell": ((5, 25), (5, 30)), "nucleus": ((10, 20), (10, 20))}
    for label, box in boxes.items():
        Image.fromarray(expected((255, *box))).save(tmp_path / "marks" / f"a_{label}.png")
    words = ("--classes", "ground,debris,cell,nucleus", "--nested")
    code, masks, *_ = convert("per-class", tmp_path / "marks", *words)
    assert code == 0 and np.array_equal(masks["a"], expected(*((i, *box) for i, box in enumerate(boxes.values(), 1))))


def test_annotations_without_an_image_are_named(convert, tmp_path):
    """Otherwise a mistyped name would turn its class into background unnoticed. The photos may be beside them."""
    for name in ("a_cell", "b_cell", "aa_nucleus", "c_nucleus"):
        Image.fromarray(expected((255, (3, 9), (3, 9)))).save(tmp_path / "images" / f"{name}.png")
    code, masks, out, _ = convert("per-class", tmp_path / "images")
    assert code == 0 and list(masks) == ["a", "b"]
    assert "annotations of 2 names without an image are not used, such as aa\n" in out


def test_background_that_was_forgotten(convert, tmp_path):
    """If the first class is annotated, what is not annotated at all is hardly of this class."""
    (tmp_path / "marks").mkdir()
    Image.fromarray(expected((255, (3, 9), (3, 9)))).save(tmp_path / "marks" / "a_cell.png")
    words = ("per-class", tmp_path / "marks", "--classes", "cell,nucleus")
    code, _, _, err = convert(*words)
    assert code == 2 and "a.jpg: some pixels are annotated as 'cell', and 2204 not at all" in err
    assert (convert(*words, "--background", "nucleus")[1]["a"] == 1).sum() == 2204
    assert (convert(*words, "--background", "cell", "--force")[1]["a"] == 0).all()


def test_labelme(convert, tmp_path):
    def shape(label, kind, *points):
        return {"label": label, "shape_type": kind, "points": [list(point) for point in points]}

    def write(*shapes, height=SIZE[0]):
        content = {"shapes": list(shapes), "imageHeight": height, "imageWidth": SIZE[1], "imagePath": "../a.jpg"}
        (tmp_path / "a.json").write_text(json.dumps(content))

    write(
        shape("cell", "polygon", (5, 3), (29, 3), (29, 19), (5, 19)),
        shape("nucleus", "rectangle", (20, 15), (10, 10)),
    )
    code, masks, *_ = convert("labelme", tmp_path)
    assert code == 0 and np.array_equal(masks["a"], expected((1, (3, 20), (5, 30)), (2, (10, 16), (10, 21))))
    write(shape("cell", "circle", (28, 20), (28, 30)))
    area = (convert("labelme", tmp_path, "--force")[1]["a"] == 1).sum()
    assert abs(area - np.pi * 10.5**2) < 25
    for refused, words in [
        ([shape("cell", "line", (0, 0), (9, 9))], "shape 1: cannot be drawn (a 'line' of 2 points"),
        ([shape("cell", "polygon", (0, 0), (9, 9), (1e9, 3))], "far outside"),
        ([shape("sky", "rectangle", (0, 0), (9, 9))], "label 'sky' is not among"),
    ]:
        write(*refused)
        code, _, _, err = convert("labelme", tmp_path, "--force")
        assert code == 2 and words in err
    write(height=39)
    assert "was drawn on an image of 56 x 39 pixels" in convert("labelme", tmp_path, "--force")[3]
    (tmp_path / "a.json").write_text("[" * 10**5)
    assert "a.json: not JSON" in convert("labelme", tmp_path, "--force")[3]


def test_coco(convert, tmp_path):
    pytest.importorskip("pycocotools")
    large, small = expected((1, (3, 20), (5, 30))), expected((1, (10, 16), (10, 21)))
    polygon = [5, 3, 30, 3, 30, 20, 5, 20]

    def write(**changes):
        content = {
            "images": [{"id": 7, "file_name": "photos/a.jpg", "height": SIZE[0], "width": SIZE[1]}],
            "categories": [{"id": 3, "name": "nucleus"}, {"id": 9, "name": "cell"}],
            "annotations": [
                {"id": 1, "image_id": 7, "category_id": 3, "iscrowd": 0, "segmentation": run_lengths(small)},
                {"id": 2, "image_id": 7, "category_id": 9, "iscrowd": 0, "segmentation": [polygon]},
            ],
        }
        (tmp_path / "coco.json").write_text(json.dumps(content | changes))

    write()
    code, masks, *_ = convert("coco", tmp_path / "coco.json")
    assert code == 0 and np.array_equal(masks["a"], np.where(small, 2, large))
    from pycocotools import mask as coder

    packed = coder.encode(np.asfortranarray(small))
    compressed = {"size": packed["size"], "counts": packed["counts"].decode()}
    write(annotations=[{"id": 1, "image_id": 7, "category_id": 3, "segmentation": compressed}])
    assert np.array_equal(convert("coco", tmp_path / "coco.json", "--force")[1]["a"], 2 * small)
    write(categories=[{"id": 3, "name": "nucleus"}, {"id": 9, "name": "tree"}])
    assert "annotation 2: label 'tree' is not among" in convert("coco", tmp_path / "coco.json", "--force")[3]
    write(annotations=[{"id": 1, "image_id": 7, "category_id": 3, "segmentation": [[1e12] * 8]}])
    assert "not a segmentation of a 56 x 40 image" in convert("coco", tmp_path / "coco.json", "--force")[3]
    write(images={})
    assert convert("coco", tmp_path / "coco.json", "--force")[0] == 2


def run_lengths(region):
    """COCO's uncompressed run lengths: column by column, beginning with zeros."""
    flat = np.concatenate([[0], region.flatten(order="F"), [2]])
    changes = np.flatnonzero(np.diff(flat.astype(int)))
    return {"size": list(region.shape), "counts": np.diff([0, *changes]).tolist()}
