"""From a whole image to training views: the shared weak geometry, the photometric policies, the CutMix box.

Every draw comes from the numpy Generator that is handed in, and draws are apart from pixels: the same Generator state
gives the same crop whatever computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter

from allspark.data.resize import bilinear_window, nearest_window


@dataclass(frozen=True)
class Geometry:
    """The weak augmentation of an image: scale to `size`, pad right and bottom, cut a square of `crop`, maybe flip.

    size (width, height) and offset (left, top) of the crop are pixels of the scaled image. As in UniMatch. Only what
    the crop shows is scaled: masks come out as if Pillow had resized all of it, images within 2 grey levels of that.
    """

    size: tuple[int, int]
    offset: tuple[int, int]
    crop: int
    flip: bool

    def image(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (crop, crop, 3); bilinear, padded with black (before normalization, as released)."""
        return self._placed(bilinear_window(image, self.size, self.offset, self._visible()), 0)

    def mask(self, mask: np.ndarray, fill: int) -> np.ndarray:
        """(H, W) uint8 -> (crop, crop); nearest, padded with `fill`, the ignore index."""
        return self._placed(nearest_window(mask, self.size, self.offset, self._visible()), fill)

    def valid(self) -> np.ndarray:
        """(crop, crop) bool, False on the padding; from the geometry alone, no file is needed."""
        width, height = self._visible()
        valid = np.zeros((self.crop, self.crop), bool)
        valid[:height, self.crop - width if self.flip else 0 :][:, :width] = True
        return valid

    def _visible(self) -> tuple[int, int]:
        """Width and height of the part of the crop that shows the image."""
        return min(self.size[0] - self.offset[0], self.crop), min(self.size[1] - self.offset[1], self.crop)

    def _placed(self, visible: np.ndarray, fill: int) -> np.ndarray:
        """What is visible, padded to the crop and flipped; cv2 flips 20 times faster than numpy."""
        below, right = (self.crop - side for side in visible.shape[:2])
        if below or right:
            visible = cv2.copyMakeBorder(visible, 0, below, 0, right, cv2.BORDER_CONSTANT, value=[fill] * 4)
        return cv2.flip(visible, 1) if self.flip else np.ascontiguousarray(visible)


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


Operation = Callable[[np.ndarray, float], np.ndarray]  # (H, W, 3) uint8 and its strength -> the same, anew or as it is
Operations = Mapping[str, Operation]


def on_pillow(operation: Callable[[Image.Image, float], Image.Image]) -> Operation:
    return lambda image, strength: np.asarray(operation(Image.fromarray(image), strength))


def on_torchvision(name: str, arguments: Callable[[float], tuple] = lambda strength: (strength,)) -> Operation:
    """torchvision's function of this name on a Pillow image. Imported when it is used: it takes as long as torch."""

    def operation(picture: Image.Image, strength: float) -> Image.Image:
        from torchvision.transforms import functional

        return getattr(functional, name)(picture, *arguments(strength))

    return on_pillow(operation)


PILLOW: Operations = {
    "identity": lambda image, _: image,
    "brightness": on_torchvision("adjust_brightness"),
    "contrast": on_torchvision("adjust_contrast"),
    "saturation": on_torchvision("adjust_saturation"),
    "sharpness": on_torchvision("adjust_sharpness"),
    "hue": on_torchvision("adjust_hue"),
    "grey": on_torchvision("to_grayscale", lambda _: (3,)),
    "blur": on_pillow(lambda picture, radius: picture.filter(ImageFilter.GaussianBlur(radius))),
    "autocontrast": on_torchvision("autocontrast", lambda _: ()),
    "equalize": on_torchvision("equalize", lambda _: ()),
    "invert": on_torchvision("invert", lambda _: ()),
    "posterize": on_torchvision("posterize", lambda bits: (int(bits),)),
    "solarize": on_torchvision("solarize", lambda threshold: (int(threshold),)),
}


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return towards(image, 0, factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    return towards(image, int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5), factor)


def towards(image: np.ndarray, level: int, factor: float) -> np.ndarray:
    """Factor 0: `level` everywhere, 1: the image; truncated as in Pillow."""
    values = level + np.float32(factor) * (np.arange(256, dtype=np.float32) - level)
    return cv2.LUT(image, values.clip(0, 255).astype(np.uint8))


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.addWeighted(image, factor, grey(image), 1 - factor, -0.499)  # rounded where Pillow truncates


def grey(image: np.ndarray, _: float = 0) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def hue(image: np.ndarray, turn: float) -> np.ndarray:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(turn * 255) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def blur(image: np.ndarray, radius: float) -> np.ndarray:
    """By the kernel that Pillow means by a Gaussian of this standard deviation: three boxes with soft ends."""
    variance = radius**2 / 3
    half = int((math.sqrt(12 * variance + 1) - 1) / 2)
    end = (2 * half + 1) * (half * (half + 1) - 3 * variance) / (6 * (variance - (half + 1) ** 2))
    box = np.array([end, *[1.0] * (2 * half + 1), end]) / (2 * half + 1 + 2 * end)
    kernel = np.convolve(np.convolve(box, box), box)
    kernel = (kernel + kernel[::-1]) / 2  # to the last bit: three times faster
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


# The same six times faster, over all of a strong view. How far from PILLOW, in grey levels on photographs (on noise):
# brightness and contrast 0; saturation and grey at most 1, on average 0.002; hue at most 9 (13), on average 0.3 (1.2);
# blur at most 3, on average 0.4 (0.5), but for the outermost 6 pixels, at most 25 (40): Pillow repeats the border
# before each of its boxes.
CV2: Operations = {
    **PILLOW,
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "grey": grey,
    "hue": hue,
    "blur": blur,
}
OPERATIONS: dict[str, Operations] = {"cv2": CV2, "pil": PILLOW}  # by data.photometric

Policy = Callable[[np.ndarray, Generator, Operations], np.ndarray]


def weak(image: np.ndarray, rng: Generator, operations: Operations = PILLOW) -> np.ndarray:
    """The crop as it is."""
    return image


def draw_jitter(rng: Generator) -> list[tuple[str, float]]:
    """Colour jitter: brightness, contrast and saturation by 0.5 to 1.5, hue by up to 0.25, in a random order."""
    order = rng.permutation(4)
    strengths = [*rng.uniform(0.5, 1.5, size=3), rng.uniform(-0.25, 0.25)]
    return [(("brightness", "contrast", "saturation", "hue")[index], float(strengths[index])) for index in order]


def strong(image: np.ndarray, rng: Generator, operations: Operations = PILLOW) -> np.ndarray:
    """(H, W, 3) uint8: colour jitter p 0.8, grey p 0.2, blur p 0.5; as many draws each time. (UniMatch)"""
    jitters, jitter = rng.random() < 0.8, draw_jitter(rng)
    greys, blurs, radius = rng.random() < 0.2, rng.random() < 0.5, rng.uniform(0.1, 2.0)
    steps = jitter if jitters else []
    steps += [("grey", 0.0)] if greys else []
    steps += [("blur", radius)] if blurs else []
    return apply(steps, image, operations)


def pseudoseg(image: np.ndarray, rng: Generator, operations: Operations = PILLOW) -> np.ndarray:
    """(H, W, 3) uint8: colour jitter, always; no grey, no blur. The method cuts its square itself. (PseudoSeg)"""
    return apply(draw_jitter(rng), image, operations)


IMAS_OPERATIONS = (  # and the range of the strength, where it has one
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
    ("hue", 0, 0.5),
)


def imas(image: np.ndarray, rng: Generator, operations: Operations = PILLOW) -> np.ndarray:
    """(H, W, 3) uint8: two of IMAS_OPERATIONS, one after the other, each as strong as a uniform draw says; as many
    draws each time. (iMAS)
    """
    chosen, strengths = rng.integers(len(IMAS_OPERATIONS), size=2), rng.random(2).tolist()
    drawn = zip((IMAS_OPERATIONS[index] for index in chosen), strengths, strict=True)
    return apply([(name, low + (high - low) * share) for (name, low, high), share in drawn], image, operations)


def apply(steps: list[tuple[str, float]], image: np.ndarray, operations: Operations) -> np.ndarray:
    for name, strength in steps:
        image = operations[name](image, strength)
    return image


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
