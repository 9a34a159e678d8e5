"""Decoding images: their pixels as RGB, gray or bands of 8 bits.

load_image, and load_mask in mask_io, are the only places where pixels are read. They interpret values only as the file
declares them (palette, bits, orientation, transparency), and raise BadSample if it does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from allspark.data.image_files import (
    MAX_PAGES,
    ORIENTATION,
    TURNS,
    BadSample,
    check_bands,
    max_megapixels,
    open_image,
    orientation_of,
    raw_mode,
    retried,
    tiff_layout,
    tiff_tags,
)
from allspark.data.spec import DEFAULT_READING, ImageReading
from allspark.utils.errors import UserError, reason_of

STRIP = 1 << 24  # pixels converted at a time
TURNED_BACK = {6: 8, 8: 6}  # orientation -> the one that undoes it; the others undo themselves


class ImageFile(NamedTuple):
    """An image, and what its file says about it.

    Args:
        pixels: (H, W, C) uint8, RGB if C is 3.
        peak: largest stored value of a file with more than 8 bits per channel, else None.
        orientation: the EXIF orientation, 1 if the image needs no turning.
    """

    pixels: np.ndarray
    peak: int | None
    orientation: int


def turn(image: Image.Image, orientation: int, reading: ImageReading) -> Image.Image:
    """Turn a decoded image of Pillow's as `reading` says. Pillow itself has turned TIFFs for display."""
    shown, stored = image.format == "TIFF", reading.orientation == "stored"
    if orientation not in TURNS or shown != stored:
        return image
    return image.transpose(TURNS[TURNED_BACK.get(orientation, orientation) if stored else orientation])


def read_image(path: Path, reading: ImageReading = DEFAULT_READING) -> np.ndarray:
    """Read an image as (H, W, C) uint8; see load_image."""
    return load_image(path, reading).pixels


def load_image(path: Path, reading: ImageReading) -> ImageFile:
    """Read an image as reading.channels says.

    Three channels: gray is repeated, palettes are looked up, CMYK is converted, transparency is blended with white. One
    channel: the same in gray. Others: the bands as stored.

    Raises:
        BadSample: the file is damaged, or its values have no known meaning as colors.
    """
    return retried(partial(decode_image, path, reading), path)


def decode_image(path: Path, reading: ImageReading) -> ImageFile:
    """load_image without further attempts."""
    if reading.channels == 1:
        file = decode_image(path, replace(reading, channels=3))
        return file._replace(pixels=cv2.cvtColor(file.pixels, cv2.COLOR_RGB2GRAY)[..., None])
    if reading.channels != 3:
        values = read_bands(path, reading.orientation == "stored")
        if values.shape[2] != reading.channels:
            raise BadSample(
                f"{path}: has {values.shape[2]} channels, data.custom.channels={reading.channels}; leave it out, or "
                "convert it"
            )
        peak = None
        if values.dtype != np.uint8:
            values, peak = reduce_to_8_bits([values], reading.image_max, path)
        return ImageFile(values, peak, 1)
    with open_image(path) as image:
        raw, orientation, peak = raw_mode(image), orientation_of(image), None
        if image.mode == "F":
            raise BadSample(f"{path}: floating-point values have no fixed range; save it with 8 bits per channel")
        check_bands(image, path)
        if ";16" in raw and not image.mode.startswith("I"):  # Pillow keeps the high byte alone
            image, peak = read_16_bit_colors(image, path, reading)
        # Released: EXIF orientation is ignored. Applied here, as viewers and labeling tools do.
        image = turn(image, orientation, reading)
        if image.mode.startswith("I"):
            gray, peak = reduce_to_8_bits(strips(image), reading.image_max, path)
            if (transparent := image.info.get("transparency")) is not None:  # on white
                gray[np.asarray(image) == transparent] = 255
            return ImageFile(cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB), peak, orientation)
        if image.has_transparency_data:
            image = blend_with_white(image, path)
        pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # a copy costs a tenth of decoding
        return ImageFile(pixels, peak, orientation)


def read_bands(path: Path, as_stored: bool = False) -> np.ndarray:
    """All channels of an image as they are stored, (H, W, C) of integers; an alpha channel is one of them.

    Args:
        as_stored: ignore an orientation tag, instead of an error.
    """
    if not tiff_tags(path):
        with open_image(path) as image:
            raw = raw_mode(image)
            if image.mode in ("CMYK", "P", "YCbCr", "LAB"):
                raise BadSample(f"{path}: its channels are {image.mode}, not the bands of data.custom.channels")
            if orientation_of(image) in TURNS and not as_stored:
                raise BadSample(f"{path}: has an orientation tag; save it upright")
            if ";16" not in raw:
                return np.atleast_3d(np.asarray(image))
            image.load()  # OpenCV returns part of a truncated file
        values = np.atleast_3d(cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED))
        return values[..., [2, 1, 0, 3][: values.shape[2]]] if values.shape[2] >= 3 else values
    try:
        import tifffile
    except ImportError:
        raise UserError(f"{path}: TIFFs of other than three channels need: pip install tifffile imagecodecs") from None
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            if math.prod(page.shape) > max_megapixels() * 10**6 * 4:
                raise BadSample(f"{path}: {page.shape}: too large; cut it into tiles")
            others = file.pages[1:MAX_PAGES]
            turned = page.tags.valueof(ORIENTATION, default=1) != 1 and not as_stored
            if turned or any(not (other.is_reduced or other.is_mask) for other in others):
                raise BadSample(
                    f"{path}: has several pages or an orientation tag; save each page upright in a file of its own"
                )
            if page.photometric in (3, 5, 6, 8):  # palette, CMYK, YCbCr, Lab
                raise BadSample(f"{path}: its channels are {page.photometric.name}, not bands of data.custom.channels")
            if page.dtype is not None and (page.dtype.kind not in "iu" or page.dtype == np.int8):
                raise BadSample(f"{path}: {tiff_layout(path)} have no fixed range; save 8 or 16 bits per channel")
            values = page.asarray()
    except UserError:
        raise
    except Exception as error:  # of as many kinds as there are damaged files
        raise BadSample(f"{path}: a TIFF that cannot be read ({reason_of(error)})") from None
    return np.atleast_3d(values if page.planarconfig == 1 or values.ndim < 3 else values.transpose(1, 2, 0))


def strips(image: Image.Image) -> Iterator[np.ndarray]:
    """Arrays of some rows each, so that converting a large image takes little memory beside it."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))


def reduce_to_8_bits(parts: Iterable[np.ndarray], white: int | None, path: Path) -> tuple[np.ndarray, int]:
    """Integers of more than 8 bits -> uint8, and the largest one.

    Args:
        parts: arrays of rows.
        white: value that becomes 255; None: 65535.
    """
    reduced, peak, least = [], 0, 0
    top = 65535 if white is None else white
    table = np.minimum(np.arange(1 << 16) * 256 // (top + 1), 255).astype(np.uint8)
    for part in parts:
        peak, least = max(peak, int(part.max())), min(least, int(part.min()))
        if part.dtype == np.uint16:
            reduced.append(table[part])
        else:
            reduced.append(np.clip(part.astype(np.int64) * 256 // (top + 1), 0, 255).astype(np.uint8))
    if least < 0 or (peak > 65535 and white is None):
        raise BadSample(
            f"{path}: values {least} to {peak} have no fixed range; save it with 8 or 16 bits per channel, or say "
            "which value is white in data.custom.image_max"
        )
    return np.concatenate(reduced), peak


def read_16_bit_colors(image: Image.Image, path: Path, reading: ImageReading) -> tuple[Image.Image, int]:
    """A color image with 16 bits per channel, reduced to 8, and its largest value. Transparency is kept."""
    image.load()  # OpenCV returns part of a truncated file
    size, image = image.size, None
    values = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.ndim != 3 or values.shape[2] not in (3, 4):
        raise BadSample(
            f"{path}: a {size[0]} x {size[1]} image with 16 bits per channel, stored in a way that cannot "
            "be read; save it as 16-bit RGB PNG"
        )
    parts = np.array_split(values, -(-values.size // STRIP))
    colors, peak = reduce_to_8_bits((part[..., :3] for part in parts), reading.image_max, path)
    colors = cv2.cvtColor(colors, cv2.COLOR_BGR2RGB)
    if values.shape[2] == 4:
        colors = np.dstack([colors, (values[..., 3] >> 8).astype(np.uint8)])
    return Image.fromarray(colors), peak


def blend_with_white(image: Image.Image, path: Path) -> Image.Image:
    """The image on white, as in browsers: transparent pixels may hide erased content.

    Raises:
        BadSample: a tenth of the pixels is neither opaque nor transparent, as in a fourth band of other content.
    """
    image = image.convert("RGBA")
    if image.getextrema()[3][1] == 0:
        raise BadSample(f"{path}: every pixel is transparent; if its colors are right, save it as RGB without alpha")
    between = sum(image.getchannel("A").histogram()[1:255]) / (image.width * image.height)
    if between > 0.1:
        raise BadSample(
            f"{path}: its fourth channel is taken for transparency, but more than a tenth of the pixels is partly "
            "transparent; if it is another band, such as near infrared, set data.custom.channels=4 or save it as RGB"
        )
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
