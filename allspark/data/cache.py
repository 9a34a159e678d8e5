"""Decoded images and masks in memory-mapped files, made once and shared by workers, processes and runs.

Below data.cache lies a folder for the images and one for the masks of a data set: `pixels`, the values of one file
after the other, and index.json: of which files, of what size and time. When one of them changes another folder is made:
who has the old one open goes on with it.
A file that cannot be decoded has no place in it where samples may be skipped; whoever asks for it reads it in vain.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from allspark import distributed
from allspark.data.base import (
    THREADS,
    BadSample,
    DatasetSpec,
    Sample,
    attempts,
    check_pair,
    image_size,
    read_image,
    read_mask,
)
from allspark.utils.errors import UserError

REMEDY = "name a folder on another disk, or data.cache=none"
ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Files:
    """Where training gets its images and masks from: the files themselves, or what the caches hold of them."""

    spec: DatasetSpec
    images: Cache | None = None
    masks: Cache | None = None

    def image(self, path: Path) -> np.ndarray:
        """What read_image gives."""
        return self.images[path] if self.images and path in self.images else read_image(path)

    def pair(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """What read_pair gives."""
        image = self.image(sample.image)
        cached = self.masks and sample.mask in self.masks
        mask = self.masks[sample.mask] if cached else read_mask(sample.mask, self.spec)
        check_pair(sample, image, mask)
        return image, mask


def open_files(
    cache: str, spec: DatasetSpec, images: Iterable[Path], masks: Iterable[Path], skip: bool = False
) -> Files:
    """Files of these images and masks; where data.cache names a folder, through caches there, built where need be.

    Whoever comes first builds, other processes wait. UserError for a file that cannot be read (skip: it is left out),
    a folder that cannot be written, or a disk that is too small.
    """
    if cache == "none":
        return Files(spec)
    root = Path(os.path.expanduser(cache)).absolute()
    name = re.sub(r"\W", "_", spec.name)
    # A mask is stored as it is decoded, so what decides that is part of its identity
    values = spec.decode_mask(np.arange(256, dtype=np.uint8)[None])
    meaning = f"{spec.num_classes} {spec.ignore_index} {values.tobytes().hex()}{spec.colors or ''}"
    return Files(
        spec,
        open_cache(root, f"{name}-images", images, read_image, 3, skip=skip),
        open_cache(root, f"{name}-masks", masks, partial(read_mask, spec=spec), 1, meaning, skip),
    )


class Cache:
    """The decoded files of a folder by path: (H, W, 3) or, with one channel, (H, W) uint8, read-only."""

    def __init__(self, folder: Path, channels: int, places: dict[str, tuple[int, int, int]]) -> None:
        self.folder, self.channels = folder, channels
        self.places = places  # path -> offset, height, width
        self.pixels = np.asarray(np.memmap(folder / "pixels", np.uint8, "r"))

    def __contains__(self, path: Path) -> bool:
        return str(path) in self.places

    def __getitem__(self, path: Path) -> np.ndarray:
        offset, height, width = self.places[str(path)]
        shape = (height, width, 3) if self.channels == 3 else (height, width)
        return self.pixels[offset : offset + height * width * self.channels].reshape(shape)

    def __reduce__(self) -> tuple:
        """A worker that is not forked maps the file itself, instead of being sent its gigabytes."""
        return Cache, (self.folder, self.channels, self.places)


def open_cache(
    root: Path,
    name: str,
    paths: Iterable[Path],
    read: Callable[[Path], np.ndarray],
    channels: int,
    meaning: str = "",
    skip: bool = False,
) -> Cache:
    """The cache below root of what `read` makes of these files; built where it is absent or a file has changed."""
    paths = sorted(set(paths))
    files = [identity(path) for path in paths]
    key = hashlib.sha256(json.dumps([meaning, *files]).encode()).hexdigest()
    folder = root / f"{name}-{key[:12]}"
    with explained(root):
        stored = read_index(folder, files, channels)  # without the lock: what is whole is there for who may only read
        if stored is None:
            root.mkdir(parents=True, exist_ok=True)
            with locked(root / f"{folder.name}.lock"):
                stored = read_index(folder, files, channels)  # of whom this one waited for
                if stored is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    stored = build(folder, paths, files, read, channels, skip)
        offsets = np.cumsum([0] + [height * width * channels for height, width in stored.shapes]).tolist()
        places = {str(path): (offset, *shape) for path, offset, shape in zip(paths, offsets, stored.shapes)}
        for number in stored.bad:
            del places[str(paths[number])]
        return Cache(folder, channels, places)


@dataclass(frozen=True)
class Stored:
    """(height, width) of each file, and the numbers of those that could not be decoded: their place is empty."""

    shapes: list[tuple[int, int]]
    bad: list[int]


def identity(path: Path) -> list:
    """[path, bytes, time of change]: as long as it is the same, so is the content."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct the list or data_root") from None
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]


@contextlib.contextmanager
def explained(root: Path) -> Iterator[None]:
    """What the system refuses below root, as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"data.cache={root}: cannot be used ({error.strerror or error}); {REMEDY}") from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else is in here. The lock goes with the process that holds it, however that ends; its file stays."""
    lock = FileLock(path, mode=0o666)  # whoever may write to the folder may take it
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if distributed.is_main():
            print(f"{path.with_suffix('')}: waiting for the process that makes it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def read_index(folder: Path, files: list[list], channels: int) -> Stored | None:
    """What the cache holds; None unless it is whole and of just these files."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        shapes = [(int(height), int(width)) for height, width in index["shapes"]]
        bad = [range(len(shapes))[number] for number in index.get("bad", [])]
        size = (folder / "pixels").stat().st_size
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    whole = len(shapes) == len(files) and size == sum(height * width * channels for height, width in shapes)
    return Stored(shapes, bad) if whole and index.get("files") == files else None


def build(
    folder: Path,
    paths: Sequence[Path],
    files: list[list],
    read: Callable[[Path], np.ndarray],
    channels: int,
    skip: bool,
) -> Stored:
    """Decode the files into `folder`, all of them or, where one fails and may not, none."""
    sizes = attempts([partial(image_size, path) for path in paths])
    if not skip and (errors := [size for size in sizes if isinstance(size, UserError)]):
        raise errors[0]
    shapes = [(0, 0) if isinstance(size, UserError) else size[::-1] for size in sizes]
    needed = sum(height * width for height, width in shapes) * channels
    check_space(folder.parent, len(paths), needed)
    print(f"{folder}: decoding {len(paths)} files once, {needed:,} bytes")
    partial_folder = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)  # of a process that was killed
    try:
        partial_folder.mkdir()
        with (partial_folder / "pixels").open("wb") as pixels:
            os.truncate(pixels.fileno(), needed)  # also where the last files leave their places empty
            stored = decode_all(pixels.fileno(), paths, shapes, read, channels, skip)
            os.fsync(pixels.fileno())
        index = json.dumps({"files": files, "shapes": stored.shapes, "bad": stored.bad})
        (partial_folder / "index.json").write_text(index, encoding="utf-8")
        partial_folder.rename(folder)
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise
    return stored


def check_space(root: Path, count: int, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(f"data.cache={root}: {count} decoded files take {needed:,} bytes, {free:,} are free; {REMEDY}")


def write_at(file: int, rest: memoryview, offset: int) -> None:
    while rest:
        if hasattr(os, "pwrite"):
            written = os.pwrite(file, rest, offset)
        else:  # Windows has one position for all threads
            with ONE_AT_A_TIME:
                os.lseek(file, offset, os.SEEK_SET)
                written = os.write(file, rest)
        rest, offset = rest[written:], offset + written


def decode_all(
    file: int,
    paths: Sequence[Path],
    shapes: list[tuple[int, int]],
    read: Callable[[Path], np.ndarray],
    channels: int,
    skip: bool,
) -> Stored:
    """Write each decoded file to its place, several at once; the first that fails ends it, unless it is skipped."""

    def decode(path: Path, shape: tuple[int, int], offset: int) -> tuple[int, int] | None:
        try:
            array = read(path)
        except BadSample:
            if skip:
                return None
            raise
        if array.size != shape[0] * shape[1] * channels:
            raise UserError(f"{path}: changed while it was read; start again when nobody writes to it")
        write_at(file, memoryview(np.ascontiguousarray(array)).cast("B"), offset)
        return array.shape[:2]

    offsets = np.cumsum([0, *(height * width for height, width in shapes[:-1])]) * channels
    with ThreadPoolExecutor(THREADS) as pool:
        tasks = [pool.submit(decode, *each) for each in zip(paths, shapes, offsets.tolist(), strict=True)]
        try:
            hidden = None if distributed.is_main() else True  # None: hidden where stderr is no terminal
            for task in tqdm(as_completed(tasks), "decode", len(tasks), leave=False, unit="file", disable=hidden):
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found = [task.result() for task in tasks]
    bad = [number for number, shape in enumerate(found) if shape is None]
    return Stored([shape or was for shape, was in zip(found, shapes, strict=True)], bad)
