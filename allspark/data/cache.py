"""Decoded images and masks in memory-mapped files, made once and shared by workers, processes and runs.

Below data.cache lies a folder for the images and one for the masks of a data set: `pixels`, the values of one file
after the other, and index.json: of which files, of what size and time. When one of them changes it is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from allspark import distributed
from allspark.data.base import THREADS, DatasetSpec, Sample, check_pair, image_size, read_image, read_mask
from allspark.errors import UserError

REMEDY = "name a folder on another disk, or data.cache=none"


@dataclass(frozen=True)
class Files:
    """Where training gets its images and masks from: the files themselves, or what the caches hold of them."""

    spec: DatasetSpec
    images: Cache | None = None
    masks: Cache | None = None

    def image(self, path: Path) -> np.ndarray:
        """What read_image gives."""
        return read_image(path) if self.images is None else self.images[path]

    def pair(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """What read_pair gives."""
        image = self.image(sample.image)
        mask = read_mask(sample.mask, self.spec) if self.masks is None else self.masks[sample.mask]
        check_pair(sample, image, mask)
        return image, mask


def open_files(cache: str, spec: DatasetSpec, images: Iterable[Path], masks: Iterable[Path]) -> Files:
    """Files of these images and masks; where data.cache names a folder, through caches there, built where need be.

    Whoever comes first builds, other processes wait. UserError for a file that cannot be read, a folder that cannot be
    written, or a disk that is too small.
    """
    if cache == "none":
        return Files(spec)
    root = Path(cache).expanduser().absolute()
    name = re.sub(r"\W", "_", spec.name)
    # A mask is stored as it is decoded, so what decides that is part of its identity
    values = spec.decode_mask(np.arange(256, dtype=np.uint8)[None])
    meaning = f"{spec.num_classes} {spec.ignore_index} {values.tobytes().hex()}"
    return Files(
        spec,
        open_cache(root, f"{name}-images", images, read_image, 3),
        open_cache(root, f"{name}-masks", masks, partial(read_mask, spec=spec), 1, meaning),
    )


class Cache:
    """The decoded files of a folder by path: (H, W, 3) or, with one channel, (H, W) uint8, read-only."""

    def __init__(self, folder: Path, channels: int, places: dict[str, tuple[int, int, int]]) -> None:
        self.folder, self.channels = folder, channels
        self.places = places  # path -> offset, height, width
        self.pixels = np.asarray(np.memmap(folder / "pixels", np.uint8, "r"))

    def __getitem__(self, path: Path) -> np.ndarray:
        offset, height, width = self.places[str(path)]
        shape = (height, width, 3) if self.channels == 3 else (height, width)
        return self.pixels[offset : offset + height * width * self.channels].reshape(shape)

    def __reduce__(self) -> tuple:
        """A worker that is not forked maps the file itself, instead of being sent its gigabytes."""
        return Cache, (self.folder, self.channels, self.places)


def open_cache(
    root: Path, name: str, paths: Iterable[Path], read: Callable[[Path], np.ndarray], channels: int, meaning: str = ""
) -> Cache:
    """The cache below root of what `read` makes of these files; built where it is absent or a file has changed."""
    paths = sorted(set(paths))
    files = [identity(path) for path in paths]
    key = hashlib.sha256(json.dumps([meaning, *(path for path, *_ in files)]).encode()).hexdigest()
    folder = root / f"{name}-{key[:12]}"
    with explained(root):
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f"{folder.name}.lock"):
            shapes = stored_shapes(folder, files, channels)
            if shapes is None:
                shutil.rmtree(folder, ignore_errors=True)
                shapes = build(folder, paths, files, read, channels)
            offsets = np.cumsum([0] + [height * width * channels for height, width in shapes]).tolist()
            places = {str(path): (offset, *shape) for path, offset, shape in zip(paths, offsets, shapes)}
            return Cache(folder, channels, places)


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
    import fcntl  # not on Windows

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if distributed.is_main():
                print(f"{path.with_suffix('')}: waiting for the process that makes it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stored_shapes(folder: Path, files: list[list], channels: int) -> list[tuple[int, int]] | None:
    """(height, width) of each file in the cache; None unless it is whole and of just these files."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        shapes = [(int(height), int(width)) for height, width in index["shapes"]]
        size = (folder / "pixels").stat().st_size
    except (OSError, ValueError, TypeError, KeyError):
        return None
    whole = len(shapes) == len(files) and size == sum(height * width * channels for height, width in shapes)
    return shapes if whole and index.get("files") == files else None


def build(
    folder: Path, paths: Sequence[Path], files: list[list], read: Callable[[Path], np.ndarray], channels: int
) -> list[tuple[int, int]]:
    """Decode the files into `folder`, all of them or, where one fails, none; (height, width) of each."""
    with ThreadPoolExecutor(THREADS) as pool:
        areas = [width * height for width, height in pool.map(image_size, paths)]
    check_space(folder.parent, len(paths), sum(areas) * channels)
    print(f"{folder}: decoding {len(paths)} files once, {sum(areas) * channels:,} bytes")
    partial_folder = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)  # of a process that was killed
    try:
        partial_folder.mkdir()
        with (partial_folder / "pixels").open("wb") as pixels:
            shapes = decode_all(pixels.fileno(), paths, areas, read, channels)
            os.fsync(pixels.fileno())
        index = json.dumps({"files": files, "shapes": shapes})
        (partial_folder / "index.json").write_text(index, encoding="utf-8")
        partial_folder.rename(folder)
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise
    return shapes


def check_space(root: Path, count: int, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(f"data.cache={root}: {count} decoded files take {needed:,} bytes, {free:,} are free; {REMEDY}")


def decode_all(
    file: int, paths: Sequence[Path], areas: list[int], read: Callable[[Path], np.ndarray], channels: int
) -> list[tuple[int, int]]:
    """Write each decoded file to its place, several at once; the first that fails ends it."""

    def decode(path: Path, area: int, offset: int) -> tuple[int, int]:
        array = read(path)
        if array.size != area * channels:
            raise UserError(f"{path}: changed while it was read; start again when nobody writes to it")
        rest = memoryview(np.ascontiguousarray(array)).cast("B")
        while rest:
            written = os.pwrite(file, rest, offset)
            rest, offset = rest[written:], offset + written
        return array.shape[:2]

    offsets = np.cumsum([0, *areas[:-1]]) * channels
    with ThreadPoolExecutor(THREADS) as pool:
        tasks = [pool.submit(decode, *each) for each in zip(paths, areas, offsets.tolist(), strict=True)]
        try:
            hidden = None if distributed.is_main() else True  # None: hidden where stderr is no terminal
            for task in tqdm(as_completed(tasks), "decode", len(tasks), leave=False, unit="file", disable=hidden):
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [task.result() for task in tasks]
