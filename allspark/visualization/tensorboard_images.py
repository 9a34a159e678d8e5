"""What an evaluation shows in TensorBoard: the first images of val, and of the unlabeled ones that are labeled."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

from allspark.visualization.pictures import PAPER, Palette, colorize, to_rgb

SIDE = 256  # pixels; the most that a panel has in width or height
GAP = 4


class Snapshots:
    """Keeps the first `count` images that it is called with, as strips of panels: (H, W, 3) uint8 by name."""

    def __init__(self, palette: Palette, count: int) -> None:
        self.palette, self.count = palette, count
        self.strips: dict[str, np.ndarray] = {}

    def prediction(self, name: str, image: Tensor, mask: Tensor, prediction: Tensor) -> None:
        """Image, truth, prediction; as `evaluate` calls its `save`."""
        if self.room("val"):
            self.keep(f"val/{name}", image, colorize(mask, self.palette), colorize(prediction, self.palette))

    def pseudo_label(self, name: str, image: Tensor, mask: Tensor, label: Tensor, confidence: Tensor) -> None:
        """Image, hidden truth, pseudo-label, confidence from black (0) to white (1); as label_quality calls `show`."""
        if self.room("unlabeled"):
            grey = np.repeat((confidence * 255).round().byte().numpy()[..., None], 3, axis=2)
            self.keep(f"unlabeled/{name}", image, colorize(mask, self.palette), colorize(label, self.palette), grey)

    def room(self, kind: str) -> bool:
        """Asked before a mask is coloured, which of a large one takes longer than to predict it."""
        return sum(kept.startswith(f"{kind}/") for kept in self.strips) < self.count

    def keep(self, name: str, image: Tensor, *masks: np.ndarray) -> None:
        panels = [shrink(to_rgb(image), Image.Resampling.BILINEAR)]
        panels += [shrink(mask, Image.Resampling.NEAREST) for mask in masks]
        space = np.full((panels[0].shape[0], GAP, 3), PAPER, np.uint8)
        strip = [part for panel in panels for part in (panel, space)][:-1]
        self.strips[name] = np.concatenate(strip, axis=1)


def shrink(pixels: np.ndarray, how: Image.Resampling) -> np.ndarray:
    """(H, W, 3) uint8, so that no side is longer than SIDE."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((SIDE, SIDE), how)
    return np.asarray(picture)
