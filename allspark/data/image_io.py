"""Reading images from files of unknown origin: formats, size limits, errors that name the file.

load_image, and load_mask in mask_io, are the only places where pixels are read. They take a value for what the file
says it is (palette, bits, orientation, transparency), and raise BadSample where a file does not say it.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from allspark.data.spec import DEFAULT_READING, ImageReading
from allspark.utils.errors import UserError, int_from_env, reason_of
from allspark.utils.retry import TRANSIENT, retry_transient

MIN_SIDE = 32  # pixels; the smallest image the models accept
MAX_MEGAPIXELS = 250  # per image, unless ALLSPARK_MAX_MEGAPIXELS is set
MAX_PAGES = 16  # of a TIFF: the image and smaller copies of it
STRIP = 1 << 24  # pixels converted at a time
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # not all of Pillow's: EPS runs a program
RESOURCE_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # the machine's fault, not the file's
ORIENTATION, SUBFILE, PHOTOMETRIC, BITS, PLANAR = 274, 254, 262, 258, 284  # tags of EXIF and TIFF
TURNS = {  # EXIF orientation -> how the image is turned for display
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED_BACK = {6: 8, 8: 6}  # orientation -> the one that undoes it; the others undo themselves
T = TypeVar("T")
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # raised at half the limit
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # about metadata; missing pixels are an error


class BadSample(UserError):
    """A file that is missing, damaged, not an image or not a valid mask; training may use another sample instead."""


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


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image of one page and read its header; errors inside the block, also while decoding, become a BadSample.

    Only an OSError that may pass is raised as it is, for retry_transient.
    """
    try:
        if not path.is_file() and path.exists():  # opening a pipe would block
            raise BadSample(f"{path}: not a regular file; correct the list or data_root")
        with path.open("rb") as file, open_limited(file) as image:
            check_pages(image, path)
            check_depth(image, path)
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
        code = getattr(error, "errno", None)
        if code in TRANSIENT:
            raise
        if isinstance(error, MemoryError) or code in RESOURCE_ERRNOS:
            raise UserError(f"{path}: cannot be read, the machine is out of resources ({reason_of(error)})") from None
        if code is not None:
            raise BadSample(f"{path}: cannot be read ({error.strerror}); fix that or remove it from the list") from None
        if layout := tiff_layout(path):
            raise BadSample(
                f"{path}: a TIFF of {layout}, which cannot be read; save images as RGB with 8 or 16 bits per channel, "
                "masks as 8-bit PNG"
            ) from None
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else reason_of(error)
        raise BadSample(
            f"{path}: truncated or not an image ({reason}); copy it again or remove it from the list"
        ) from None


def open_limited(file: Path | BinaryIO) -> Image.Image:
    """Image.open restricted to FORMATS; raises Pillow's DecompressionBombError above max_megapixels."""
    Image.MAX_IMAGE_PIXELS = max_megapixels() * 10**6 // 2  # Pillow warns above this and raises above twice this
    return Image.open(file, formats=FORMATS)


def max_megapixels() -> int:
    """Largest allowed image."""
    return int_from_env("ALLSPARK_MAX_MEGAPIXELS", MAX_MEGAPIXELS, least=1)


def check_pages(image: Image.Image, path: Path) -> None:
    """Raise BadSample for a second page or frame. Smaller copies and masks inside a TIFF are none."""
    if image.format == "TIFF":
        several = any(not tags.get(SUBFILE, 0) for tags in tiff_directories(path, MAX_PAGES)[1:])
    else:
        several = getattr(image, "is_animated", False) and image.format != "MPO"  # a photo with a preview
    if several:
        raise BadSample(f"{path}: has several pages or frames; save each one as a file of its own")


def check_depth(image: Image.Image, path: Path) -> None:
    """Raise BadSample for layouts with other than 8 bits that Pillow takes for something else; before it is loaded."""
    colors = image.mode in ("RGB", "RGBA")
    if image.format == "BMP" and image.mode in ("1", "L"):  # decides by the palette's colors, not by the bits
        bits = bmp_bits(path)
        if bits != {"1": 1, "L": 8}[image.mode]:
            raise BadSample(f"{path}: a BMP with {bits} bits per pixel and a palette of grays; save it as PNG")
    elif image.format == "JPEG2000":
        bits = jpeg2000_bits(path)
        if bits > 8 and (colors or bits != 16):
            raise BadSample(f"{path}: a JPEG 2000 with {bits} bits per channel; save it as 16-bit PNG")
    elif image.format == "PPM" and image.mode != "1" and image.tile[0][0].startswith("ppm"):
        most = image.tile[0][3][1]
        if most > 255 and (colors or most != 65535):
            raise BadSample(f"{path}: a PPM whose white is {most}; save it as 16-bit PNG")
    elif (
        image.format == "TIFF"
        and colors
        and max(image.tag_v2.get(BITS, (8,))) > 8
        and (image.tag_v2.get(PLANAR, 1) != 1 or image.tag_v2.get(ORIENTATION, 1) in TURNS)
    ):
        raise BadSample(
            f"{path}: a TIFF with 16 bits per channel, stored channel by channel or with a tag that turns it; save it "
            "upright, pixel by pixel (INTERLEAVE=PIXEL), or as 16-bit PNG"
        )


def bmp_bits(path: Path) -> int:
    """Bits per pixel of a BMP."""
    with path.open("rb") as file:
        header = file.read(30)
    return int.from_bytes(header[24:26] if header[14] == 12 else header[28:30], "little")  # 12: OS/2's short header


def jpeg2000_bits(path: Path) -> int:
    """Largest number of bits per channel of a JPEG 2000, from the SIZ segment of its codestream."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:  # of any size
        start = content.find(b"\xff\x4f\xff\x51")  # any boxes may come first
        channels = int.from_bytes(content[start + 40 : start + 42], "big")
        depths = content[start + 42 : start + 42 + 3 * channels : 3]
    return max((depth & 0x7F) + 1 for depth in depths) if start >= 0 and depths else 8


def tiff_tags(path: Path) -> Mapping[int, Any]:
    """The tags of a TIFF whose header can be read, even if Pillow cannot decode it; empty for other files."""
    return next(iter(tiff_directories(path, 1)), {})


def tiff_directories(path: Path, most: int) -> list[Mapping[int, Any]]:
    """The tags of the first pages of a TIFF, at most `most`; empty for other files, and as far as they can be read."""
    found: list[Mapping[int, Any]] = []
    try:
        with path.open("rb") as file:
            header = file.read(8)
            if header[:4] not in TiffImagePlugin.PREFIXES:
                return []
            tags = TiffImagePlugin.ImageFileDirectory_v2(header + (file.read(8) if header[2] == 43 else b""))
            while tags.next and len(found) < most:
                file.seek(tags.next)
                tags.load(file)
                found.append(dict(tags))
    except Exception:  # as many kinds as Pillow's decoders raise
        pass
    return found


def tiff_layout(path: Path) -> str:
    """'5 bands of 8-bit integers' for a TIFF that Pillow does not support; '' for other files."""
    tags = tiff_tags(path)
    try:
        bands, (bits, *_), (kind, *_) = tags.get(277, 1), tags.get(258, (1,)), tags.get(339, (1,))
        known = bands in (1, 3) and bits in (1, 2, 4, 8, 16) and kind == 1
    except (TypeError, ValueError):
        return ""
    kinds = {1: "unsigned integers", 2: "signed integers", 3: "floating-point values"}
    return "" if known or not tags else f"{bands} band(s) of {bits}-bit {kinds.get(kind, 'values')}"


def raw_mode(image: Image.Image) -> str:
    """How the file stores its pixels, in Pillow's terms, such as L;4 for 4-bit gray. Only before they are loaded."""
    args = image.tile[0][3] if image.tile else ""  # by its index: a plain tuple before Pillow 11
    return args if isinstance(args, str) else str(args[0])


def orientation_of(image: Image.Image) -> int:
    """Its EXIF orientation; 1 if there is none, or none that can be read."""
    if image.format == "PNG":
        image.load()  # as getexif does, which looks behind the pixels; damaged ones are no damaged EXIF block
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # SyntaxError, struct.error, ... of a damaged block, which viewers ignore
        return 1


def turn(image: Image.Image, orientation: int, reading: ImageReading) -> Image.Image:
    """Turn a decoded image of Pillow's as `reading` says. Pillow itself has turned TIFFs for display."""
    shown, stored = image.format == "TIFF", reading.orientation == "stored"
    if orientation not in TURNS or shown != stored:
        return image
    return image.transpose(TURNS[TURNED_BACK.get(orientation, orientation) if stored else orientation])


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
    """(width, height) in the file's header, before EXIF orientation is applied (in a TIFF: after)."""

    def read() -> tuple[int, int]:
        tags = tiff_tags(path) if path.suffix.lower() in (".tif", ".tiff") else {}
        if len(tags.get(258, ())) not in (0, 1, 3):  # Pillow reads few of these; so does read_bands
            return int(tags[256]), int(tags[257])
        with open_image(path) as image:
            return image.size

    return retried(read, path)


def read_shown_size(path: Path) -> tuple[int, int]:
    """(width, height) of a photo as viewers show it, turned by its EXIF orientation."""
    width, height = read_size(path)
    if tiff_tags(path):
        return width, height

    def is_turned() -> bool:
        with open_image(path) as image:
            return orientation_of(image) in (5, 6, 7, 8)

    return (height, width) if retried(is_turned, path) else (width, height)


def retried(read: Callable[[], T], path: Path) -> T:
    """read(), repeated while the storage fails for a reason that may pass; then a BadSample."""
    try:
        return retry_transient(read)
    except OSError as error:
        raise BadSample(f"{path}: cannot be read ({error.strerror}), also not when tried again") from None


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
            raise BadSample(f"{path}: has {values.shape[2]} channels, data.custom.channels={reading.channels}")
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
        as_stored: ignore a tag that turns the image, instead of an error.
    """
    if not tiff_tags(path):
        with open_image(path) as image:
            raw = raw_mode(image)
            if image.mode in ("CMYK", "P", "YCbCr", "LAB"):
                raise BadSample(f"{path}: its channels are {image.mode}, not the bands of data.custom.channels")
            if orientation_of(image) in TURNS and not as_stored:
                raise BadSample(f"{path}: has a tag that turns it; save it upright")
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
                    f"{path}: has several pages or a tag that turns it; save each page upright in a file of its own"
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


def check_bands(image: Image.Image, path: Path) -> None:
    """Raise BadSample for a TIFF with more bands than colors, unless it says that the fourth one is transparency.

    Also for 16-bit gray in which 0 is white, which Pillow does not invert.
    """
    if image.format != "TIFF":
        return
    photometric, bands = image.tag_v2.get(PHOTOMETRIC), image.tag_v2.get(277, 1)
    extra = bands - {0: 1, 1: 1, 2: 3}.get(photometric, bands)
    if extra and image.tag_v2.get(338) not in ((1,), (2,)):
        raise BadSample(
            f"{path}: {bands} bands, of which {extra} are neither color nor transparency; save it as RGB, or set "
            f"data.custom.channels={bands}"
        )
    if photometric == 0 and image.mode.startswith("I"):
        raise BadSample(f"{path}: a TIFF in which 0 is white (MinIsWhite) with 16 bits; save it with 0 as black")


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
