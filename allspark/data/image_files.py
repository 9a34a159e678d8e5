"""Image files of unknown origin: opening them, size limits, what a header says, errors that name the file.

Pillow takes some layouts for others, or for damaged files. They are recognized here by what the file says, before its
pixels are decoded.
"""

from __future__ import annotations

import errno
import mmap
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from allspark.utils.errors import UserError, int_from_env, reason_of
from allspark.utils.retry import TRANSIENT, retry_transient

MAX_MEGAPIXELS = 250  # per image, unless ALLSPARK_MAX_MEGAPIXELS is set
MAX_PAGES = 16  # of a TIFF: the image and smaller copies of it
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # not all of Pillow's: EPS runs a program
UNSUPPORTED = (".heic", ".heif", ".avif", ".dng", ".cr2", ".nef", ".arw")  # photos that have to be converted
RESOURCE_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # the machine's fault, not the file's
# Tags of TIFF and EXIF
SUBFILE, WIDTH, HEIGHT, BITS, INTERPRETATION = 254, 256, 257, 258, 262
ORIENTATION, SAMPLES, PLANAR, COLOR_MAP, EXTRA_SAMPLES, SAMPLE_FORMAT = 274, 277, 284, 320, 338, 339
TURNS = {  # EXIF orientation -> how the image is turned for display
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
T = TypeVar("T")
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # raised at half the limit
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # about metadata; missing pixels are an error


class BadSample(UserError):
    """A file that is missing, damaged, not an image or not a valid mask; training may use another sample instead."""


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
        if path.suffix.lower() in UNSUPPORTED:
            raise BadSample(f"{path}: {path.suffix} files are not supported; convert them to JPEG or PNG") from None
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


def retried(read: Callable[[], T], path: Path) -> T:
    """read(), repeated while the storage fails for a reason that may pass; then a BadSample."""
    try:
        return retry_transient(read)
    except OSError as error:
        raise BadSample(f"{path}: cannot be read ({error.strerror}), even after retries") from None


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
        if len(tags.get(BITS, ())) not in (0, 1, 3):  # Pillow reads few of these; so does read_bands
            return int(tags[WIDTH]), int(tags[HEIGHT])
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


def orientation_of(image: Image.Image) -> int:
    """Its EXIF orientation; 1 if there is none, or none that can be read."""
    if image.format == "PNG":
        image.load()  # getexif() reads past them; damaged pixels must not pass for a damaged EXIF block
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # SyntaxError, struct.error, ... of a damaged block, which viewers ignore
        return 1


def raw_mode(image: Image.Image) -> str:
    """How the file stores its pixels, in Pillow's terms, such as L;4 for 4-bit gray. Only before they are loaded."""
    args = image.tile[0][3] if image.tile else ""  # by its index: a plain tuple before Pillow 11
    return args if isinstance(args, str) else str(args[0])


def check_pages(image: Image.Image, path: Path) -> None:
    """Raise BadSample for a second page or frame. Smaller copies and masks inside a TIFF are none."""
    if image.format == "TIFF":
        several = any(not tags.get(SUBFILE, 0) for tags in tiff_directories(path, MAX_PAGES)[1:])
    else:
        several = getattr(image, "is_animated", False) and image.format != "MPO"  # a photo with a preview
    if several:
        raise BadSample(f"{path}: has several pages or frames; save each one as a file of its own")


def check_depth(image: Image.Image, path: Path) -> None:
    """Raise BadSample for bit depths that Pillow misreads; call before the pixels are loaded."""
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
            f"{path}: a TIFF with 16 bits per channel, stored channel by channel or with an orientation tag; save it "
            "upright, pixel by pixel (INTERLEAVE=PIXEL), or as 16-bit PNG"
        )
    elif image.format == "TIFF" and image.mode == "P" and 0 < max(image.tag_v2.get(COLOR_MAP, (0,))) < 256:
        raise BadSample(f"{path}: a TIFF whose palette has 8 bits instead of 16, so all is black; save it as PNG")


def check_bands(image: Image.Image, path: Path) -> None:
    """Raise BadSample for a TIFF with more bands than colors, unless it says that the fourth one is transparency.

    Also for 16-bit gray in which 0 is white, which Pillow does not invert.
    """
    if image.format != "TIFF":
        return
    photometric, bands = image.tag_v2.get(INTERPRETATION), image.tag_v2.get(SAMPLES, 1)
    extra = bands - {0: 1, 1: 1, 2: 3}.get(photometric, bands)
    if extra and image.tag_v2.get(EXTRA_SAMPLES) not in ((1,), (2,)):
        raise BadSample(
            f"{path}: {bands} bands, of which {extra} are neither color nor transparency; save it as RGB, or set "
            f"data.custom.channels={bands}"
        )
    if photometric == 0 and image.mode.startswith("I"):
        raise BadSample(f"{path}: a TIFF in which 0 is white (MinIsWhite) with 16 bits; save it with 0 as black")


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
        bands, (bits, *_), (kind, *_) = tags.get(SAMPLES, 1), tags.get(BITS, (1,)), tags.get(SAMPLE_FORMAT, (1,))
        known = bands in (1, 3) and bits in (1, 2, 4, 8, 16) and kind == 1
    except (TypeError, ValueError):
        return ""
    kinds = {1: "unsigned integers", 2: "signed integers", 3: "floating-point values"}
    return "" if known or not tags else f"{bands} band(s) of {bits}-bit {kinds.get(kind, 'values')}"
