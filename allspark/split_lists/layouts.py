"""How the benchmarks' folders name what belongs together, and the lists that a data set itself gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from allspark.utils.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Paths are relative to the data root.

    image_of: an image as a published list writes it (a path or a bare id) -> its path.
    mask_of: an image's path -> its mask's. own_lists: data root -> images of each list, by its name below the data
    set's folder of splits/. train: which of those holds all training images, labeled and unlabeled.
    """

    image_of: Callable[[str], str]
    mask_of: Callable[[str], str]
    own_lists: Callable[[Path], dict[str, list[str]]]
    train: str


def find_files(folder: Path, pattern: str, remedy: str) -> list[str]:
    """The files below a folder that match, sorted by path; UserError where there is none."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern))
    if not found:
        raise UserError(f"{folder}: holds no {pattern}; {remedy}")
    return found


def identity(column: str) -> str:
    """image_of where the lists hold paths."""
    return column


def stem(image: str) -> str:
    return image.rpartition("/")[2].rpartition(".")[0]


def voc_image(column: str) -> str:
    return column if "/" in column else f"JPEGImages/{column}.jpg"


def voc_mask(image: str) -> str:
    return f"SegmentationClass/{stem(image)}.png"


def voc_lists(root: Path) -> dict[str, list[str]]:
    """VOC's own val and train, as ImageSets orders them; train_aug: every image with a mask that is not VOC's val."""
    ids = {}
    for name in ("train", "val"):
        path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
        if not path.is_file():
            raise UserError(f"{path}: does not exist; take ImageSets over from VOC's archive (`prepare pascal` does)")
        ids[name] = path.read_text(encoding="utf-8").split()
    remedy = "the masks of VOC and SBD belong there, see `prepare pascal`"
    masks = {Path(name).stem for name in find_files(root / "SegmentationClass", "*.png", remedy)}
    train_aug = sorted(masks - set(ids["val"]))
    lists = {"val": ids["val"], "1464/labeled": ids["train"], "train_aug": train_aug}
    return {name: [voc_image(i) for i in listed] for name, listed in lists.items()}


def cityscapes_mask(image: str) -> str:
    return re.sub(r"_leftImg8bit\.png$", "_gtFine_labelTrainIds.png", image.replace("leftImg8bit/", "gtFine/", 1))


def cityscapes_lists(root: Path) -> dict[str, list[str]]:
    remedy = "unpack leftImg8bit_trainvaltest.zip there"
    folders = {kind: root / "leftImg8bit" / kind for kind in ("train", "val")}
    found = {kind: find_files(folder, "*/*_leftImg8bit.png", remedy) for kind, folder in folders.items()}
    return {kind: [f"leftImg8bit/{kind}/{name}" for name in names] for kind, names in found.items()}


def coco_mask(image: str) -> str:
    return f"masks/{stem(image)}.png"


def coco_lists(root: Path) -> dict[str, list[str]]:
    found = {kind: find_files(root / f"{kind}2017", "*.jpg", f"unpack {kind}2017.zip there") for kind in ("train", "val")}
    return {kind: [f"{kind}2017/{name}" for name in names] for kind, names in found.items()}


def ade20k_mask(image: str) -> str:
    return f"annotations/{image.removeprefix('images/').removesuffix('.jpg')}.png"


def ade20k_lists(root: Path) -> dict[str, list[str]]:
    remedy, folders = "see `prepare ade20k`", {"train": "training", "val": "validation"}
    found = {kind: find_files(root / "images" / folder, "*.jpg", remedy) for kind, folder in folders.items()}
    return {kind: [f"images/{folders[kind]}/{name}" for name in names] for kind, names in found.items()}


LAYOUTS: dict[str, Layout] = {  # by folder of splits/
    "pascal": Layout(voc_image, voc_mask, voc_lists, train="train_aug"),
    "cityscapes": Layout(identity, cityscapes_mask, cityscapes_lists, train="train"),
    "coco": Layout(identity, coco_mask, coco_lists, train="train"),
    "ade20k": Layout(identity, ade20k_mask, ade20k_lists, train="train"),
}


def get_layout(folder: str) -> Layout:
    if folder not in LAYOUTS:
        raise UserError(
            f"--dataset {folder}: its lists are not published elsewhere, they are this project's own, in "
            f"splits/{folder}; `splits fetch` and `splits build` know {', '.join(LAYOUTS)}"
        )
    return LAYOUTS[folder]


def complement(train: Iterable[str], labeled: Sequence[str]) -> list[str]:
    """What is unlabeled: the train list without the labeled images, in the train list's order."""
    chosen = set(labeled)
    return [image for image in train if image not in chosen]
