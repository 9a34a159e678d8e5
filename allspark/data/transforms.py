"""From a whole image to training views: the shared weak geometry, the photometric policies, the CutMix box.

Every draw comes from the numpy Generator that is handed in, and draws are apart from pixels: the same Generator state
gives the same crop whatever computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

Policy = Callable[[np.ndarray, Generator], np.ndarray]


@dataclass(frozen=True)
class Geometry:
    """The weak augmentation of an image: scale to `size`, pad right and bottom, cut a square of `crop`, maybe flip.

    size (width, height) and offset (left, top) of the crop are pixels of the scaled image. As in UniMatch.
    """

    size: tuple[int, int]
    offset: tuple[int, int]
    crop: int
    flip: bool

    def image(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (crop, crop, 3); bilinear, padded with black (before normalization, as released)."""
        scaled = Image.fromarray(image).resize(self.size, Image.Resampling.BILINEAR)
        return self._cut(np.asarray(scaled), 0)

    def mask(self, mask: np.ndarray, fill: int) -> np.ndarray:
        """(H, W) uint8 -> (crop, crop); nearest, padded with `fill`, the ignore index."""
        scaled = Image.fromarray(mask).resize(self.size, Image.Resampling.NEAREST)
        return self._cut(np.asarray(scaled), fill)

    def valid(self) -> np.ndarray:
        """(crop, crop) bool, False on the padding; from the geometry alone, no file is needed."""
        width, height = self._visible()
        valid = np.zeros((self.crop, self.crop), bool)
        valid[:height, :width] = True
        return self._flipped(valid)

    def _visible(self) -> tuple[int, int]:
        """Width and height of the part of the crop that shows the image."""
        return min(self.size[0] - self.offset[0], self.crop), min(self.size[1] - self.offset[1], self.crop)

    def _cut(self, scaled: np.ndarray, fill: int) -> np.ndarray:
        (left, top), (width, height) = self.offset, self._visible()
        crop = np.full((self.crop, self.crop, *scaled.shape[2:]), fill, np.uint8)
        crop[:height, :width] = scaled[top : top + height, left : left + width]
        return self._flipped(crop)

    def _flipped(self, crop: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(crop[:, ::-1]) if self.flip else crop


def draw_geometry(
    rng: Generator, width: int, height: int, crop: int, scale_range: tuple[float, float] = (0.5, 2.0)
) -> Geometry:
    """Four draws: the long side (a uniform integer in scale_range times its length), left, top, flip."""
    long = max(width, height)
    target = int(rng.integers(int(long * scale_range[0]), int(long * scale_range[1]), endpoint=True))
    scaled_width, scaled_height = (max(1, int(side * target / long + 0.5)) for side in (width, height))
    left = int(rng.integers(0, max(scaled_width - crop, 0), endpoint=True))
    top = int(rng.integers(0, max(scaled_height - crop, 0), endpoint=True))
    return Geometry((scaled_width, scaled_height), (left, top), crop, bool(rng.random() < 0.5))


def weak(image: np.ndarray, rng: Generator) -> np.ndarray:
    """The crop as it is."""
    return image


def draw_jitter(rng: Generator) -> list[Callable[[Image.Image], Image.Image]]:
    """Colour jitter: brightness, contrast and saturation by 0.5 to 1.5, hue by up to 0.25, in a random order."""
    order = rng.permutation(4)
    brightness, contrast, saturation = rng.uniform(0.5, 1.5, size=3)
    hue = rng.uniform(-0.25, 0.25)
    steps = (
        lambda p: F.adjust_brightness(p, brightness),
        lambda p: F.adjust_contrast(p, contrast),
        lambda p: F.adjust_saturation(p, saturation),
        lambda p: F.adjust_hue(p, hue),
    )
    return [steps[index] for index in order]


def strong(image: np.ndarray, rng: Generator) -> np.ndarray:
    """(H, W, 3) uint8: colour jitter p 0.8, grey p 0.2, blur p 0.5; as many draws each time. (UniMatch)"""
    jitters, jitter = rng.random() < 0.8, draw_jitter(rng)
    greys, blurs, radius = rng.random() < 0.2, rng.random() < 0.5, rng.uniform(0.1, 2.0)

    picture = Image.fromarray(image)
    if jitters:
        for step in jitter:
            picture = step(picture)
    if greys:
        picture = F.to_grayscale(picture, num_output_channels=3)
    if blurs:
        picture = picture.filter(ImageFilter.GaussianBlur(radius))
    return np.array(picture)


def pseudoseg(image: np.ndarray, rng: Generator) -> np.ndarray:
    """(H, W, 3) uint8: colour jitter, always; no grey, no blur. The method cuts its square itself. (PseudoSeg)"""
    picture = Image.fromarray(image)
    for step in draw_jitter(rng):
        picture = step(picture)
    return np.array(picture)


Operation = Callable[[Image.Image, float], Image.Image]
IMAS_OPERATIONS: tuple[tuple[Operation, float, float], ...] = (  # and the range of the strength, where it has one
    (lambda picture, _: picture, 0, 0),
    (lambda picture, _: F.autocontrast(picture), 0, 0),
    (lambda picture, _: F.equalize(picture), 0, 0),
    (lambda picture, _: F.invert(picture), 0, 0),
    (lambda picture, radius: picture.filter(ImageFilter.GaussianBlur(radius)), 0.1, 2.0),
    (F.adjust_contrast, 0.1, 0.95),
    (F.adjust_brightness, 0.1, 0.95),
    (F.adjust_saturation, 0.1, 0.95),
    (F.adjust_sharpness, 0.1, 0.95),
    (lambda picture, bits: F.posterize(picture, int(bits)), 4, 8),
    (lambda picture, threshold: F.solarize(picture, int(threshold)), 1, 256),
    (F.adjust_hue, 0, 0.5),
)


def imas(image: np.ndarray, rng: Generator) -> np.ndarray:
    """(H, W, 3) uint8: two of IMAS_OPERATIONS, one after the other, each as strong as a uniform draw says; as many
    draws each time. (iMAS)
    """
    chosen, strengths = rng.integers(len(IMAS_OPERATIONS), size=2), rng.random(2).tolist()
    picture = Image.fromarray(image)
    for (operation, low, high), strength in zip((IMAS_OPERATIONS[c] for c in chosen), strengths, strict=True):
        picture = operation(picture, low + (high - low) * strength)
    return np.array(picture)


PHOTOMETRIC: dict[str, Policy] = {
    "weak": weak,
    "strong": strong,
    "imas": imas,
    "pseudoseg": pseudoseg,
}


def cutmix_box(rng: Generator, size: int, probability: float) -> np.ndarray:
    """(size, size) bool, True in a box with the given probability, else False everywhere. (UniMatch)

    Area U(0.02, 0.4) of the square; height to width U(0.3, 1 / 0.3) and the place are drawn until the box fits. The
    ratio has to be drawn again with the place: 0.4 of the area at 3.3 is higher than the square and fits nowhere.
    """
    box = np.zeros((size, size), bool)
    if rng.random() >= probability:
        return box
    area = rng.uniform(0.02, 0.4) * size * size
    while True:
        ratio = rng.uniform(0.3, 1 / 0.3)
        width, height = int(np.sqrt(area / ratio)), int(np.sqrt(area * ratio))
        left, top = (int(rng.integers(size)) for _ in range(2))
        if left + width <= size and top + height <= size:
            box[top : top + height, left : left + width] = True
            return box
