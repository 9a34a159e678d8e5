"""Writing predictions to a folder: file names, protection of existing files, and the formats."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from allspark.utils.errors import UserError
from allspark.visualization.pictures import (
    Palette,
    colorize,
    draw_names,
    is_own_file,
    overlay,
    save_image,
    save_index_png,
    save_pixels,
)

LEGEND, LEGEND_WIDTH = "legend.png", 480
LONGEST = 255  # bytes; limit of common file systems
BAND = 2**22  # pixels blended at a time: blending takes 60 bytes per pixel


def unique_names(images: Sequence[Path]) -> list[str]:
    """A unique output name for each image: its stem or, if stems collide, the path below the common folder.

    Names that differ only in the suffix keep it. Case does not count, as in file systems of Windows and macOS.
    """
    names = [image.stem for image in images]
    if len(Counter(map(str.casefold, names))) < len(names):
        images = [Path(os.path.abspath(image)) for image in images]  # no .. in the name of an output file
        try:
            top = os.path.commonpath([image.parent for image in images])
        except ValueError:
            raise UserError("images of equal names on several drives; predict each drive on its own") from None
        images = [image.relative_to(top) for image in images]
        names = [image.with_suffix("").as_posix() for image in images]
        count = Counter(map(str.casefold, names))
        pairs = zip(names, images, strict=True)
        names = [name if count[name.casefold()] == 1 else image.as_posix() for name, image in pairs]
    return names


def real_path(path: Path) -> Path:
    """Path with links resolved. (Path.resolve fails for a link to itself.)"""
    return Path(os.path.realpath(path))


def find_conflict(path: Path, image: Path, owner: Path | None, inputs: Container[Path]) -> str | None:
    """Why the prediction of `image` must not be written to `path`, and the remedy; None if it may.

    Args:
        owner: another image whose prediction would be written there.
        inputs: files that must not be overwritten.
    """
    if owner is not None:
        return f"both {owner} and {image} would be written there; rename one, or put them into different folders"
    if path in inputs:
        return "this file is part of the input; choose another folder"
    if len(os.fsencode(path.name)) > LONGEST:
        return f"the file name is too long; rename {image}"
    if os.path.lexists(path) and not is_own_file(path):  # maybe someone's mask
        return "exists and was not written by this program; choose another folder, or move it away"
    return None


class PredictionWriter:
    """Writes <name>.png, and for viewing <name>_color.png, <name>_overlay.png and <name>_confidence.png.

    Args:
        encode: class indices -> values of <name>.png, written as 8-bit gray; None: class indices with palette (mode P).
        kinds: which to write; "index" is <name>.png.
        classes: names for legend.png, which is written beside pictures in color; empty: without.
    """

    def __init__(
        self,
        folder: Path,
        palette: Palette,
        *,
        encode: Callable[[np.ndarray], np.ndarray] | None = None,
        kinds: Sequence[str],
        classes: Sequence[str] = (),
    ) -> None:
        self.folder, self.palette, self.encode = folder, palette, encode
        self.kinds = ["" if kind == "index" else f"_{kind}" for kind in kinds]
        self.classes = classes

    def prepare(
        self,
        names: Sequence[str],
        images: Sequence[Path],
        masks: Iterable[Path] = (),
        videos: Mapping[Path, str] | None = None,
    ) -> None:
        """Create the folder and check all output names before the work starts.

        Args:
            names: output name of each image.
            masks: further input files.
            videos: video -> subfolder for its frames, which must contain nothing else.

        Raises:
            UserError: an output would overwrite a file that is not a prediction, or its name is not possible.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: the folder cannot be created ({error.strerror}); choose another") from None
        folder = real_path(self.folder)
        inputs = {each for path in (*images, *masks) for each in (real_path(path), real_path(path.parent) / path.name)}
        owners: dict[str, Path] = {}
        for name, image in zip(names, images, strict=True):
            for file in (f"{name}{kind}.png" for kind in self.kinds):
                if reason := find_conflict(folder / file, image, owners.get(file.casefold()), inputs):
                    raise UserError(f"{self.folder / file}: {reason}")
                owners[file.casefold()] = image
        for video, name in (videos or {}).items():
            if other := next((owner for file, owner in owners.items() if file.startswith(f"{name}/".casefold())), None):
                raise UserError(
                    f"{self.folder / name}: both {other} and the frames of {video} would be written there; rename one"
                )
            others = (file for file in (folder / name).glob("*.png") if not is_own_file(file))
            if any(folder / name in path.parents for path in inputs) or next(others, None):
                raise UserError(f"{self.folder / name}: this folder contains other images; choose another --out")
            owners[f"{name}/".casefold()] = video
        taken = owners.get(LEGEND) or owners.get(f"{LEGEND}/")
        if find_conflict(folder / LEGEND, Path(), taken, inputs):
            self.classes = ()

    def write(self, name: str, image: Tensor, prediction: Tensor, confidence: Tensor | None = None) -> None:
        """image (3, H, W) uint8, prediction (H, W) uint8, confidence (H, W) in 0..1, all on the CPU."""
        if {"_color", "_overlay"} & {*self.kinds}:
            self.write_legend()
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

    def write_legend(self) -> None:
        """The colors of the classes, once."""
        if self.classes:
            names = list(zip(self.classes, self.palette, strict=True))
            save_image(draw_names(names, LEGEND_WIDTH), self.folder / LEGEND)
            self.classes = ()


def overlay_in_bands(image: Tensor, mask: Tensor, palette: Palette) -> np.ndarray:
    """As `overlay` -> (H, W, 3) uint8, band by band, because its floats take ten times the memory of the image."""
    height, width = mask.shape
    rows = max(1, BAND // width)
    result = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        end = min(top + rows, height)
        band = slice(top, end + 1)  # borders depend on the row below
        result[top:end] = overlay(image[:, band], mask[band], palette)[: end - top]
    return result
