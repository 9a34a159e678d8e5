"""From a whole image to training views: the shared weak geometry, the photometric policies, the CutMix box.

All randomness comes from the numpy Generator passed in, and drawing is separate from pixel operations: the same
Generator state gives the same crop on any implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from allspark.config import Size, height_width
from allspark.data.resize_crop import resize_crop_bilinear, resize_crop_nearest


@dataclass(frozen=True)
class Geometry:
    """The weak augmentation of an image, as in UniMatch: resize, pad right and bottom, crop, maybe flip.

    Only the part of the image that the crop shows is resized. Masks are identical to Pillow's resize of the whole
    mask, images differ from it by at most 2 gray levels.

    Args:
        size: (width, height) of the resized image, after the rotation.
        offset: (left, top) of the crop in the resized image.
        crop: (height, width) of the crop in pixels.
        flip: mirror the crop left to right.
        vertical_flip: mirror the crop top to bottom.
        turns: quarter turns, counterclockwise, by which the image is rotated first.
    """

    size: tuple[int, int]
    offset: tuple[int, int]
    crop: tuple[int, int]
    flip: bool
    vertical_flip: bool = False
    turns: int = 0

    def image(self, image: np.ndarray) -> np.ndarray:
        """(H, W, C) uint8 -> (*crop, C); bilinear, padded with black (before normalization, as released)."""
        image = np.rot90(image, self.turns)
        return self._pad_and_flip(resize_crop_bilinear(image, self.size, self.offset, self._visible_size()), 0)

    def mask(self, mask: np.ndarray, fill: int) -> np.ndarray:
        """(H, W) uint8 -> crop; nearest, padded with `fill`, the ignore index."""
        mask = np.rot90(mask, self.turns)
        return self._pad_and_flip(resize_crop_nearest(mask, self.size, self.offset, self._visible_size()), fill)

    def valid(self) -> np.ndarray:
        """Bool array of the crop's size, False on the padding; needs no pixels."""
        width, height = self._visible_size()
        valid = np.zeros(self.crop, bool)
        valid[:height, :width] = True
        return valid[:: -1 if self.vertical_flip else 1, :: -1 if self.flip else 1].copy()

    def _visible_size(self) -> tuple[int, int]:
        """(width, height) of the part of the crop that shows the image."""
        return min(self.size[0] - self.offset[0], self.crop[1]), min(self.size[1] - self.offset[1], self.crop[0])

    def _pad_and_flip(self, visible: np.ndarray, fill: int) -> np.ndarray:
        below, right = (whole - side for whole, side in zip(self.crop, visible.shape[:2], strict=True))
        channels = visible.shape[2:]
        if below or right:
            visible = cv2.copyMakeBorder(visible, 0, below, 0, right, cv2.BORDER_CONSTANT, value=[fill] * 4)
        if self.flip or self.vertical_flip:  # by cv2: 20 times faster than numpy
            visible = cv2.flip(visible, -1 if self.flip and self.vertical_flip else 1 if self.flip else 0)
        return np.ascontiguousarray(visible).reshape(*self.crop, *channels)  # cv2 drops a single channel


def draw_geometry(
    rng: Generator,
    width: int,
    height: int,
    crop: Size,
    scale_range: tuple[float, float] = (0.5, 2.0),
    horizontal_flip: bool = True,
    vertical_flip: bool = False,
    rotate_90: bool = False,
) -> Geometry:
    """Draw the weak augmentation of an image of `width` x `height` pixels.

    The draws, in order: the rotation, the long side (uniform integer in scale_range times its length), left, top, the
    horizontal and the vertical flip. Rotation and vertical flip are drawn only if they are asked for.
    """
    turns = int(rng.integers(4)) if rotate_90 else 0
    width, height = (height, width) if turns % 2 else (width, height)
    crop = height_width(crop)
    long = max(width, height)
    target = int(rng.integers(int(long * scale_range[0]), int(long * scale_range[1]), endpoint=True))
    scaled_width, scaled_height = (max(1, int(side * target / long + 0.5)) for side in (width, height))
    left = int(rng.integers(0, max(scaled_width - crop[1], 0), endpoint=True))
    top = int(rng.integers(0, max(scaled_height - crop[0], 0), endpoint=True))
    flip = bool(rng.random() < 0.5) and horizontal_flip
    vertical = vertical_flip and bool(rng.random() < 0.5)
    return Geometry((scaled_width, scaled_height), (left, top), crop, flip, vertical, turns)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, C) uint8 -> (C, H, W) uint8."""
    planes = np.empty((image.shape[2], *image.shape[:2]), np.uint8)
    cv2.split(image, list(planes))  # in place; several times faster than a transposed copy
    return torch.from_numpy(planes)


Operation = Callable[[np.ndarray, float], np.ndarray]  # (H, W, 3) uint8, strength -> a new array or the input
Operations = Mapping[str, Operation]


def pillow_operation(operation: Callable[[Image.Image, float], Image.Image]) -> Operation:
    return lambda image, strength: np.asarray(operation(Image.fromarray(image), strength))


def shift_hue(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + int(turn * 255)) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


PILLOW: Operations = {
    "identity": lambda image, _: image,
    "brightness": pillow_operation(lambda image, factor: ImageEnhance.Brightness(image).enhance(factor)),
    "contrast": pillow_operation(lambda image, factor: ImageEnhance.Contrast(image).enhance(factor)),
    "saturation": pillow_operation(lambda image, factor: ImageEnhance.Color(image).enhance(factor)),
    "sharpness": pillow_operation(lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor)),
    "hue": pillow_operation(shift_hue),
    "gray": pillow_operation(lambda image, _: image.convert("L").convert("RGB")),
    "blur": pillow_operation(lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius))),
    "autocontrast": pillow_operation(lambda image, _: ImageOps.autocontrast(image)),
    "equalize": pillow_operation(lambda image, _: ImageOps.equalize(image)),
    "invert": pillow_operation(lambda image, _: ImageOps.invert(image)),
    "posterize": pillow_operation(lambda image, bits: ImageOps.posterize(image, int(bits))),
    "solarize": pillow_operation(lambda image, threshold: ImageOps.solarize(image, int(threshold))),
}


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return blend_with_level(image, 0, factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    return blend_with_level(image, int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5), factor)


def blend_with_level(image: np.ndarray, level: int, factor: float) -> np.ndarray:
    """Factor 0: `level` everywhere, factor 1: the image; truncated as Pillow does."""
    values = level + np.float32(factor) * (np.arange(256, dtype=np.float32) - level)
    return cv2.LUT(image, values.clip(0, 255).astype(np.uint8))


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.addWeighted(image, factor, gray(image), 1 - factor, -0.499)  # -0.499: Pillow truncates, cv2 rounds


def gray(image: np.ndarray, _: float = 0) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def hue(image: np.ndarray, turn: float) -> np.ndarray:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(turn * 255) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def blur(image: np.ndarray, radius: float) -> np.ndarray:
    """With the kernel of Pillow's GaussianBlur: three box filters with fractional ends."""
    variance = radius**2 / 3
    half = int((math.sqrt(12 * variance + 1) - 1) / 2)
    end = (2 * half + 1) * (half * (half + 1) - 3 * variance) / (6 * (variance - (half + 1) ** 2))
    box = np.array([end, *[1.0] * (2 * half + 1), end]) / (2 * half + 1 + 2 * end)
    kernel = np.convolve(np.convolve(box, box), box)
    kernel = (kernel + kernel[::-1]) / 2  # exactly symmetric: three times faster
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


# A strong view is six times faster with these. Difference from PILLOW in gray levels, on photos (on noise):
# brightness and contrast 0; saturation and gray at most 1, on average 0.002; hue at most 9 (13), on average 0.3 (1.2);
# blur at most 3, on average 0.4 (0.5), except in the outermost 6 pixels, at most 25 (40): Pillow repeats the border
# before each of its box filters.
CV2: Operations = {
    **PILLOW,
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "gray": gray,
    "hue": hue,
    "blur": blur,
}
OPERATIONS: dict[str, Operations] = {"cv2": CV2, "pil": PILLOW}  # values of data.photometric

Policy = Callable[[np.ndarray, Generator, Operations, float], np.ndarray]


def weak(image: np.ndarray, rng: Generator, operations: Operations = PILLOW, strength: float = 1.0) -> np.ndarray:
    """The crop unchanged."""
    return image


def draw_jitter(rng: Generator, strength: float) -> list[tuple[str, float]]:
    """Color jitter in random order; at strength 1 by 0.5 to 1.5 (brightness, contrast, saturation) and 0.25 (hue)."""
    order = rng.permutation(4)
    factor, turn = 0.5 * strength, 0.25 * strength
    strengths = [*rng.uniform(1 - factor, 1 + factor, size=3), rng.uniform(-turn, turn)]
    return [(("brightness", "contrast", "saturation", "hue")[index], float(strengths[index])) for index in order]


def strong(image: np.ndarray, rng: Generator, operations: Operations = PILLOW, strength: float = 1.0) -> np.ndarray:
    """(H, W, 3) uint8: color jitter p 0.8, gray p 0.2, blur p 0.5; the number of draws is fixed. (UniMatch)"""
    use_jitter, jitter = rng.random() < 0.8, draw_jitter(rng, strength)
    use_gray, use_blur, radius = rng.random() < 0.2, rng.random() < 0.5, rng.uniform(0.1, 2.0)
    steps = jitter if use_jitter else []
    steps += [("gray", 0.0)] if use_gray else []
    steps += [("blur", radius)] if use_blur else []
    return apply_operations(steps, image, operations)


def pseudoseg(image: np.ndarray, rng: Generator, operations: Operations = PILLOW, strength: float = 1.0) -> np.ndarray:
    """(H, W, 3) uint8: always color jitter; no gray, no blur. The method itself erases a square. (PseudoSeg)"""
    return apply_operations(draw_jitter(rng, strength), image, operations)


IMAS_OPERATIONS = (  # name, range of the strength
    ("identity", 0, 0),
    ("autocontrast", 0, 0),
    ("equalize", 0, 0),
    ("invert", 0, 0),
    ("blur", 0.1, 2.0),
    ("contrast", 0.1, 0.95),
    ("brightness", 0.1, 0.95),
    ("saturation", 0.1, 0.95),
    ("sharpness", 0.1, 0.95),
    ("posterize", 4, 8),
    ("solarize", 1, 256),
    ("hue", -0.5, 0.5),  # Released: U(0, 0.5) with a random sign
)


def imas(image: np.ndarray, rng: Generator, operations: Operations = PILLOW, strength: float = 1.0) -> np.ndarray:
    """(H, W, 3) uint8: two of IMAS_OPERATIONS with uniform strengths; the number of draws is fixed. (iMAS)"""
    chosen, strengths = rng.integers(len(IMAS_OPERATIONS), size=2), rng.random(2).tolist()
    drawn = zip((IMAS_OPERATIONS[index] for index in chosen), strengths, strict=True)
    steps = [(name, low + (high - low) * share) for (name, low, high), share in drawn]
    return apply_operations(steps, image, operations)


def apply_operations(steps: list[tuple[str, float]], image: np.ndarray, operations: Operations) -> np.ndarray:
    """Apply (name, strength) pairs; channels that are not RGB are changed one by one, as gray images."""
    colors = 3 if image.shape[2] >= 3 else 0
    for name, strength in steps:
        if image.shape[2] == 3:
            image = operations[name](image, strength)
            continue
        parts = [operations[name](np.ascontiguousarray(image[..., :3]), strength)] if colors else []
        for channel in range(colors, image.shape[2]):
            gray = np.repeat(image[..., channel : channel + 1], 3, 2)
            parts.append(operations[name](gray, strength)[..., :1])
        image = np.concatenate(parts, 2)
    return image


PHOTOMETRIC: dict[str, Policy] = {"weak": weak, "strong": strong, "imas": imas, "pseudoseg": pseudoseg}


def cutmix_box(rng: Generator, size: Size, probability: float) -> np.ndarray:
    """Bool array of `size`: with the given probability True in a random box, else False everywhere. (UniMatch)

    The area is U(0.02, 0.4) of the crop, at most the square of its shorter side, which crops up to 2.5 : 1 never reach.
    The aspect ratio U(0.3, 1 / 0.3) and the place are drawn until the box fits; the ratio must be redrawn with the
    place, because 0.4 of the area at 3.3 is higher than a square crop.
    """
    rows, columns = height_width(size)
    box = np.zeros((rows, columns), bool)
    if rng.random() >= probability:
        return box
    area = min(rng.uniform(0.02, 0.4) * rows * columns, min(rows, columns) ** 2)
    while True:
        ratio = rng.uniform(0.3, 1 / 0.3)
        width, height = int(np.sqrt(area / ratio)), int(np.sqrt(area * ratio))
        left, top = (int(rng.integers(side)) for side in (columns, rows))
        if left + width <= columns and top + height <= rows:
            box[top : top + height, left : left + width] = True
            return box
