"""The files that predictions are written to: their names, that none of them is in the way, what goes into which."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from allspark.errors import UserError
from allspark.evaluation.pictures import Palette, colorize, overlay, save_index_png, save_pixels


def unique_names(images: Sequence[Path]) -> list[str]:
    """A name for each image, to write files under: its stem, or where stems collide the path below the common folder.

    Two images that differ in their suffix alone still share one: PredictionFolder.prepare refuses them.
    """
    names = [image.stem for image in images]
    if len(set(names)) < len(names):
        images = [Path(os.path.abspath(image)) for image in images]  # no .. in a name of a file we write
        top = os.path.commonpath([image.parent for image in images])
        names = [image.relative_to(top).with_suffix("").as_posix() for image in images]
    return names


class PredictionFolder:
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

    def prepare(self, names: Sequence[str], images: Sequence[Path], masks: Iterable[Path] = ()) -> None:
        """Make the folder, before the work; UserError if a file would replace another one, an image or a mask."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: the folder cannot be made ({error.strerror}); choose another") from None
        folder = self.folder.resolve()
        taken = {place for path in (*images, *masks) for place in (path.resolve(), path.parent.resolve() / path.name)}
        owners: dict[str, Path] = {}
        for name, image in zip(names, images, strict=True):
            for file in (f"{name}{kind}.png" for kind in self.kinds):
                if file in owners:
                    raise UserError(
                        f"{self.folder / file}: both {owners[file]} and {image} would be written there; "
                        "rename one, or give them folders of their own"
                    )
                if folder / file in taken:
                    raise UserError(f"{self.folder / file}: this file is part of the data; choose another folder")
                owners[file] = image

    def write(self, name: str, image: Tensor, prediction: Tensor, confidence: Tensor | None = None) -> None:
        """image (3, H, W) uint8, prediction (H, W) uint8, confidence (H, W) in 0..1, all on the CPU."""
        for kind in self.kinds:
            path = self.folder / f"{name}{kind}.png"
            if kind == "_color":
                save_pixels(colorize(prediction, self.palette), path)
            elif kind == "_overlay":
                save_pixels(overlay(image, prediction, self.palette), path)
            elif kind == "_confidence":
                save_pixels((confidence * 255).round(), path)
            elif self.encode is None:
                save_index_png(prediction, self.palette, path)
            else:
                save_pixels(self.encode(prediction.numpy()), path)
