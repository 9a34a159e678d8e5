"""The files that predictions are written to: their names, that none of them is in the way, what goes into which."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from allspark.utils.errors import UserError
from allspark.visualization.pictures import Palette, colorize, is_own_file, overlay, save_index_png, save_pixels

LONGEST = 255  # bytes of a name on the file systems of today
BAND = 2**22  # pixels that are laid over each other at once: the blend takes 60 bytes for each


def unique_names(images: Sequence[Path]) -> list[str]:
    """A name for each image, to write files under: its stem, or where stems collide the path below the common folder.

    Where two differ in their suffix alone, they keep it.
    """
    names = [image.stem for image in images]
    if len(set(names)) < len(names):
        images = [Path(os.path.abspath(image)) for image in images]  # no .. in a name of a file we write
        top = os.path.commonpath([image.parent for image in images])
        images = [image.relative_to(top) for image in images]
        names = [image.with_suffix("").as_posix() for image in images]
        count = Counter(names)
        names = [name if count[name] == 1 else image.as_posix() for name, image in zip(names, images, strict=True)]
    return names


def real_path(path: Path) -> Path:
    """Where it lies. (Path.resolve fails at a link that leads to itself.)"""
    return Path(os.path.realpath(path))


def find_conflict(place: Path, image: Path, owner: Path | None, taken: Container[Path]) -> str | None:
    """Why a picture of `image` may not go there, and the remedy; None: it may. owner: another image that goes there."""
    if owner is not None:
        return f"both {owner} and {image} would be written there; rename one, or give them folders of their own"
    if place in taken:
        return "this file is part of the data; choose another folder"
    if len(os.fsencode(place.name)) > LONGEST:
        return f"no file may have so long a name; rename {image}"
    if os.path.lexists(place) and not is_own_file(place):  # a mask of somebody's, perhaps
        return "is there already, and no prediction of this program; choose another folder, or move it away"
    return None


class PredictionWriter:
    """Writes <name>.png, and for people <name>_color.png, <name>_overlay.png and <name>_confidence.png beside it.

    <name>.png holds the class indices with palette (mode P), or as 8-bit grey what `encode` makes of them.
    """

    def __init__(
        self,
        folder: Path,
        palette: Palette,
        *,
        encode: Callable[[np.ndarray], np.ndarray] | None = None,
        index_only: bool = False,
        confidence: bool = False,
    ) -> None:
        self.folder, self.palette, self.encode = folder, palette, encode
        self.kinds = [""] if index_only else ["", "_color", "_overlay", *(["_confidence"] if confidence else [])]

    def prepare(
        self,
        names: Sequence[str],
        images: Sequence[Path],
        masks: Iterable[Path] = (),
        videos: Mapping[Path, str] | None = None,
    ) -> None:
        """Make the folder, before the work; UserError if a file would replace another one that is no prediction, or
        cannot have its name.

        videos: of each the folder that its frames get below this one, and have to themselves.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: the folder cannot be made ({error.strerror}); choose another") from None
        folder = real_path(self.folder)
        taken = {place for path in (*images, *masks) for place in (real_path(path), real_path(path.parent) / path.name)}
        owners: dict[str, Path] = {}
        for name, image in zip(names, images, strict=True):
            for file in (f"{name}{kind}.png" for kind in self.kinds):
                if reason := find_conflict(folder / file, image, owners.get(file), taken):
                    raise UserError(f"{self.folder / file}: {reason}")
                owners[file] = image
        for video, name in (videos or {}).items():
            if other := next((owner for file, owner in owners.items() if file.startswith(f"{name}/")), None):
                raise UserError(
                    f"{self.folder / name}: both {other} and the frames of {video} would be written there; rename one"
                )
            others = (file for file in (folder / name).glob("*.png") if not is_own_file(file))
            if any(folder / name in path.parents for path in taken) or next(others, None):
                raise UserError(f"{self.folder / name}: this folder holds other pictures; choose another --out")
            owners[f"{name}/"] = video

    def write(self, name: str, image: Tensor, prediction: Tensor, confidence: Tensor | None = None) -> None:
        """image (3, H, W) uint8, prediction (H, W) uint8, confidence (H, W) in 0..1, all on the CPU."""
        for kind in self.kinds:
            path = self.folder / f"{name}{kind}.png"
            if kind == "_color":
                save_pixels(colorize(prediction, self.palette), path)
            elif kind == "_overlay":
                save_pixels(overlay_in_bands(image, prediction, self.palette), path)
            elif kind == "_confidence":
                save_pixels((confidence * 255).round_().to(torch.uint8), path)
            elif self.encode is None:
                save_index_png(prediction, self.palette, path)
            else:
                save_pixels(self.encode(prediction.numpy()), path)


def overlay_in_bands(image: Tensor, mask: Tensor, palette: Palette) -> np.ndarray:
    """What overlay gives, (H, W, 3) uint8, band by band: its floats take ten times as much as the picture."""
    height, width = mask.shape
    rows = max(1, BAND // width)
    drawn = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        end = min(top + rows, height)
        band = slice(top, end + 1)  # borders look at the row below
        drawn[top:end] = overlay(image[:, band], mask[band], palette)[: end - top]
    return drawn
