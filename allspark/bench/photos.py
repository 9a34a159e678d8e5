"""Synthetic photographs and masks that cost as much to decode as real ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from allspark.data.spec import DatasetSpec, Sample


@dataclass(frozen=True)
class Likeness:
    """Files like those of a data set.

    grain is the standard deviation of the noise per pixel, chosen to match the file sizes: PASCAL VOC's JPEGs have
    about 0.11 MB on average, Cityscapes' PNGs 2.3 MB.
    """

    dataset: str
    size: tuple[int, int]  # width, height
    crop: int
    suffix: str
    grain: float
    files: int  # default number of files


LIKENESSES = {
    "voc": Likeness("pascal", (500, 375), 513, ".jpg", 8.0, 64),
    "cityscapes": Likeness("cityscapes", (2048, 1024), 801, ".png", 1.0, 16),
}
JPEG_QUALITY = 95


def write_photos(folder: Path, like: Likeness, spec: DatasetSpec, count: int) -> list[Sample]:
    """Write labeled samples to folder; the n-th only depends on n."""
    folder.mkdir(parents=True)
    samples = []
    for index in range(count):
        rng = np.random.default_rng(index)
        sample = Sample(folder / f"{index}{like.suffix}", folder / f"{index}_mask.png")
        photo(rng, like.size, like.grain).save(sample.image, quality=JPEG_QUALITY)
        Image.fromarray(mask(rng, like.size, spec)).save(sample.mask)
        samples.append(sample)
    return samples


def photo(rng: Generator, size: tuple[int, int], grain: float) -> Image.Image:
    """Structure at all scales, with contrast nearly proportional to the wavelength, mostly gray, and grain."""
    width, height = size
    image = grain * gray_noise(rng, height, width)
    across = 8
    while across < width:
        coarse = gray_noise(rng, max(2, across * height // width), across)
        image += 40 * (8 / across) ** 0.9 * np.stack([enlarge(plane, size) for plane in np.moveaxis(coarse, 2, 0)], 2)
        across *= 2
    return Image.fromarray((110 + image).clip(0, 255).astype(np.uint8))


def gray_noise(rng: Generator, height: int, width: int) -> np.ndarray:
    """(height, width, 3): noise common to all colors, and a third as much for each color."""
    shape = (height, width)
    return rng.standard_normal((*shape, 1), np.float32) + 0.3 * rng.standard_normal((*shape, 3), np.float32)


def enlarge(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize(size, Image.Resampling.BICUBIC))


def mask(rng: Generator, size: tuple[int, int], spec: DatasetSpec) -> np.ndarray:
    """Blobs of all classes and of ignored pixels: (H, W) uint8, as the data set stores it."""
    height = enlarge(rng.standard_normal((6, 8), np.float32), size)
    levels = np.quantile(height, np.linspace(0, 1, spec.num_classes + 2)[1:-1])
    label = np.digitize(height, levels).astype(np.uint8)
    return np.where(label == spec.num_classes, np.uint8(spec.ignore_index), label)
