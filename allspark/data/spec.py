"""What a data set is: its classes and colors, and how stored masks become class indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

IGNORE_INDEX = 255  # in every decoded mask, whatever the files contain
T = TypeVar("T")


def identity(value: T) -> T:
    """Default of `decode_mask` and `mask_path`."""
    return value


@dataclass(frozen=True)
class LookupTable:
    """A `decode_mask` by table look-up: class index = values[stored value]. Unlike a closure it can be pickled."""

    values: bytes

    @classmethod
    def from_mapping(cls, mapping: Mapping[int, int], default: int) -> LookupTable:
        """Build the table from stored value -> class index; `default` for stored values that are not in the mapping."""
        return cls(bytes(mapping.get(value, default) for value in range(max(255, *mapping) + 1)))

    def __call__(self, mask: np.ndarray) -> np.ndarray:
        return np.frombuffer(self.values, np.uint8)[mask]


def pack_color(color: Sequence[int]) -> int:
    """(red, green, blue) -> 0xRRGGBB."""
    red, green, blue = color
    return red << 16 | green << 8 | blue


@dataclass(frozen=True)
class ColorTable:
    """Class index (or IGNORE_INDEX) of each color, for masks that are stored as RGB.

    Args:
        colors: colors as 0xRRGGBB, ascending.
        values: class index of each color.
    """

    colors: tuple[int, ...]
    values: bytes

    @classmethod
    def from_mapping(cls, mapping: Mapping[tuple[int, int, int], int]) -> ColorTable:
        packed = {pack_color(color): value for color, value in mapping.items()}
        return cls(tuple(sorted(packed)), bytes(packed[color] for color in sorted(packed)))

    def decode(self, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """0xRRGGBB (H, W) -> class indices (H, W) uint8, and True where the color is unknown (H, W) bool."""
        known = np.array(self.colors)
        index = np.searchsorted(known, packed).clip(max=len(known) - 1)
        return np.frombuffer(self.values, np.uint8)[index], known[index] != packed


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel of the images, which are in 0..1, for the normalization."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @classmethod
    def of(cls, channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Statistics:
        """The given values, or ImageNet's; channels beyond RGB and images of one or two channels get their average."""

        def extend(values: tuple[float, ...]) -> tuple[float, ...]:
            average = round(sum(values) / 3, 3)
            return (average,) * channels if channels < 3 else values + (average,) * (channels - 3)

        return cls(tuple(mean or extend(IMAGENET.mean)), tuple(std or extend(IMAGENET.std)))


IMAGENET = Statistics()


@dataclass(frozen=True)
class ImageReading:
    """How the image files of a data set are read.

    Args:
        image_max: stored value of white in files with more than 8 bits per channel; None: 65535.
        orientation: 'stored' ignores EXIF orientation, of masks as well; 'shown' or None applies it.
        channels: 3 for RGB, 1 for gray; with other numbers the bands are taken as stored.
    """

    image_max: int | None = None
    orientation: str | None = None
    channels: int = 3


DEFAULT_READING = ImageReading()


@dataclass(frozen=True)
class DatasetSpec:
    """Everything the code needs to know about a data set.

    Args:
        name: of the data set.
        classes: names in the order of their indices.
        palette: RGB color of each class.
        ignore_index: value of decoded masks where no class is known.
        eval_mode: whole, center_crop or sliding_window.
        decode_mask: stored values 0..max_stored -> class indices with `ignore_index`, of the same shape. It must not
            raise: read_mask, which knows the file name, reports invalid values.
        max_stored: largest value that a mask may hold.
        prepare: creates the data set below its root; for data sets that need no download.
        split_folder: folder in splits/ if it is not the data set's name.
        mask_path: mask column of a list file -> path to read.
        mask_hint: remedy for invalid mask values, instead of the general one.
        submission: class indices (H, W) uint8 -> values the benchmark's server expects; None: class indices.
        background: index of the class for everything that belongs to no other class; None: there is no such class.
        colors: read masks as RGB colors, ignoring decode_mask; None: read masks as values.
        statistics: of the images, one value per channel.
        reading: how image files are read.
        is_custom: whether data.custom describes it.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int = IGNORE_INDEX
    eval_mode: str = "whole"
    decode_mask: Callable[[np.ndarray], np.ndarray] = identity
    max_stored: int = 255
    prepare: Callable[[Path], None] | None = None
    split_folder: str | None = None
    mask_path: Callable[[str], str] = identity
    mask_hint: str = ""
    submission: Callable[[np.ndarray], np.ndarray] | None = None
    background: int | None = None
    colors: ColorTable | None = None
    statistics: Statistics = IMAGENET
    reading: ImageReading = DEFAULT_READING
    is_custom: bool = False

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.reading.channels

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def splits(self) -> str:
        """Name of the folder in splits/."""
        return self.split_folder or self.name


@dataclass(frozen=True)
class Sample:
    """The files of one image. mask is None for unlabeled images, so that training cannot open their labels."""

    image: Path
    mask: Path | None = None


def voc_palette(num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """PASCAL VOC's colors: the bits of the class index go to the high bits of red, green and blue in turn."""

    def color(index: int) -> tuple[int, int, int]:
        channels = [0, 0, 0]
        for bit in range(8):
            channels[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        return channels[0], channels[1], channels[2]

    return tuple(color(index) for index in range(num_classes))
