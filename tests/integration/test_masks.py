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
        ([shape("cell", "rectangle", (60, 0), (69, 9))], "lies outside of the image, which has 56 x 40 pixels"),
        ([shape("cell", "circle", (-9, 9), (-9, 12))], "lies outside of the image"),
        ([shape("cell", "rectangle", (0.1, 0.2), (1, 1))], "all coordinates are between 0 and 1"),
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
    image = {"id": 7, "file_name": "photos/a.jpg", "height": SIZE[0], "width": SIZE[1]}

    def write(**changes):
        content = {
            "images": [image],
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
    write(categories=[{"id": 3, "name": "tree"}, {"id": 9, "name": "cell"}])  # an unknown object inside a known one
    masks = convert("coco", tmp_path / "coco.json", "--force", "--ignore-unknown")[1]
    assert np.array_equal(masks["a"], np.where(small, 255, large))
    message = convert("coco", tmp_path, "--force")[3]
    assert f"{tmp_path}: is a folder; give the JSON file" in message
    write(annotations=[{"id": 1, "image_id": 7, "category_id": 3, "segmentation": [[1e12] * 8]}])
    assert "lies outside of the image" in convert("coco", tmp_path / "coco.json", "--force")[3]
    write(images={})
    assert convert("coco", tmp_path / "coco.json", "--force")[0] == 2
    for changes, told in [
        (dict(annotations=[region([[200, 3, 230, 3, 230, 20]])]), "annotation 1: lies outside of the image, which has"),
        (dict(annotations=[region([[0.1, 0.1, 0.5, 0.1, 0.5, 0.5]])]), "all coordinates are between 0 and 1"),
        (dict(images=[image, {**image, "file_name": "b.jpg"}]), "'photos/a.jpg' and 'b.jpg' have the same id 7"),
        (dict(categories=[{"id": 3, "name": "cell"}, {"id": 3, "name": "nucleus"}]), "'cell' and 'nucleus' have the"),
    ]:
        write(**changes)
        code, _, _, err = convert("coco", tmp_path / "coco.json", "--force")
        assert code == 2 and told in err


@pytest.mark.parametrize("crowd", [1, True, "1"])
def test_coco_crowds(convert, tmp_path, crowd):
    """In COCO a region of many objects, in CVAT's export any mask drawn with the brush."""
    pytest.importorskip("pycocotools")
    large, small = expected((1, (3, 20), (5, 30))), expected((1, (10, 16), (10, 21)))
    content = {
        "images": [{"id": 7, "file_name": "a.jpg"}],
        "categories": [{"id": 3, "name": "nucleus"}, {"id": 9, "name": "cell"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 9, "iscrowd": "0", "segmentation": [[5, 3, 30, 3, 30, 20, 5, 20]]},
            {"id": 2, "image_id": 7, "category_id": 3, "iscrowd": crowd, "segmentation": run_lengths(small)},
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    code, _, _, err = convert("coco", tmp_path / "coco.json")
    assert code == 2 and "annotation 2: has iscrowd=1" in err and "--crowds class" in err
    assert np.array_equal(
        convert("coco", tmp_path / "coco.json", "--force", "--crowds", "class")[1]["a"], np.where(small, 2, large)
    )
    ignored = convert("coco", tmp_path / "coco.json", "--force", "--crowds", "ignore")[1]["a"]
    assert np.array_equal(ignored, large)  # where a single object covers the crowd


def region(segmentation):
    return {"id": 1, "image_id": 7, "category_id": 3, "segmentation": segmentation}


def run_lengths(region):
    """COCO's uncompressed run lengths: column by column, beginning with zeros."""
    flat = np.concatenate([[0], region.flatten(order="F"), [2]])
    changes = np.flatnonzero(np.diff(flat.astype(int)))
    return {"size": list(region.shape), "counts": np.diff([0, *changes]).tolist()}


def photo(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(path, **options)


def labelme(path, label, **changes):
    """A JSON of LabelMe with a rectangle of a label."""
    shape = {"label": label, "shape_type": "rectangle", "points": [[5, 3], [29, 19]]}
    path.parent.mkdir(parents=True, exist_ok=True)
    size = {"imageHeight": SIZE[0], "imageWidth": SIZE[1]}
    path.write_text(json.dumps({"shapes": [shape], **size, **changes}))


def test_equal_names_in_folders(tmp_path, capsys):
    """Each image gets the annotation of its own folder, in every format."""
    pytest.importorskip("pycocotools")
    box, labels = [5, 3, 30, 3, 30, 20, 5, 20], {"train": "cell", "val": "nucleus"}
    images, annotations = [], []
    for number, (place, label) in enumerate(labels.items(), 1):
        photo(tmp_path / "img" / place / "1.jpg")
        labelme(tmp_path / "labelme" / place / "1.json", label)
        region = tmp_path / "marks" / place / label / "1.png"
        region.parent.mkdir(parents=True)
        Image.fromarray(expected((255, (3, 20), (5, 30)))).save(region)
        images.append({"id": number, "file_name": f"{place}/1.jpg"})
        annotations.append({"id": number, "image_id": number, "category_id": number, "segmentation": [box]})
    categories = [{"id": number, "name": name} for number, name in enumerate(labels.values(), 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    for kind, source in (("labelme", "labelme"), ("per-class", "marks"), ("coco", "coco.json")):
        words = ["masks", kind, tmp_path / source, "--images", tmp_path / "img", "--out", tmp_path / kind]
        assert run_main(main, [*map(str, words), "--classes", CLASSES]) == 0, kind
        for index, place in enumerate(labels, 1):
            mask = np.asarray(Image.open(tmp_path / kind / place / "1.png"))
            assert np.array_equal(mask, expected((index, (3, 20), (5, 30)))), (kind, place)
    photo(tmp_path / "img" / "1.jpg")  # beside them; its own annotation is the one without a folder
    labelme(tmp_path / "labelme" / "1.json", "nucleus")
    words = ["masks", "labelme", tmp_path / "labelme", "--images", tmp_path / "img", "--out", tmp_path / "three"]
    assert run_main(main, [*map(str, words), "--classes", CLASSES]) == 0
    found = {path.relative_to(tmp_path / "three").as_posix() for path in (tmp_path / "three").rglob("*.png")}
    assert found == {"1.png", "train/1.png", "val/1.png"}
    (tmp_path / "img" / "1.jpg").unlink()
    # One annotation that fits two images
    (tmp_path / "coco.json").write_text(json.dumps({**content, "images": [{"id": 1, "file_name": "1.jpg"}]}))
    words = ["masks", "coco", tmp_path / "coco.json", "--images", tmp_path / "img", "--out", tmp_path / "x"]
    assert run_main(main, [*map(str, words), "--classes", CLASSES]) == 2
    (tmp_path / "coco.json").write_text(
        json.dumps({**content, "images": [{"id": 1, "file_name": "1.jpg"}], "annotations": annotations[:1]})
    )
    capsys.readouterr()
    assert run_main(main, [*map(str, words), "--classes", CLASSES]) == 2
    assert "the annotation of 1.jpg fits both; rename one" in capsys.readouterr().err


def test_nothing_is_overwritten(convert, tmp_path):
    labelme(tmp_path / "json" / "a.json", "cell")
    for target in ("images", "file"):
        (tmp_path / "file").write_text("")
        err = convert("labelme", tmp_path / "json", "--out", tmp_path / target, "--force")[3]
        assert target != "file" or f"--out {tmp_path / 'file'}: is a file; give a folder" in err
    photo(tmp_path / "images" / "a.png")  # beside a.jpg
    labelme(tmp_path / "json" / "a.json", "cell")
    assert "rename one" in convert("labelme", tmp_path / "json")[3]
    (tmp_path / "images" / "a.jpg").unlink()
    before = (tmp_path / "images" / "a.png").read_bytes()
    err = convert("labelme", tmp_path / "json", "--out", tmp_path / "images", "--force")[3]
    assert "is an image or annotation, which its mask would replace; choose another --out" in err
    assert (tmp_path / "images" / "a.png").read_bytes() == before
    assert "a name is empty or given twice" in convert("labelme", tmp_path / "json", "--classes", "a,a")[3]


def test_labelme_of_turned_photo(convert, tmp_path):
    """LabelMe shows and measures a photo turned by its EXIF orientation."""
    exif = Image.Exif()
    exif[274] = 6
    photo(tmp_path / "images" / "a.jpg", exif=exif)
    labelme(tmp_path / "json" / "a.json", "cell", imageHeight=SIZE[1], imageWidth=SIZE[0])
    code, masks, *_ = convert("labelme", tmp_path / "json")
    assert code == 0 and masks["a"].shape == SIZE[::-1] and (masks["a"] == 1).sum() == 17 * 25
    labelme(tmp_path / "json" / "a.json", "cell")  # stored
    assert convert("labelme", tmp_path / "json", "--force")[1]["a"].shape == SIZE


def test_labelme_of_another_image(convert, tmp_path):
    labelme(tmp_path / "json" / "a.json", "cell", imagePath="..\\b.jpg")
    assert "a.json: was drawn on b.jpg (its imagePath)" in convert("labelme", tmp_path / "json")[3]
    labelme(tmp_path / "json" / "a.json", "sky")
    err = convert("labelme", tmp_path / "json")[3]
    assert err.count("a.json") == 1 and "label 'sky' is not among" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [{"id": "7", "file_name": "a.jpg"}]}, "annotation 1 is of image 7, which is not among its images"),
        ({"segmentation": []}, "annotation 1: has no region"),
        ({"segmentation": [[5, 5, 20, 20]]}, "annotation 1: has no region"),
        ({"segmentation": [[[5, 10], [15, 10], [15, 30]]]}, "annotation 1: has no region"),
        ({"category_id": 44}, "annotation 1: category_id 44 is not among its categories"),
        ({"category_id": [3]}, "annotation 1: category_id [3] is not among its categories"),
        ({"images": [{"id": n, "file_name": "a.jpg"} for n in (7, 8)]}, "two images with the file_name 'a.jpg'"),
    ],
)
def test_coco_objects_that_would_be_lost(convert, tmp_path, changes, message):
    pytest.importorskip("pycocotools")
    annotation = {"id": 1, "image_id": 7, "category_id": 3, "segmentation": [[5, 3, 30, 3, 30, 20, 5, 20]]}
    content = {"images": [{"id": 7, "file_name": "a.jpg"}], "categories": [{"id": 3, "name": "cell"}]}
    content["images"] = changes.pop("images", content["images"])
    (tmp_path / "coco.json").write_text(json.dumps({**content, "annotations": [{**annotation, **changes}]}))
    code, _, _, err = convert("coco", tmp_path / "coco.json")
    assert code == 2 and message in err


def test_coco_image_without_annotations(convert, tmp_path):
    pytest.importorskip("pycocotools")
    content = {"images": [{"id": 7, "file_name": "a.jpg"}], "categories": [{"id": 3, "name": "cell"}]}
    (tmp_path / "coco.json").write_text(json.dumps({**content, "annotations": []}))
    code, masks, out, _ = convert("coco", tmp_path / "coco.json")
    assert code == 0 and not masks["a"].any() and "1 images are listed without annotations" in out


@pytest.mark.parametrize("color", [(255, 255, 255), (0, 0, 0)])
def test_class_drawn_on_transparent(convert, tmp_path, color):
    region = expected((255, (3, 20), (5, 30)))
    drawing = np.dstack([np.full((*SIZE, 3), color, np.uint8), region])
    (tmp_path / "marks").mkdir()
    Image.fromarray(drawing).save(tmp_path / "marks" / "a_cell.png")
    assert np.array_equal(convert("per-class", tmp_path / "marks")[1]["a"], region // 255)
    drawing[3, 5, 3] = 120  # a smoothed border
    Image.fromarray(drawing).save(tmp_path / "marks" / "a_cell.png")
    assert "more than black and one other value" in convert("per-class", tmp_path / "marks", "--force")[3]
    black = Image.frombytes("P", SIZE[::-1], (region // 255).tobytes())  # a palette that tells nothing apart
    black.putpalette([0, 0, 0])
    black.save(tmp_path / "marks" / "a_cell.png")
    assert np.array_equal(convert("per-class", tmp_path / "marks", "--force")[1]["a"], region // 255)
