"""What a data set is (DatasetSpec), how an image or a mask is read, and the data set of evaluation. No paths here."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from allspark.utils.errors import UserError, from_environment, reason_of

IGNORE_INDEX = 255  # of every decoded mask, whatever the files hold

THREADS = 8  # that read files at once
MAX_WORKERS = 8  # processes that a loader gets unasked
MIN_SIDE = 32  # pixels; the smallest image that the models predict
MAX_MEGAPIXELS = 250  # of an image, unless ALLSPARK_MAX_MEGAPIXELS says another number
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # not all of Pillow's: EPS starts a program
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of half the limit
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of metadata; pixels that lack are an error
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # what the machine lacks, not the file


class BadSample(UserError):
    """A file that is no image or mask, is damaged or holds what it may not; another sample may stand in for it."""


def keep(mask: np.ndarray) -> np.ndarray:
    """decode_mask of a data set whose files hold class indices already."""
    return mask


def same_path(path: str) -> str:
    """mask_path of a data set whose lists name its own masks."""
    return path


@dataclass(frozen=True)
class Table:
    """A decode_mask by look-up: values[stored] is the class index. (Not a closure: loader workers may pickle it.)"""

    values: bytes

    @classmethod
    def of(cls, mapping: Mapping[int, int], default: int) -> Table:
        """The table of stored value -> decoded value, `default` for the stored values that it does not mention."""
        return cls(bytes(mapping.get(value, default) for value in range(256)))

    def __call__(self, mask: np.ndarray) -> np.ndarray:
        return np.frombuffer(self.values, np.uint8)[mask]


@dataclass(frozen=True)
class ColorTable:
    """Colours as 0xRRGGBB, rising, and the class index (or IGNORE_INDEX) of each: for masks that are stored as RGB."""

    colors: tuple[int, ...]
    values: bytes

    @classmethod
    def of(cls, mapping: Mapping[tuple[int, int, int], int]) -> ColorTable:
        packed = {red << 16 | green << 8 | blue: value for (red, green, blue), value in mapping.items()}
        return cls(tuple(sorted(packed)), bytes(packed[color] for color in sorted(packed)))

    def decode(self, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """0xRRGGBB (H, W) -> class indices (H, W) uint8, and where there is no such colour (H, W) bool."""
        known = np.array(self.colors)
        places = np.searchsorted(known, packed).clip(max=len(known) - 1)
        return np.frombuffer(self.values, np.uint8)[places], known[places] != packed


@dataclass(frozen=True)
class DatasetSpec:
    """The facts of a data set, each of which stands here alone.

    decode_mask: (H, W) uint8 as stored -> (H, W) uint8 class indices with `ignore_index`; it raises nothing, what it
    leaves outside 0..K-1 and ignore_index is reported by read_mask with the file's name.
    mask_path: a list's mask column -> the file to read. mask_hint: what to do about illegal values, beyond the usual.
    prepare: makes the data set under its root where nothing has to be downloaded.
    submission: (H, W) uint8 class indices with `ignore_index` -> the 8-bit values that the benchmark's server takes;
    None where it takes class indices, or where there is none.
    background: index of the class of all that belongs to no other one; None where there is no such class.
    colors: the masks are read as colours, and decode_mask has no part in it; None: as values.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int = IGNORE_INDEX
    eval_mode: str = "whole"  # whole | center_crop | sliding_window
    decode_mask: Callable[[np.ndarray], np.ndarray] = keep
    prepare: Callable[[Path], None] | None = None
    split_folder: str | None = None  # whose folder of splits/ it shares; None: its own
    mask_path: Callable[[str], str] = same_path
    mask_hint: str = ""
    submission: Callable[[np.ndarray], np.ndarray] | None = None
    background: int | None = None
    colors: ColorTable | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def splits(self) -> str:
        """The name of its folder in splits/."""
        return self.split_folder or self.name


def bit_palette(num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """PASCAL VOC's colours: the bits of the index go to the high bits of red, green and blue in turn."""

    def colour(index: int) -> tuple[int, int, int]:
        channels = [0, 0, 0]
        for bit in range(8):
            channels[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        return channels[0], channels[1], channels[2]

    return tuple(colour(index) for index in range(num_classes))


@dataclass(frozen=True)
class Sample:
    """The files of one image. mask is None for an unlabeled image: training cannot open its label."""

    image: Path
    mask: Path | None = None


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The file, its header read; what goes wrong with it in here, decoding included, is a BadSample that names it."""
    try:
        if not path.is_file() and path.exists():  # a pipe would be waited for
            raise BadSample(f"{path}: is no file; correct the list or data_root")
        with bounded(path) as image:
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise BadSample(f"{path}: no such file; correct the list or data_root") from None
    except Image.DecompressionBombError:
        raise BadSample(
            f"{path}: more than {max_megapixels()} megapixels; cut it into tiles, or allow more with the environment "
            f"variable ALLSPARK_MAX_MEGAPIXELS"
        ) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in EXHAUSTED:
            raise UserError(f"{path}: cannot be read, the machine has too little ({error or 'memory'})") from None
        why = reason_of(error)
        raise BadSample(f"{path}: truncated or not an image ({why}); copy it again or take it off the list") from None


def bounded(file: Path | BinaryIO) -> Image.Image:
    """Image.open for FORMATS alone; more than max_megapixels is Pillow's DecompressionBombError."""
    Image.MAX_IMAGE_PIXELS = max_megapixels() * 10**6 // 2  # Pillow warns above this and refuses above twice this
    return Image.open(file, formats=FORMATS)


def max_megapixels() -> int:
    """The most that an image may have."""
    return from_environment("ALLSPARK_MAX_MEGAPIXELS", MAX_MEGAPIXELS, least=1)


def all_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Every file and folder below a folder, also where links lead to, but not again into one on the way there."""
    here = os.path.realpath(folder)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            yield Path(entry.path)
            if os.path.isdir(entry.path):  # not entry.is_dir(): that fails at a link that leads to itself
                yield from all_below(Path(entry.path), (*above, here))


def image_size(path: Path) -> tuple[int, int]:
    """Width and height as the header has them: before an EXIF orientation."""
    with opened(path) as image:
        return image.size


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an image in one of FORMATS, upright as its EXIF orientation says.

    Grey is repeated, palettes are looked up, CMYK is converted, what is transparent lies on white, 16-bit values keep
    their high byte.
    """
    with opened(path) as image:
        # Released: not applied; viewers and labeling tools show it applied
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F":
            raise BadSample(f"{path}: floating-point values have no fixed range; save it with 8 bits per channel")
        if image.mode.startswith("I"):
            values = np.asarray(image).astype(np.int64)
            if values.max() >= 1 << 16:
                raise BadSample(f"{path}: 32-bit values have no fixed range; save it with 8 or 16 bits per channel")
            grey = values >> 8 if values.max() > 255 else values
            return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
        if image.has_transparency_data:  # below it may be what somebody erased
            image = on_white(image.convert("RGBA"))
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # each copy: a tenth of a decoding


def on_white(image: Image.Image) -> Image.Image:
    """RGBA as browsers show it; where nothing is transparent, every colour as it is."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def stored_mask(path: Path) -> np.ndarray:
    """(H, W) uint8 as the file holds it: a palette image gives its indices."""
    with opened(path) as image:
        if image.mode in ("L", "P", "1"):
            return np.array(image, np.uint8)
        if image.mode.startswith("I"):
            values = np.asarray(image)
    if not image.mode.startswith("I"):
        raise BadSample(
            f"{path}: masks hold class indices 0..K-1 in one channel, found {image.mode}; "
            "name its colours in data.custom.color_map, or convert them to indices once and save 8-bit PNG"
        )
    wrong = (values < 0) | (values > 255)
    if wrong.any():
        raise BadSample(
            f"{path}: {image.mode} mask with values outside 0..255: {counted(values[wrong])}; "
            "renumber the classes 0..K-1 and save 8-bit PNG"
        )
    return values.astype(np.uint8)


def counted(values: np.ndarray) -> str:
    """'7 (3 pixels), 9 (1 pixel)', and of more than eight values how many more."""
    pairs = zip(*np.unique(values, return_counts=True), strict=True)
    found = [f"{value} ({count} pixel{'s' if count > 1 else ''})" for value, count in pairs]
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def read_mask(path: Path, spec: DatasetSpec) -> np.ndarray:
    """(H, W) uint8 class indices 0..K-1 and spec.ignore_index; any other value is a UserError that names it."""
    if spec.colors is not None:
        return colored_mask(path, spec.colors)
    stored = stored_mask(path)
    mask = spec.decode_mask(stored)
    illegal = (mask >= spec.num_classes) & (mask != spec.ignore_index)
    if illegal.any():
        hint = spec.mask_hint or (
            f"Correct the mask (ignored pixels hold {spec.ignore_index}), or describe your own data in data.custom"
        )
        raise BadSample(
            f"{path}: illegal mask values {counted(stored[illegal])}; "
            f"{spec.name} has classes 0..{spec.num_classes - 1}. {hint}"
        )
    return mask


def stored_colors(path: Path) -> np.ndarray:
    """(H, W) int32, 0xRRGGBB of each pixel, whatever mode the file has; alpha is dropped."""
    with opened(path) as image:
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.int32), 2, 0)
    return red << 16 | green << 8 | blue


def color_name(packed: int) -> str:
    """'255,0,0', as data.custom.color_map writes it."""
    return f"{packed >> 16},{packed >> 8 & 255},{packed & 255}"


def colored_mask(path: Path, colors: ColorTable) -> np.ndarray:
    """(H, W) uint8 class indices of a mask that is stored as colours; a colour without a class is a UserError."""
    packed = stored_colors(path)
    mask, unknown = colors.decode(packed)
    if unknown.any():
        found, counts = np.unique(packed[unknown], return_counts=True)
        raise BadSample(
            f"{path}: illegal mask colours {color_name(int(found[0]))} ({counts[0]} pixels)"
            f"{f' and {len(found) - 1} more' if len(found) > 1 else ''}; data.custom.color_map names "
            f"{', '.join(map(color_name, colors.colors))}. Add them there, or save the mask without smooth borders"
        )
    return mask


def read_pair(sample: Sample, spec: DatasetSpec) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) uint8 and mask (H, W) uint8 of a labeled sample; different sizes are a UserError."""
    assert sample.mask is not None, f"{sample.image} is unlabeled"
    image, mask = read_image(sample.image), read_mask(sample.mask, spec)
    check_pair(sample, image, mask)
    return image, mask


def check_pair(sample: Sample, image: np.ndarray, mask: np.ndarray) -> None:
    """UserError unless image and mask have one size."""
    if image.shape[:2] != mask.shape:
        raise differing(sample, image.shape[1::-1], mask.shape[::-1])


def differing(sample: Sample, size: tuple[int, int], mask_size: tuple[int, int]) -> BadSample:
    """What to say of an image and a mask of these widths and heights."""
    remedy = "make the mask again at the image's size, with nearest-neighbour if it has to be resized"
    if image_size(sample.image) == mask_size:
        remedy = (
            "the image is turned by its EXIF orientation and the mask is not: turn the mask, too, and those of images "
            "that are turned by 180 degrees, which their size does not tell"
        )
    of_image, of_mask = (" x ".join(map(str, each)) for each in (size, mask_size))
    return BadSample(
        f"image and mask differ in width x height: {sample.image} is {of_image}, {sample.mask} is {of_mask}; {remedy}"
    )


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) -> (3, H, W), uint8."""
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image, list(planes))  # into them: several times faster than a transposed copy
    return torch.from_numpy(planes)


class SegmentationDataset(Dataset):
    """Whole labeled images for evaluation: image (3, H, W) uint8, mask (H, W) uint8, name (of the file, no suffix)."""

    def __init__(self, samples: Sequence[Sample], spec: DatasetSpec) -> None:
        self.samples = samples
        self.spec = spec

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        sample = self.samples[index]
        image, mask = read_pair(sample, self.spec)
        return to_tensor(image), torch.from_numpy(mask), sample.image.stem


def worker_count(asked: int | None) -> int:
    """num_workers as asked for; None: the cores that this process may use, shared with those that torchrun started
    beside it, at most MAX_WORKERS. (srun gives each process cores of its own.)
    """
    if asked is not None:
        return asked
    return max(1, min(MAX_WORKERS, usable_cores() // from_environment("LOCAL_WORLD_SIZE", 1, least=1)))


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def attempts(tasks: Sequence[Callable]) -> list:
    """The results of tasks, run in threads (decoding releases the interpreter); of one that failed its UserError."""

    def attempt(task: Callable):
        try:
            return task()
        except UserError as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(attempt, tasks))


def at_once(tasks: Sequence[Callable]) -> list:
    """What attempts gives; one UserError for all that failed."""
    results = attempts(tasks)
    if errors := [result for result in results if isinstance(result, UserError)]:
        raise UserError(one_message(errors, len(tasks)))
    return results


def one_message(errors: Sequence[UserError], checked: int) -> str:
    """The first of the errors, and how many there are among the samples checked."""
    more = f" (and {len(errors) - 1} more of {checked} samples checked)" if len(errors) > 1 else ""
    return f"{errors[0]}{more}"
