"""Masks of class indices from the files of annotation tools: one file per class, LabelMe, or COCO JSON."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from allspark.data.entries import image_files
from allspark.data.image_files import open_image, read_shown_size, read_size
from allspark.data.mask_io import look_up_gray
from allspark.data.spec import IGNORE_INDEX
from allspark.prepare.coco import check_pycocotools, draw_instances
from allspark.prepare.images import encode_png
from allspark.prepare.jobs import read_file
from allspark.utils.errors import UserError, short_repr

Draw = Callable[[np.ndarray], None]  # draws the annotations of an image into its mask (H, W) uint8
NOT_DRAWN = IGNORE_INDEX - 1  # in a mask: no annotation so far


class WrongSize(UserError):
    """The annotations are of an image of another size."""


@dataclass(frozen=True)
class Labels:
    """Class names and what becomes of everything else.

    Args:
        classes: in the order of their indices.
        background: index of pixels without annotation; None: the first class, if no pixel is annotated as such.
        ignore_unknown: pixels of other labels are ignored instead of an error.
        nested: of several files per image, the later class covers the earlier one instead of an error.
        crowds: "ignore" or "class": what COCO's regions with iscrowd become; None: an error.
    """

    classes: tuple[str, ...]
    background: int | None
    ignore_unknown: bool
    nested: bool
    crowds: str | None

    def index(self, label: Any, where: str) -> int:
        if label in self.classes:
            return self.classes.index(label)
        if self.ignore_unknown:
            return IGNORE_INDEX
        raise UserError(
            f"{where}: label {short_repr(label)} is not among --classes ({', '.join(self.classes)}); "
            "add it there, or use --ignore-unknown to ignore its pixels"
        )


def make_mask(image: Path, draw: Draw, labels: Labels) -> bytes:
    """The mask of an image as the bytes of a PNG: of a photo as viewers show it, or else as it is stored."""
    shown, stored = read_shown_size(image), read_size(image)
    try:
        mask = np.full(shown[::-1], NOT_DRAWN, np.uint8)
        draw(mask)
    except WrongSize:
        if stored == shown:
            raise
        mask = np.full(stored[::-1], NOT_DRAWN, np.uint8)
        draw(mask)
    rest = mask == NOT_DRAWN
    if labels.background is None and rest.any() and (mask == 0).any():
        first = labels.classes[0]
        raise UserError(
            f"{image}: some pixels are annotated as '{first}', and {int(rest.sum())} not at all; put a class for these "
            f"first in --classes, such as background, or add --background {first} if they are of that class, too"
        )
    mask[rest] = labels.background or 0
    return encode_png(mask)


def match_images(images: Sequence[Path], folder: Path, keys: Iterable[str], suffix: bool) -> dict[Path, str]:
    """The annotation of each image that has one, by its path: one of the two is the end of the other.

    Where folders have other names, the file's name decides, if no other image and no other annotation has it.

    Args:
        images: below `folder`.
        keys: paths of the annotations' images, with / between their parts.
        suffix: whether keys have the image's suffix.

    Raises:
        UserError: several annotations or several images fit.
    """
    by_name: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        by_name[PurePosixPath(key).name].append(key)
    paths = {image: image.relative_to(folder) for image in images}
    names = {image: path.as_posix() if suffix else path.with_suffix("").as_posix() for image, path in paths.items()}
    alike: dict[str, list[Path]] = defaultdict(list)
    for image, name in names.items():
        alike[PurePosixPath(name).name].append(image)
    exact = {key for each in by_name.values() for key in each} & set(names.values())
    found: dict[Path, str] = {}
    users: dict[str, Path] = {}
    for image, name in names.items():
        last = PurePosixPath(name).name
        others = [key for key in by_name[last] if key not in exact]
        fitting = [name] if name in exact else [key for key in others if is_end(key, name) or is_end(name, key)]
        if not fitting and len(by_name[last]) == len(alike[last]) == 1:
            fitting = by_name[last]
        if len(fitting) > 1:
            raise UserError(f"{image}: has annotations under {fitting[0]} and {fitting[1]}; rename or remove one")
        if fitting:
            other = users.setdefault(fitting[0], image)
            if other != image:
                raise UserError(f"{other} and {image}: the annotation of {fitting[0]} fits both; rename one")
            found[image] = fitting[0]
    return found


def is_end(path: str, whole: str) -> bool:
    return f"/{whole}".endswith(f"/{path}")


# One file per class


def per_class(source: Path, images: Sequence[Path], labels: Labels) -> dict[str, Draw]:
    """Files <class>/<image>.png or <image>_<class>.png in the folder; where a file is not zero is its class."""
    files: dict[str, list[tuple[str, Path]]] = {}
    stems = {image.stem for image in images}
    for path in image_files(source)[0]:
        place, stem = path.parent.relative_to(source), path.stem
        label = place.name
        if not label:  # a class's name may contain _
            endings = [name for name in labels.classes if stem.endswith(f"_{name}")]
            label = max(endings, key=len, default=stem.rpartition("_")[2])
            stem = stem[: -len(label)].removesuffix("_")
            if not endings and stem not in stems:  # no annotation, but for example one of the images
                continue
        files.setdefault((place.parent / stem).as_posix(), []).append((label, path))
    return {stem: lambda mask, found=found: draw_files(mask, found, labels) for stem, found in files.items()}


def draw_files(mask: np.ndarray, files: Sequence[tuple[str, Path]], labels: Labels) -> None:
    for index, path in sorted((labels.index(label, str(path)), path) for label, path in files):
        region = read_region(path)
        if region.shape != mask.shape:
            raise WrongSize(f"{path}: {size_of(region)} pixels, its image has {size_of(mask)}; create the mask again")
        twice = region & (mask != NOT_DRAWN)
        if twice.any() and not labels.nested:
            others = ", ".join(
                labels.classes[i] if i < len(labels.classes) else "unknown" for i in np.unique(mask[twice])
            )
            raise UserError(
                f"{path}: {int(twice.sum())} pixels belong to another class, too ({others}); correct the files, or add "
                "--nested to give such pixels the class that is later in --classes"
            )
        mask[region] = index


def read_region(path: Path) -> np.ndarray:
    """(H, W) bool, True where a mask of one class is not black, or not transparent if it has transparent pixels.

    UserError: it holds more than outside and one value.
    """
    with open_image(path) as image:
        alpha = np.asarray(image.convert("RGBA"))[..., 3] if image.has_transparency_data else None
        if image.mode == "P" and not (gray := look_up_gray(image))[1]:
            bands = [gray[0]]
        else:
            image = image.convert({"P": "RGB", "1": "L", "PA": "RGB"}.get(image.mode, image.mode))
            bands = [np.asarray(band) for band in image.split()]
    colors = np.stack(bands[:3] if len(bands) > 2 else bands[:1])
    region = colors.any(0)
    if alpha is not None and not alpha.all():
        region, colors = alpha > 0, np.concatenate([colors, alpha[None]])
    if any(np.ptp(band[region]) for band in colors if region.any()):
        raise UserError(
            f"{path}: holds more than black and one other value; a mask of one class has two values, or one on "
            "transparent, stored without loss (PNG, not JPEG)"
        )
    return region


# LabelMe


def labelme(source: Path, images: Sequence[Path], labels: Labels) -> dict[str, Draw]:
    """A JSON file per image; later shapes are drawn over earlier ones."""
    names = {image.name for image in images}
    return {
        path.relative_to(source).with_suffix("").as_posix(): lambda mask, path=path: draw_labelme(
            mask, path, names, labels
        )
        for path in sorted(source.rglob("*.json"))
    }


def draw_labelme(mask: np.ndarray, path: Path, names: set[str], labels: Labels) -> None:
    content = read_json(path)
    shapes = content.get("shapes") if isinstance(content, Mapping) else None
    if not isinstance(shapes, list):
        raise UserError(f"{path}: has no list of shapes; give LabelMe's own JSON files")
    drawn_on = PurePosixPath(str(content.get("imagePath") or "").replace("\\", "/"))
    if drawn_on.name in names and drawn_on.stem != path.stem:
        raise UserError(f"{path}: was drawn on {drawn_on.name} (its imagePath); rename it like its image")
    check_size(path, (content.get("imageHeight"), content.get("imageWidth")), mask)
    canvas = Image.fromarray(mask)
    drawing = ImageDraw.Draw(canvas)
    for number, shape in enumerate(shapes, start=1):
        where = f"{path}: shape {number}"
        try:
            kind, points = shape.get("shape_type") or "polygon", np.asarray(shape["points"], float)
            if points.ndim != 2 or points.shape[1] != 2 or not (np.abs(points) <= 4 * max(mask.shape)).all():
                raise ValueError("points far outside of the image, or not pairs")
            index, corners = labels.index(shape["label"], where), [tuple(point) for point in points]
            if kind == "circle" and len(points) == 2:  # center, and a point of the circle
                points = points[0] + np.array([[-1], [1]]) * math.dist(*points)
            check_place(points, mask, where)
            if kind == "polygon" and len(points) >= 3:
                drawing.polygon(corners, fill=index, outline=index)
            elif kind == "rectangle" and len(points) == 2:
                drawing.rectangle([*points.min(0), *points.max(0)], fill=index)
            elif kind == "circle" and len(points) == 2:
                drawing.ellipse(points.ravel().tolist(), fill=index)
            else:
                raise ValueError(f"a {short_repr(kind)} of {len(points)} points; draw polygons, rectangles or circles")
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{where}: cannot be drawn ({error})") from None
    mask[:] = np.asarray(canvas)


# COCO


def coco(source: Path, images: Sequence[Path], labels: Labels) -> dict[str, Draw]:
    """One JSON file with images, annotations and categories; smaller regions are drawn over larger ones."""
    check_pycocotools()
    content = read_json(source)
    try:
        names = unique_ids(content["categories"], "name", source)
        regions: dict[Any, list[Mapping]] = {key: [] for key in unique_ids(content["images"], "file_name", source)}
        for annotation in content["annotations"]:
            if annotation["image_id"] not in regions:
                place = f"{source}: annotation {short_repr(annotation.get('id'))}"
                raise UserError(
                    f"{place} is of image {short_repr(annotation['image_id'])}, which is not among its images"
                )
            regions[annotation["image_id"]].append(annotation)
        found: dict[str, Draw] = {}
        for image in content["images"]:
            name = image["file_name"].replace("\\", "/").removeprefix("./")
            if name in found:
                raise UserError(f"{source}: has two images with the file_name {short_repr(name)}; merge them into one")
            found[name] = lambda mask, image=image: draw_coco(mask, image, regions[image["id"]], names, source, labels)
        empty = sum(not annotations for annotations in regions.values())
        if empty:
            print(f"{source}: {empty} images are listed without annotations, their masks show background alone")
        return found
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: not COCO's format of instances ({error!r}); export it again") from None


def unique_ids(items: Sequence[Mapping], key: str, source: Path) -> dict[Any, Any]:
    """The value of a key by the id of its item; UserError if two items with one id differ in it."""
    found: dict[Any, Any] = {}
    for item in items:
        if found.setdefault(item["id"], item[key]) != item[key]:
            both = f"{short_repr(found[item['id']])} and {short_repr(item[key])}"
            raise UserError(
                f"{source}: {both} have the same id {short_repr(item['id'])}, so their annotations cannot be told "
                "apart; were files joined without new ids? Convert them one by one"
            )
    return found


def draw_coco(
    mask: np.ndarray, image: Mapping, annotations: Sequence[Mapping], names: Mapping, source: Path, labels: Labels
) -> None:
    check_size(source, (image.get("height"), image.get("width")), mask)
    instances = []
    for annotation in annotations:
        number, category = annotation.get("id"), annotation.get("category_id")
        where = f"{source}: annotation {short_repr(number)}"
        if not isinstance(category, (int, str)) or (category not in names and not labels.ignore_unknown):
            raise UserError(f"{where}: category_id {short_repr(category)} is not among its categories")
        crowd = annotation.get("iscrowd") in (1, "1") and labels.crowds != "class"
        if crowd and labels.crowds is None:
            raise UserError(
                f"{where}: has iscrowd=1. COCO means a region of many objects by it, CVAT any mask that was drawn with "
                "the brush; add --crowds ignore, or --crowds class to draw such regions like others"
            )
        index = IGNORE_INDEX if crowd else labels.index(names.get(category), where)
        segmentation = annotation.get("segmentation")
        if not segmentation or (isinstance(segmentation, list) and not any(is_polygon(part) for part in segmentation)):
            raise UserError(
                f"{where}: has no region (a polygon is a list x, y, x, y, ... of at least 3 points); boxes alone are "
                "for detection: export segmentations"
            )
        if isinstance(segmentation, list):
            parts = filter(is_polygon, segmentation)
            points = [pair for part in parts for pair in zip(part[::2], part[1::2], strict=False)]
            check_place(np.array(points, float), mask, where)
        instances.append((number, index, crowd, segmentation))
    draw_instances(mask, instances, str(source), "correct it, or export it again")


def is_polygon(part: Any) -> bool:
    return isinstance(part, list) and len(part) >= 6 and all(isinstance(value, (int, float)) for value in part)


# Annotations, images, labels -> what to draw for the image of a path, in COCO with its suffix
FORMATS: dict[str, Callable[[Path, Sequence[Path], Labels], dict[str, Draw]]] = {
    "per-class": per_class,
    "labelme": labelme,
    "coco": coco,
}


def read_json(path: Path) -> Any:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the JSON file")
    try:
        return json.loads(read_file(path))
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, numbers of thousands of digits
        raise UserError(f"{path}: not JSON ({str(error)[:200]}); export it again") from None


def check_size(path: Path, stated: tuple[Any, Any], mask: np.ndarray) -> None:
    """UserError if the annotations are of an image of another size, as after a rotation or a resize."""
    if None not in stated and stated != mask.shape:
        raise WrongSize(
            f"{path}: was drawn on an image of {short_repr(stated[1])} x {short_repr(stated[0])} pixels, the image has "
            f"{size_of(mask)}; give the images that were annotated"
        )


def check_place(points: np.ndarray, mask: np.ndarray, where: str) -> None:
    """UserError if the points (N, 2) of a shape, as x and y, cannot be pixels of the image."""
    if (points.max(0) < 0).any() or (points.min(0) > mask.shape[::-1]).any():
        raise UserError(
            f"{where}: lies outside of the image, which has {size_of(mask)} pixels; give the images that were annotated"
        )
    if ((points >= 0) & (points <= 1)).all() and (points % 1).any():
        raise UserError(f"{where}: all coordinates are between 0 and 1; export coordinates in pixels")


def size_of(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"
