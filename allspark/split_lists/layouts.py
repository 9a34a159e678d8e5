"""Folder layouts of the benchmarks: which mask belongs to which image, and the lists a data set itself defines."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from allspark.utils.errors import UserError


@dataclass(frozen=True)
class Layout:
    """A data set's layout; all paths are relative to the data root.

    Args:
        image_of: an image as written in a published list (path or bare id) -> its path.
        mask_of: path of an image -> path of its mask.
        own_lists: data root -> images of each list, by its name below the data set's folder of splits/.
        train: which of those lists holds all training images, labeled and unlabeled.
    """

    image_of: Callable[[str], str]
    mask_of: Callable[[str], str]
    own_lists: Callable[[Path], dict[str, list[str]]]
    train: str


def find_files(folder: Path, pattern: str, remedy: str) -> list[str]:
    """Files below a folder that match the pattern, sorted by path; UserError if there are none."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern))
    if not files:
        raise UserError(f"{folder}: contains no {pattern}; {remedy}")
    return files


def stem(image: str) -> str:
    return image.rpartition("/")[2].rpartition(".")[0]


def voc_image(column: str) -> str:
    return column if "/" in column else f"JPEGImages/{column}.jpg"


def voc_mask(image: str) -> str:
    return f"SegmentationClass/{stem(image)}.png"


def voc_lists(root: Path) -> dict[str, list[str]]:
    """VOC's own val and train in the order of ImageSets; train_aug: all images with a mask except VOC's val."""
    ids = {}
    for name in ("train", "val"):
        path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
        if not path.is_file():
            raise UserError(f"{path}: does not exist; copy ImageSets from VOC's archive (`prepare voc` does this)")
        ids[name] = path.read_text(encoding="utf-8").split()
    remedy = "it must contain the masks of VOC and SBD, see `prepare voc`"
    masks = {Path(name).stem for name in find_files(root / "SegmentationClass", "*.png", remedy)}
    train_aug = sorted(masks - set(ids["val"]))
    lists = {"val": ids["val"], "1464/labeled": ids["train"], "train_aug": train_aug}
    return {name: [voc_image(i) for i in images] for name, images in lists.items()}


def cityscapes_mask(image: str) -> str:
    return re.sub(r"_leftImg8bit\.png$", "_gtFine_labelTrainIds.png", image.replace("leftImg8bit/", "gtFine/", 1))


def coco_mask(image: str) -> str:
    return f"masks/{stem(image)}.png"


def ade20k_mask(image: str) -> str:
    return f"annotations/{image.removeprefix('images/').removesuffix('.jpg')}.png"


def folder_lists(folders: dict[str, str], pattern: str, remedy: str) -> Callable[[Path], dict[str, list[str]]]:
    """own_lists of a data set whose lists are folders. folders: list -> folder with its images."""

    def own_lists(root: Path) -> dict[str, list[str]]:
        return {
            name: [f"{folder}/{file}" for file in find_files(root / folder, pattern, remedy)]
            for name, folder in folders.items()
        }

    return own_lists


cityscapes_lists = folder_lists(
    {kind: f"leftImg8bit/{kind}" for kind in ("train", "val")},
    "*/*_leftImg8bit.png",
    "unpack leftImg8bit_trainvaltest.zip there",
)
coco_lists = folder_lists(
    {kind: f"{kind}2017" for kind in ("train", "val")}, "*.jpg", "unpack train2017.zip and val2017.zip there"
)
ade20k_lists = folder_lists({"train": "images/training", "val": "images/validation"}, "*.jpg", "see `prepare ade20k`")

LAYOUTS: dict[str, Layout] = {  # by folder of splits/
    "pascal": Layout(voc_image, voc_mask, voc_lists, train="train_aug"),
    "cityscapes": Layout(str, cityscapes_mask, cityscapes_lists, train="train"),
    "coco": Layout(str, coco_mask, coco_lists, train="train"),
    "ade20k": Layout(str, ade20k_mask, ade20k_lists, train="train"),
}


def get_layout(folder: str) -> Layout:
    if folder not in LAYOUTS:
        raise UserError(
            f"--dataset {folder}: its lists are this project's own, in splits/{folder}, and not published elsewhere; "
            f"`splits fetch` and `splits build` support {', '.join(LAYOUTS)}"
        )
    return LAYOUTS[folder]


def complement(train: Iterable[str], labeled: Sequence[str]) -> list[str]:
    """The unlabeled images: the train list without the labeled images, in the order of the train list."""
    chosen = set(labeled)
    return [image for image in train if image not in chosen]
