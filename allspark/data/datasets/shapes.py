"""The built-in data set: images of textured shapes, generated as PNG files from one seed; no download."""

from __future__ import annotations

import glob
import json
import os
import shutil
import time
import uuid
from pathlib import Path

from PIL import Image

from allspark.data.datasets.shapes_drawing import OBJECTS, SEED, SIZE, render
from allspark.data.spec import DatasetSpec
from allspark.utils.errors import UserError

COUNTS = {"train": 480, "val": 120}
VERSION = 1  # of the images; a new version invalidates recorded results
LEFTOVER_AGE = 3600  # seconds; writing takes less than a minute
MARKER = "shapes.json"  # describes the content of a finished folder


def generate(root: Path, counts: dict[str, int] = COUNTS) -> None:
    """Write the data set to `root`, completely or not at all; a finished folder is left unchanged.

    Raises:
        UserError: `root` contains something else, which is never removed, or cannot be written.
    """
    root = Path(root)
    contents = {"name": "shapes", "version": VERSION, "seed": SEED, "size": SIZE, "counts": counts}
    occupied = root.exists() and not (root.is_dir() and not any(root.iterdir()))
    if is_finished(root, contents):  # checked second: another job may finish it in between
        return
    if occupied:
        raise UserError(f"{root}: not a complete shapes data set; remove it or use another data_root")
    for old in root.parent.glob(f".{glob.escape(root.name)}.{'?' * 32}"):  # left by processes that were killed
        if time.time() - old.stat().st_mtime > LEFTOVER_AGE:
            shutil.rmtree(old, ignore_errors=True)
    temporary = root.with_name(f".{root.name}.{uuid.uuid4().hex}")
    try:
        for split, count in counts.items():
            write_split(temporary, split, count)
        (temporary / MARKER).write_text(json.dumps(contents, indent=2) + "\n")
        try:
            os.rename(temporary, root)
        except OSError:
            if not is_finished(root, contents):  # otherwise another process finished first, with the same files
                raise
    except OSError as error:
        raise UserError(f"{root}: cannot be written ({error.strerror}); choose another data.data_root") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_finished(root: Path, contents: dict) -> bool:
    """Whether `root` is complete and of this version; the marker file is renamed into place with everything else."""
    try:
        return json.loads((root / MARKER).read_text(encoding="utf-8")) == contents
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):  # none, or damaged
        return False


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
    # close to the class hues, see class_hue
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
