"""Images for TensorBoard: predictions of the first val images, and pseudo-labels of the first unlabeled images."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

from allspark.visualization.pictures import PAPER, Palette, colorize, to_rgb

SIDE = 256  # pixels; maximum width and height of a panel
GAP = 4


class Snapshots:
    """Collects the first `count` images of each kind as strips of panels, (H, W, 3) uint8 by name."""

    def __init__(self, palette: Palette, count: int) -> None:
        self.palette, self.count = palette, count
        self.strips: dict[str, np.ndarray] = {}

    def prediction(self, name: str, image: Tensor, mask: Tensor, prediction: Tensor) -> None:
        """Image, truth, prediction; to be passed as `save` to `evaluate`."""
        if self.is_open("val"):
            self.add(f"val/{name}", image, colorize(mask, self.palette), colorize(prediction, self.palette))

    def pseudo_label(self, name: str, image: Tensor, mask: Tensor, label: Tensor, confidence: Tensor) -> None:
        """Image, hidden truth, pseudo-label, confidence (black 0, white 1); for `show` of measure_pseudo_labels."""
        if self.is_open("unlabeled"):
            gray = np.repeat((confidence * 255).round().byte().numpy()[..., None], 3, axis=2)
            self.add(f"unlabeled/{name}", image, colorize(mask, self.palette), colorize(label, self.palette), gray)

    def is_open(self, kind: str) -> bool:
        """Whether more images are wanted. Checked first: coloring a large mask takes longer than predicting it."""
        return sum(name.startswith(f"{kind}/") for name in self.strips) < self.count

    def add(self, name: str, image: Tensor, *masks: np.ndarray) -> None:
        panels = [shrink(to_rgb(image), Image.Resampling.BILINEAR)]
        panels += [shrink(mask, Image.Resampling.NEAREST) for mask in masks]
        gap = np.full((panels[0].shape[0], GAP, 3), PAPER, np.uint8)
        strip = [part for panel in panels for part in (panel, gap)][:-1]
        self.strips[name] = np.concatenate(strip, axis=1)


def shrink(pixels: np.ndarray, resample: Image.Resampling) -> np.ndarray:
    """Downscale (H, W, 3) uint8 so that no side is longer than SIDE."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((SIDE, SIDE), resample)
    return np.asarray(picture)
