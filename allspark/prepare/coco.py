"""COCO 2017: masks of 81 classes drawn from the instance annotations, 0 elsewhere. See OVERLAP for the order."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from allspark.data.datasets.coco import CLASSES
from allspark.data.image_files import max_megapixels
from allspark.data.spec import IGNORE_INDEX
from allspark.prepare.archives import Index, Kind
from allspark.prepare.images import encode_png
from allspark.prepare.plan import Archive, Output, Plan, Sample
from allspark.utils.errors import UserError, short_repr

# Our choice: how the masks of the published results were drawn is not documented.
OVERLAP = (
    "Where instances overlap, the smaller one is on top. Crowd regions become 255 (ignored), except where a single "
    "instance covers them. Things become 1..80 in the order of their category ids; the rest is 0."
)


def check_pycocotools() -> None:
    """UserError, before anything is written, if the package that decodes COCO's masks is absent."""
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError("coco: decoding its masks needs pycocotools, which is not installed: pip install pycocotools")


def samples(index: Index, ignore_unknown: bool) -> dict[str, list[Sample]]:
    check_pycocotools()
    splits = [split for split in ("train", "val") if ("instances", split) in index.texts]
    return {split: split_samples(index, split, ignore_unknown) for split in splits}


def split_samples(index: Index, split: str, ignore_unknown: bool) -> list[Sample]:
    """A sample for each image in the annotations; without instances its mask is all 0."""
    found = index.files["instances", split]
    where = f"{found.source}: {found.name}"
    try:
        content = json.loads(index.texts.pop(("instances", split)))
        class_of = map_categories(content["categories"], where)
        if not ignore_unknown:
            check_categories(content["annotations"], class_of, where)
        instances: dict[int, list] = defaultdict(list)
        for annotation in content["annotations"]:
            known = class_of.get(annotation["category_id"], IGNORE_INDEX)
            crowd = bool(annotation.get("iscrowd"))
            value = IGNORE_INDEX if crowd else known
            instances[annotation["image_id"]].append((annotation["id"], value, crowd, annotation["segmentation"]))
        images = {image["id"]: image for image in content["images"]}
        if lost := instances.keys() - images.keys():
            raise UserError(f"{where}: annotations of image {min(lost)}, which is not among its images; {REMEDY}")
        return [make_sample(split, image, instances[key], where) for key, image in images.items()]
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:  # also numbers of 10,000 digits
        raise UserError(f"{where}: not COCO's instance annotations ({error!r}); {REMEDY}") from None


REMEDY = "download annotations_trainval2017.zip again"


def map_categories(categories: list[Mapping[str, Any]], where: str) -> dict[int, int]:
    """Category id -> class index. The 80 ids are between 1 and 90, with gaps."""
    found = sorted((category["id"], category["name"]) for category in categories)
    for number in range(max(len(found), len(CLASSES) - 1)):
        name = found[number][1] if number < len(found) else "none"
        expected = CLASSES[number + 1] if number + 1 < len(CLASSES) else "none"
        if name != expected:
            raise UserError(f"{where}: category number {number + 1} is {name!r}, expected {expected!r}; {REMEDY}")
    return {category_id: number for number, (category_id, _) in enumerate(found, start=1)}


def check_categories(annotations: list[Mapping[str, Any]], class_of: Mapping[int, int], where: str) -> None:
    unknown = [annotation for annotation in annotations if annotation["category_id"] not in class_of]
    if unknown:
        counts = Counter(annotation["category_id"] for annotation in unknown)
        text = ", ".join(f"{category!r} ({count} annotations)" for category, count in counts.most_common(5))
        remedy = f"{REMEDY}, or use --ignore-unknown to ignore their pixels"
        raise UserError(f"{where}: unknown category {text}, first in annotation {unknown[0]['id']}; {remedy}")


def make_sample(split: str, image: Mapping[str, Any], instances: list, where: str) -> Sample:
    name, height, width = image["file_name"], image["height"], image["width"]
    if not re.fullmatch(r"\d+\.jpg", name, re.ASCII):
        raise UserError(f"{where}: image {image['id']} has the file name {name!r}; {REMEDY}")
    if not (
        type(height) is type(width) is int and min(height, width) > 0 and height * width <= max_megapixels() * 10**6
    ):
        raise UserError(f"{where}: image {image['id']} has width {width!r} and height {height!r}; {REMEDY}")
    stem = name.removesuffix(".jpg")
    mask = Output(f"masks/{stem}.png", None, draw_mask, (where, height, width, instances))
    return Output(f"{split}2017/{name}", ("image", split, stem)), mask


def draw_mask(content: None, name: str, where: str, height: int, width: int, instances: list) -> bytes:
    """PNG of the mask; see draw_instances."""
    mask = np.zeros((height, width), np.uint8, order="F")  # column-major, as in pycocotools
    draw_instances(mask, instances, where, REMEDY)
    return encode_png(mask)


def draw_instances(mask: np.ndarray, instances: Iterable[tuple[Any, int, bool, Any]], where: str, remedy: str) -> None:
    """Draw annotations into a mask (H, W) uint8: crowd regions first, then the others, the largest first.

    Args:
        instances: (id of the annotation, class index or IGNORE_INDEX, whether it is a crowd, segmentation).
        where, remedy: for the message about a bad segmentation.
    """
    from pycocotools import mask as coder

    regions = []
    for annotation, value, crowd, segmentation in instances:
        place = f"{where}: annotation {short_repr(annotation)}"
        region = encode_segmentation(segmentation, *mask.shape, place, remedy)
        regions.append((not crowd, -int(coder.area(region)), value, region))
    for *_, value, region in sorted(regions, key=lambda drawn: drawn[:2]):
        np.copyto(mask, value, where=coder.decode(region).view(bool))


def encode_segmentation(segmentation: Any, height: int, width: int, where: str, remedy: str) -> Mapping[str, Any]:
    """Polygons [[x, y, x, y, ...], ...] or uncompressed run lengths -> pycocotools' own run lengths."""
    from pycocotools import mask as coder

    try:
        if not isinstance(segmentation, list):
            return run_lengths(segmentation, height, width)
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]  # fewer than 3 points enclose nothing
        check_polygons(polygons, max(height, width))
        return coder.merge(coder.frPyObjects(polygons or [[0] * 6], height, width))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where}: not a segmentation of a {width} x {height} image ({error}); {remedy}") from None


def check_polygons(polygons: list[list[float]], side: int) -> None:
    """pycocotools does not check polygons: coordinates far outside make it allocate unbounded memory."""
    for polygon in polygons:
        points = np.asarray(polygon, float)
        if points.ndim != 1 or len(points) % 2 or not (np.abs(points) <= 4 * side).all():
            raise ValueError("an odd number of coordinates, or far outside")


def run_lengths(segmentation: Mapping[str, Any], height: int, width: int) -> Mapping[str, Any]:
    """As lists of counts or as text. pycocotools' C code does not check that they fill the image."""
    from pycocotools import mask as coder

    counts = segmentation["counts"]
    counts = unpack_counts(counts) if isinstance(counts, str) else counts
    if list(segmentation["size"]) != [height, width] or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("run lengths of another size, or negative ones")
    if sum(counts) != height * width:
        raise ValueError(f"run lengths of {sum(counts)} pixels")
    return coder.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def unpack_counts(text: str) -> list[int]:
    """Counts from COCO's text form: 5 bits per character, lowest first; from the fourth on differences to the last but
    one."""
    counts, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("damaged run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # continues
            continue
        value -= (bits & 16) and 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value, shift = 0, 0
    return counts


COCO = Plan(
    dataset="coco",
    archives=(
        Archive("train2017.zip", "images.cocodataset.org/zips/train2017.zip"),
        Archive("val2017.zip", "images.cocodataset.org/zips/val2017.zip"),
        Archive("annotations_trainval2017.zip", "images.cocodataset.org/annotations/annotations_trainval2017.zip"),
    ),
    kinds=(
        Kind("image", r"(train|val)2017/(\d+)\.jpg"),
        Kind("instances", r"instances_(train|val)2017\.json", text=True, limit=2 << 30),
    ),
    counts={"train": 118287, "val": 5000},
    samples=samples,
    split="1_512",
)
