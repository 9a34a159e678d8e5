"""Lines of list files and images of folders, as samples that name where they come from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from allspark import distributed
from allspark.data.image_files import walk
from allspark.data.spec import Sample, identity
from allspark.utils.errors import UserError, abbreviate

MAX_LIST = 256 << 20  # bytes; the longest published list has 6 MB
MASK_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff")  # lossless formats; the first is the default
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jp2"}
IMAGE_SUFFIXES |= {".ppm", ".pgm"}


@dataclass(frozen=True)
class Entry:
    """A sample, and the list file and line or the folder that it comes from."""

    sample: Sample
    source: str


def read_list(path: Path, data_root: Path, mask_path: Callable[[str], str] = identity) -> list[Sample]:
    """The samples of a list file with lines `image mask` or `image`, relative to data_root; blank lines are skipped."""
    return [entry.sample for entry in read_entries(path, data_root, mask_path)]


def read_entries(path: Path, data_root: Path, mask_path: Callable[[str], str] = identity) -> list[Entry]:
    data_root = Path(data_root)
    return [
        Entry(Sample(data_root / line.image, data_root / mask_path(line.mask) if line.mask else None), line.source)
        for line in read_lines(path)
    ]


def drop_repeats(entries: Sequence[Entry]) -> list[Entry]:
    """Drop entries that repeat an image, and print how many; UserError if an image has two masks."""
    first: dict[Path, Entry] = {}
    for entry in entries:
        other = first.setdefault(entry.sample.image, entry)
        if other.sample != entry.sample:
            raise UserError(f"{entry.source}: {entry.sample.image} has another mask in {other.source}; remove one")
    if len(first) < len(entries) and distributed.is_main():
        print(f"{len(entries) - len(first)} repeated images are dropped")
    return list(first.values())


@dataclass(frozen=True)
class Line:
    """A line of a list file, as written."""

    image: str
    mask: str | None
    source: str


def read_lines(path: Path) -> list[Line]:
    """The lines of a list file that are not blank."""
    result = []
    try:
        if (size := Path(path).stat().st_size) > MAX_LIST:
            raise UserError(f"{path}: not a list file, it has {size} bytes; use a file with `image mask` lines")
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # text mode converts \r\n
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); use a file with `image mask` lines") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a list file, it is not UTF-8 text; use a file with `image mask` lines") from None
    for number, line in enumerate(lines, start=1):
        columns = split_columns(line)
        if len(columns) > 2:
            raise UserError(
                f"{path} line {number}: {len(columns)} columns, expected `image mask` or `image`; "
                "if a name contains a blank, put a tab between image and mask, or after an image without mask"
            )
        if columns:
            result.append(Line(columns[0], columns[1] if len(columns) == 2 else None, f"{path} line {number}"))
    return result


def split_columns(line: str) -> list[str]:
    """Split at tabs if there are any (names may then contain blanks), else at blanks."""
    parts = line.split("\t") if "\t" in line else line.split()
    return [part.strip() for part in parts if part.strip()]


def image_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files below a folder, sorted: images by their suffix, and all others; hidden ones are in neither."""
    images, others = [], []
    for path in sorted(walk(folder)):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                images.append(path)
            elif not path.is_dir():
                others.append(path)
    return images, others


def mask_tail(mask_suffix: str) -> str:
    """_mask of _mask.png: what a mask's name has beyond that of its image, without the format."""
    return mask_suffix.rpartition(".")[0] if "." in mask_suffix else mask_suffix


def check_name(path: Path) -> Path:
    """The path; UserError if it is not UTF-8, because no list, log or checkpoint could hold it."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{path}: the name is not UTF-8; rename it") from None
    return path


def make_exists_check() -> Callable[[Path], bool]:
    """A function like Path.exists that lists each folder once, which is faster than checking every file."""
    folders: dict[Path, set[str]] = {}

    def exists(path: Path) -> bool:
        if path.parent not in folders:
            try:
                folders[path.parent] = set(os.listdir(path.parent))
            except (OSError, ValueError):  # missing, not a folder, not readable, or not a valid path
                folders[path.parent] = set()
        return path.name in folders[path.parent]

    return exists


def below(root: Path, name: str) -> Path:
    """A folder of data.custom: relative to the data root, absolute, or below ~."""
    return root / os.path.expanduser(name)


def folder_entries(
    data_root: Path, images: str | Sequence[str], masks: str | None, mask_suffix: str = MASK_SUFFIXES[0]
) -> list[Entry]:
    """All images below a folder or several, sorted in each.

    A mask has the same relative path below `masks`, with `mask_suffix` or another lossless format. If images and masks
    are in one folder, files that are masks are no images; also not if `masks` is None, for unlabeled images.
    """
    if not isinstance(images, str):
        return drop_repeats([entry for one in images for entry in folder_entries(data_root, one, masks, mask_suffix)])
    folder = below(data_root, images)
    if not folder.is_dir():
        there: list[str] = []
        with contextlib.suppress(OSError), os.scandir(folder.parent) as entries:
            there = sorted(each.name for each in entries if each.is_dir() and not each.name.startswith("."))
        found = f" ({folder.parent} has {abbreviate(there)})" if there else ""
        raise UserError(f"{folder}: no such folder{found}; correct data.custom or data_root")
    paths, _ = image_files(folder)
    if not paths:
        raise UserError(
            f"{folder}: contains no images ({', '.join(sorted(IMAGE_SUFFIXES))}); correct data.custom or data_root"
        )

    exists, mask_folder = make_exists_check(), folder if masks is None else below(data_root, masks)
    lossless = {path.with_suffix("") for path in paths if path.suffix.lower() in MASK_SUFFIXES}

    def mask_of(image: Path) -> Path | None:
        place, stem = mask_folder / image.relative_to(folder).parent, image.stem + mask_tail(mask_suffix)
        if masks is None and place / stem not in lossless:  # as nearly always: checking all options takes long
            return None
        usual = place / (image.stem + mask_suffix)
        options = (place / (stem + suffix) for each in MASK_SUFFIXES for suffix in (each, each.upper()))
        return next(filter(exists, (usual, *options)), usual)

    pairs = [(check_name(image), mask_of(image)) for image in paths]
    masks_here = {mask for image, mask in pairs if masks is not None or mask != image}
    samples = [Sample(image, None if masks is None else mask) for image, mask in pairs]
    entries = [Entry(sample, f"{folder}") for sample in samples if sample.image not in masks_here]
    if not entries:
        raise UserError(
            f"{folder}: holds images and masks, but {paths[0]} is both; save masks as PNG under the names of their "
            "images, and images in another format or folder"
        )
    return entries
