"""Reading images and masks from files of unknown origin: formats, size limits, errors that name the file."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from allspark.data.spec import ColorTable, DatasetSpec, Sample
from allspark.utils.errors import UserError, int_from_env, reason_of

MIN_SIDE = 32  # pixels; the smallest image the models accept
MAX_MEGAPIXELS = 250  # per image, unless ALLSPARK_MAX_MEGAPIXELS is set
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # not all of Pillow's: EPS runs a program
RESOURCE_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # the machine's fault, not the file's
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # raised at half the limit
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # about metadata; missing pixels are an error


class BadSample(UserError):
    """A file that is missing, damaged, not an image or not a valid mask; training may use another sample instead."""


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image and read its header; errors inside the block, also while decoding, become a BadSample."""
    try:
        if not path.is_file() and path.exists():  # opening a pipe would block
            raise BadSample(f"{path}: not a regular file; correct the list or data_root")
        with open_limited(path) as image:
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise BadSample(f"{path}: no such file; correct the list or data_root") from None
    except Image.DecompressionBombError:
        raise BadSample(
            f"{path}: more than {max_megapixels()} megapixels; cut it into tiles, or raise the limit with the "
            f"environment variable ALLSPARK_MAX_MEGAPIXELS"
        ) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in RESOURCE_ERRNOS:
            raise UserError(f"{path}: cannot be read, the machine is out of resources ({reason_of(error)})") from None
        raise BadSample(
            f"{path}: truncated or not an image ({reason_of(error)}); copy it again or remove it from the list"
        ) from None


def open_limited(file: Path | BinaryIO) -> Image.Image:
    """Image.open restricted to FORMATS; raises Pillow's DecompressionBombError above max_megapixels."""
    Image.MAX_IMAGE_PIXELS = max_megapixels() * 10**6 // 2  # Pillow warns above this and raises above twice this
    return Image.open(file, formats=FORMATS)


def max_megapixels() -> int:
    """Largest allowed image."""
    return int_from_env("ALLSPARK_MAX_MEGAPIXELS", MAX_MEGAPIXELS, least=1)


def walk(folder: Path, parents: tuple[str, ...] = ()) -> Iterator[Path]:
    """All files and folders below a folder. Follows links, except those that lead back to a parent."""
    real = os.path.realpath(folder)
    if real in parents:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            yield Path(entry.path)
            if os.path.isdir(entry.path):  # entry.is_dir() raises for a link to itself
                yield from walk(Path(entry.path), (*parents, real))


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) in the file's header, before EXIF orientation is applied."""
    with open_image(path) as image:
        return image.size


def read_image(path: Path) -> np.ndarray:
    """Read an image as (H, W, 3) uint8 RGB with its EXIF orientation applied.

    Gray is repeated, palettes are looked up, CMYK is converted, transparency is blended with white, and 16-bit values
    are reduced to their high byte.
    """
    with open_image(path) as image:
        # Released: EXIF orientation is ignored. Applied here, as viewers and labeling tools do.
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F":
            raise BadSample(f"{path}: floating-point values have no fixed range; save it with 8 bits per channel")
        if image.mode.startswith("I"):
            values = np.asarray(image).astype(np.int64)
            if values.max() >= 1 << 16:
                raise BadSample(f"{path}: 32-bit values have no fixed range; save it with 8 or 16 bits per channel")
            gray = values >> 8 if values.max() > 255 else values
            return np.repeat(np.clip(gray, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
        if image.has_transparency_data:  # transparent pixels may hide erased content; browsers show them on white
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # a copy costs a tenth of decoding


def stored_values(image: Image.Image, path: Path) -> np.ndarray:
    """Mask values (H, W) uint8 as stored; a palette image gives its indices."""
    if image.mode in ("L", "P", "1"):
        return np.array(image, np.uint8)
    if not image.mode.startswith("I"):
        raise BadSample(
            f"{path}: masks must hold class indices 0..K-1 in one channel, found {image.mode}; "
            "list its colors in data.custom.color_map, or convert the masks to indices and save 8-bit PNG"
        )
    values = np.asarray(image)
    wrong = (values < 0) | (values > 255)
    if wrong.any():
        raise BadSample(
            f"{path}: {image.mode} mask with values outside 0..255: {format_counts(values[wrong])}; "
            "renumber the classes 0..K-1 and save 8-bit PNG"
        )
    return values.astype(np.uint8)


def packed_colors(image: Image.Image) -> np.ndarray:
    """Color of each pixel as 0xRRGGBB, (H, W) int32, for images of any mode; alpha is dropped."""
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.int32), 2, 0)
    return red << 16 | green << 8 | blue


def format_counts(values: np.ndarray) -> str:
    """'7 (3 pixels), 9 (1 pixel)'; at most eight values, then the number of further ones."""
    pairs = zip(*np.unique(values, return_counts=True), strict=True)
    items = [f"{value} ({count} pixel{'s' if count > 1 else ''})" for value, count in pairs]
    return ", ".join(items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "")


def format_color(packed: int) -> str:
    """0xRRGGBB -> '255,0,0', as written in data.custom.color_map."""
    return f"{packed >> 16},{packed >> 8 & 255},{packed & 255}"


def read_mask(path: Path, spec: DatasetSpec) -> np.ndarray:
    """(H, W) uint8 class indices 0..K-1 and spec.ignore_index; raises BadSample for any other value."""
    with open_image(path) as image:
        if spec.colors is not None:
            return decode_colors(packed_colors(image), spec.colors, path)
        stored = stored_values(image, path)
    mask = spec.decode_mask(stored)
    illegal = (mask >= spec.num_classes) & (mask != spec.ignore_index)
    if illegal.any():
        hint = spec.mask_hint or (
            f"Correct the mask (ignored pixels hold {spec.ignore_index}), or describe your own data in data.custom"
        )
        raise BadSample(
            f"{path}: illegal mask values {format_counts(stored[illegal])}; "
            f"{spec.name} has classes 0..{spec.num_classes - 1}. {hint}"
        )
    return mask


def decode_colors(packed: np.ndarray, colors: ColorTable, path: Path) -> np.ndarray:
    """Colors 0xRRGGBB (H, W) -> class indices (H, W) uint8; raises BadSample for a color without a class."""
    mask, unknown = colors.decode(packed)
    if unknown.any():
        values, counts = np.unique(packed[unknown], return_counts=True)
        raise BadSample(
            f"{path}: illegal mask colors {format_color(int(values[0]))} ({counts[0]} pixels)"
            f"{f' and {len(values) - 1} more' if len(values) > 1 else ''}; data.custom.color_map lists "
            f"{', '.join(map(format_color, colors.colors))}. Add them there, or save the mask without smoothed borders"
        )
    return mask


def read_pair(sample: Sample, spec: DatasetSpec) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) uint8 and mask (H, W) uint8 of a labeled sample; raises BadSample if their sizes differ."""
    assert sample.mask is not None, f"{sample.image} is unlabeled"
    image, mask = read_image(sample.image), read_mask(sample.mask, spec)
    check_same_size(sample, image, mask)
    return image, mask


def check_same_size(sample: Sample, image: np.ndarray, mask: np.ndarray) -> None:
    if image.shape[:2] != mask.shape:
        raise size_mismatch(sample, image.shape[1::-1], mask.shape[::-1])


def size_mismatch(sample: Sample, size: tuple[int, int], mask_size: tuple[int, int]) -> BadSample:
    """The error for an image and a mask of different (width, height)."""
    remedy = "create the mask again at the image's size; resize masks with nearest-neighbor only"
    if read_size(sample.image) == mask_size:
        remedy = (
            "the image is rotated by its EXIF orientation and the mask is not: rotate the mask as well, and those of "
            "images rotated by 180 degrees, which cannot be detected by their size"
        )
    return BadSample(
        f"image and mask differ in width x height: {sample.image} is {size[0]} x {size[1]}, "
        f"{sample.mask} is {mask_size[0]} x {mask_size[1]}; {remedy}"
    )
