"""The embedded data set: pictures of textured shapes, written once as PNG files from one seed; nothing to download."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path

from PIL import Image

from allspark.data.base import DatasetSpec
from allspark.data.datasets.shapes_drawing import OBJECTS, SEED, SIZE, render
from allspark.utils.errors import UserError

COUNTS = {"train": 480, "val": 120}
VERSION = 1  # of the pictures: another one makes recorded results void
MARKER = "shapes.json"  # says what a finished folder holds


def generate(root: Path, counts: dict[str, int] = COUNTS) -> None:
    """Write the data set to `root`, as a whole or not at all; a finished folder is left alone.

    UserError where `root` holds something else: nothing that is not ours is ever removed.
    """
    root = Path(root)
    contents = {"name": "shapes", "version": VERSION, "seed": SEED, "size": SIZE, "counts": counts}
    occupied = root.exists() and not (root.is_dir() and not any(root.iterdir()))
    if is_finished(root, contents):  # asked second: another job may finish it in between
        return
    if occupied:
        raise UserError(f"{root}: not the finished shapes data set; remove it or name another data_root")
    temporary = root.with_name(f".{root.name}.{uuid.uuid4().hex}")
    try:
        for split, count in counts.items():
            write_split(temporary, split, count)
        (temporary / MARKER).write_text(json.dumps(contents, indent=2) + "\n")
        try:
            os.rename(temporary, root)
        except OSError:
            if not is_finished(root, contents):  # else another process was faster, and its files are the same
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_finished(root: Path, contents: dict) -> bool:
    """Whether `root` holds all of this very version; its marker is renamed into place with everything else."""
    marker = root / MARKER
    return marker.is_file() and json.loads(marker.read_text()) == contents


def write_split(root: Path, split: str, count: int) -> None:
    """Write images/<split>/NNNN.png (RGB) and labels/<split>/NNNN.png (one channel of class indices)."""
    for kind in ("images", "labels"):
        (root / kind / split).mkdir(parents=True)
    for index in range(count):
        image, mask = render(split, index)
        Image.fromarray(image).save(root / "images" / split / f"{index:04d}.png", compress_level=1)
        Image.fromarray(mask).save(root / "labels" / split / f"{index:04d}.png")


SPEC = DatasetSpec(
    name="shapes",
    classes=("background", *OBJECTS),
    # near the classes' own hues, see class_hue
    palette=(
        (38, 42, 51),
        (247, 200, 60),
        (96, 190, 92),
        (56, 189, 193),
        (88, 121, 230),
        (200, 110, 210),
        (239, 89, 81),
    ),
    prepare=generate,
    background=0,
)
