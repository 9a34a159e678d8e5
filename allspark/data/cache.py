"""Decoded images and masks in memory-mapped files, written once and shared by workers, processes and runs.

The folder data.cache holds one folder for the images and one for the masks of a data set, each with the file `pixels`
(the decoded values, one file after the other) and index.json (path, size and time of change of each file, and its
Place). When a file changes, another folder is written, so that processes which have the old one open
can go on.
Where bad samples may be skipped, files that cannot be decoded are left out of the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from allspark import distributed
from allspark.data.image_files import BadSample, read_size
from allspark.data.image_io import read_image
from allspark.data.mask_io import check_same_size, read_mask
from allspark.data.spec import DatasetSpec, Sample
from allspark.utils.errors import UserError
from allspark.utils.parallel import THREADS, run_in_threads
from allspark.utils.progress import disable_bar

REMEDY = "choose a folder on another disk, or data.cache=none"
SEEK_LOCK = threading.Lock()
DECODER = 2  # to be raised when image_io or mask_io read the same file in another way


@dataclass(frozen=True)
class SampleReader:
    """Reads training images and masks, from the caches if there are any, else from the files."""

    spec: DatasetSpec
    images: DecodedCache | None = None
    masks: DecodedCache | None = None

    def image(self, path: Path) -> np.ndarray:
        """As read_image."""
        cached = self.images.get(path) if self.images else None
        return read_image(path, self.spec.reading) if cached is None else cached

    def pair(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """As read_pair."""
        image = self.image(sample.image)
        cached = self.masks.get(sample.mask) if self.masks else None
        mask = read_mask(sample.mask, self.spec) if cached is None else cached[..., 0]
        check_same_size(sample, image, mask)
        return image, mask


def open_reader(
    cache: str, spec: DatasetSpec, images: Iterable[Path], masks: Iterable[Path], skip: bool = False
) -> SampleReader:
    """A reader for these images and masks, through caches in the folder `cache`, which are written if needed.

    The first process writes the cache, others wait.

    Args:
        cache: data.cache; 'none' reads the files themselves.
        skip: leave out files that cannot be read.

    Raises:
        UserError: a file cannot be read, the folder cannot be written, or the disk is too small.
    """
    if cache == "none":
        return SampleReader(spec)
    root = Path(os.path.expanduser(cache)).absolute()
    name = re.sub(r"\W", "_", spec.name)
    # Masks are stored decoded, so whatever decides about decoding is part of the cache's key
    values = spec.decode_mask(np.arange(spec.max_stored + 1))
    decoding = f"{spec.num_classes} {spec.ignore_index} {values.tolist()}{spec.colors or ''} {spec.reading.orientation}"
    read = partial(read_image, reading=spec.reading)
    return SampleReader(
        spec,
        open_cache(root, f"{name}-images", images, read, spec.channels, str(spec.reading), skip),
        open_cache(root, f"{name}-masks", masks, partial(read_mask, spec=spec), 1, decoding, skip),
    )


class Place(NamedTuple):
    """Where the values of a file lie in `pixels`, and their CRC-32."""

    offset: int
    height: int
    width: int
    crc: int


class DecodedCache:
    """The decoded files of a cache folder by path, read-only: (H, W, C) uint8; masks have one channel."""

    def __init__(self, folder: Path, channels: int, places: dict[str, Place]) -> None:
        self.folder, self.channels, self.places = folder, channels, places
        self.pixels = np.asarray(np.memmap(folder / "pixels", np.uint8, "r"))
        self.intact: dict[str, bool] = {}  # path -> whether its values have their checksum, computed at first use

    def get(self, path: Path) -> np.ndarray | None:
        """The values of a file; None if they are not in the cache, or damaged."""
        name = str(path)
        if name not in self.places:
            return None
        offset, height, width, crc = self.places[name]
        values = self.pixels[offset : offset + height * width * self.channels]
        if name not in self.intact:
            self.intact[name] = zlib.crc32(values) == crc
            if not self.intact[name]:
                print(
                    f"WARNING: {self.folder}: the values of {path} are damaged, the file itself is read; delete the "
                    "folder to have it written again",
                    file=sys.stderr,
                )
        return values.reshape(height, width, self.channels) if self.intact[name] else None

    def __reduce__(self) -> tuple:
        """Workers that are not forked map the file themselves, instead of receiving gigabytes."""
        return DecodedCache, (self.folder, self.channels, self.places)


def open_cache(
    root: Path,
    name: str,
    paths: Iterable[Path],
    read: Callable[[Path], np.ndarray],
    channels: int,
    decoding: str = "",
    skip: bool = False,
) -> DecodedCache:
    """Open the cache of these files, decoded by `read`; write it if it does not exist or a file has changed."""
    paths = sorted(set(paths))
    files = [file_identity(path) for path in paths]
    key = hashlib.sha256(json.dumps([DECODER, decoding, *files]).encode()).hexdigest()
    folder = root / f"{name}-{key[:12]}"
    try:
        places = read_index(folder, files, channels)  # without the lock: a complete cache may be in a read-only folder
        if places is None:
            root.mkdir(parents=True, exist_ok=True)
            with lock(root / f"{folder.name}.lock"):
                places = read_index(folder, files, channels)  # another process may have written it meanwhile
                if places is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    places = build_cache(folder, paths, files, read, channels, skip)
        return DecodedCache(folder, channels, {str(path): place for path, place in zip(paths, places) if place})
    except OSError as error:
        raise UserError(f"data.cache={root}: cannot be used ({error.strerror or error}); {REMEDY}") from None


def file_identity(path: Path) -> list:
    """[path, bytes, time of change]; as long as they are the same, the content is taken to be the same."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct the list or data_root") from None
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Exclusive lock. It is released when the process ends, however it ends; the lock file stays."""
    file_lock = FileLock(path, mode=0o666)  # anyone who may write to the folder may take it
    try:
        file_lock.acquire(blocking=False)
    except Timeout:
        if distributed.is_main():
            print(f"{path.with_suffix('')}: waiting for another process to write it")
        file_lock.acquire()
    try:
        yield
    finally:
        file_lock.release()


def read_index(folder: Path, files: list[list], channels: int) -> list[Place | None] | None:
    """The places of a cache, see build_cache; None if it is incomplete or was written from other files."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        places = [None if place is None else Place(*map(int, place)) for place in index["places"]]
        size = (folder / "pixels").stat().st_size
        complete = len(places) == len(files) and index["files"] == files
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    ends = [place.offset + place.height * place.width * channels for place in places if place]
    return places if complete and max(ends, default=0) <= size else None


def build_cache(
    folder: Path,
    paths: Sequence[Path],
    files: list[list],
    read: Callable[[Path], np.ndarray],
    channels: int,
    skip: bool,
) -> list[Place | None]:
    """Decode the files into `folder`, which appears when all are done. Raises the first error, unless `skip`.

    Returns:
        The place of each file; None for a file that cannot be decoded.
    """
    sizes = run_in_threads([partial(read_size, path) for path in paths])
    if not skip and (errors := [size for size in sizes if isinstance(size, UserError)]):
        raise errors[0]
    shapes = [(0, 0) if isinstance(size, UserError) else size[::-1] for size in sizes]
    needed = sum(height * width for height, width in shapes) * channels
    check_space(folder.parent, len(paths), needed)
    print(f"{folder}: decoding {len(paths)} files once, {needed:,} bytes")
    temporary = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    try:
        temporary.mkdir()
        with (temporary / "pixels").open("wb") as pixels:
            os.truncate(pixels.fileno(), needed)  # full size even if the last files leave their places empty
            places = decode_all(pixels.fileno(), paths, shapes, read, channels, skip)
            os.fsync(pixels.fileno())
        (temporary / "index.json").write_text(json.dumps({"files": files, "places": places}), encoding="utf-8")
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return places


def check_space(root: Path, count: int, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(f"data.cache={root}: {count} decoded files take {needed:,} bytes, {free:,} are free; {REMEDY}")


def decode_all(
    file: int,
    paths: Sequence[Path],
    shapes: list[tuple[int, int]],
    read: Callable[[Path], np.ndarray],
    channels: int,
    skip: bool,
) -> list[Place | None]:
    """Decode in threads and write each file to its place."""

    def decode(path: Path, shape: tuple[int, int], offset: int) -> Place | None:
        try:
            array = read(path)
        except BadSample:
            if skip:
                return None
            raise
        if array.size != shape[0] * shape[1] * channels:
            raise UserError(f"{path}: changed while it was read; start again when nothing writes to it")
        array = np.ascontiguousarray(array)
        write_at(file, memoryview(array).cast("B"), offset)
        return Place(offset, *array.shape[:2], zlib.crc32(array))

    offsets = np.cumsum([0, *(height * width for height, width in shapes[:-1])]) * channels
    with ThreadPoolExecutor(THREADS) as pool:
        tasks = [pool.submit(decode, *each) for each in zip(paths, shapes, offsets.tolist(), strict=True)]
        try:
            hidden = disable_bar(distributed.is_main())
            for task in tqdm(as_completed(tasks), "decode", len(tasks), leave=False, unit="file", disable=hidden):
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [task.result() for task in tasks]


def write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        if hasattr(os, "pwrite"):
            written = os.pwrite(file, data, offset)
        else:  # on Windows all threads share one position
            with SEEK_LOCK:
                os.lseek(file, offset, os.SEEK_SET)
                written = os.write(file, data)
        data, offset = data[written:], offset + written
