"""Images for TensorBoard: predictions of the first val images, and pseudo-labels of the first unlabeled images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from allspark.visualization.pictures import INK, PAPER, Palette, colorize, font, to_rgb

SIDE = 256  # pixels; maximum width and height of a panel
GAP = 4
HEAD = 18  # height of the titles


class Snapshots:
    """Collects the first `count` images of each kind as strips of titled panels, (H, W, 3) uint8 by name."""

    def __init__(self, palette: Palette, count: int) -> None:
        self.palette, self.count = palette, count
        self.strips: dict[str, np.ndarray] = {}

    def prediction(self, name: str, image: Tensor, mask: Tensor, prediction: Tensor) -> None:
        """Image, truth, prediction; to be passed as `save` to `evaluate`."""
        if self.is_open("val"):
            masks = {"truth": colorize(mask, self.palette), "prediction": colorize(prediction, self.palette)}
            self.add(f"val/{name}", image, masks)

    def pseudo_label(self, name: str, image: Tensor, mask: Tensor, label: Tensor, confidence: Tensor) -> None:
        """Image, hidden truth, pseudo-label, confidence (black 0, white 1); for `show` of measure_pseudo_labels."""
        if self.is_open("unlabeled"):
            gray = np.repeat((confidence * 255).round().byte().numpy()[..., None], 3, axis=2)
            masks = {"truth": colorize(mask, self.palette), "pseudo-label": colorize(label, self.palette)}
            self.add(f"unlabeled/{name}", image, {**masks, "confidence": gray})

    def is_open(self, kind: str) -> bool:
        """Whether more images are wanted. Checked first: coloring a large mask takes longer than predicting it."""
        return sum(name.startswith(f"{kind}/") for name in self.strips) < self.count

    def add(self, name: str, image: Tensor, masks: Mapping[str, np.ndarray]) -> None:
        """Add a strip: the image, and the masks under their titles."""
        panels = {"image": shrink(to_rgb(image), Image.Resampling.BILINEAR)}
        panels |= {title: shrink(mask, Image.Resampling.NEAREST) for title, mask in masks.items()}
        width, height = panels["image"].size
        strip = Image.new("RGB", (len(panels) * (width + GAP) - GAP, HEAD + height), PAPER)
        draw = ImageDraw.Draw(strip)
        for place, (title, panel) in enumerate(panels.items()):
            draw.text((place * (width + GAP), 1), title, INK, font(13))
            strip.paste(panel, (place * (width + GAP), HEAD))
        self.strips[name] = np.asarray(strip)


def shrink(pixels: np.ndarray, resample: Image.Resampling) -> Image.Image:
    """Downscale (H, W, 3) uint8 so that no side is longer than SIDE."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((SIDE, SIDE), resample)
    return picture
