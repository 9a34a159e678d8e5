"""Made-up photographs and masks in files, that cost what real ones cost to decode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from allspark.data.spec import DatasetSpec, Sample


@dataclass(frozen=True)
class Likeness:
    """Files like those of a data set. grain: standard deviation of the noise per pixel, chosen for the size of a file:
    PASCAL VOC's JPEGs have about 0.11 MB on average, Cityscapes' PNGs 2.3 MB.
    """

    dataset: str
    size: tuple[int, int]  # width, height
    crop: int
    suffix: str
    grain: float
    files: int  # that are measured with


LIKENESSES = {
    "voc": Likeness("pascal", (500, 375), 513, ".jpg", 8.0, 64),
    "cityscapes": Likeness("cityscapes", (2048, 1024), 801, ".png", 1.0, 16),
}
JPEG_QUALITY = 95


def write_photos(folder: Path, like: Likeness, spec: DatasetSpec, count: int) -> list[Sample]:
    """Labeled samples below folder; the n-th is a function of n."""
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
    """Structure at all scales, nearly as much contrast at each octave as its wavelength, mostly grey, and grain."""
    width, height = size
    image = grain * grey_noise(rng, height, width)
    across = 8
    while across < width:
        coarse = grey_noise(rng, max(2, across * height // width), across)
        image += 40 * (8 / across) ** 0.9 * np.stack([enlarged(plane, size) for plane in np.moveaxis(coarse, 2, 0)], 2)
        across *= 2
    return Image.fromarray((110 + image).clip(0, 255).astype(np.uint8))


def grey_noise(rng: Generator, height: int, width: int) -> np.ndarray:
    """(height, width, 3): the same for all colours, and a third of that for each alone."""
    shape = (height, width)
    return rng.standard_normal((*shape, 1), np.float32) + 0.3 * rng.standard_normal((*shape, 3), np.float32)


def enlarged(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize(size, Image.Resampling.BICUBIC))


def mask(rng: Generator, size: tuple[int, int], spec: DatasetSpec) -> np.ndarray:
    """Blobs of all classes, and one of ignored pixels: (H, W) uint8 as the data set stores it."""
    height = enlarged(rng.standard_normal((6, 8), np.float32), size)
    levels = np.quantile(height, np.linspace(0, 1, spec.num_classes + 2)[1:-1])
    label = np.digitize(height, levels).astype(np.uint8)
    return np.where(label == spec.num_classes, np.uint8(spec.ignore_index), label)
