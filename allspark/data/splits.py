"""Which files a run trains and is evaluated on: lists and folders read, checked before the first step, newly drawn."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from allspark import distributed
from allspark.config import CustomDataConfig, DataConfig
from allspark.data import spec_for
from allspark.data.base import DatasetSpec, Sample, read_image, read_mask, read_pair, same_path
from allspark.errors import UserError

SPLITS_ROOT = Path(__file__).resolve().parents[2] / "splits"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
THREADS = 8


@dataclass(frozen=True)
class Lists:
    """The samples of a run. hash: sha256 of the three lists' hashes; name: the split's, or the file that was given."""

    labeled: tuple[Sample, ...]
    unlabeled: tuple[Sample, ...]
    val: tuple[Sample, ...]
    hash: str
    name: str


@dataclass(frozen=True)
class Entry:
    """A sample and where it stands: the list file and its line, or the folder."""

    sample: Sample
    source: str


# Reading


def read_list(path: Path, data_root: Path, mask_path: Callable[[str], str] = same_path) -> list[Sample]:
    """The samples of a list file: a line is `image mask` or `image`, relative to data_root, or blank."""
    return [entry.sample for entry in read_entries(path, data_root, mask_path)]


def read_entries(path: Path, data_root: Path, mask_path: Callable[[str], str] = same_path) -> list[Entry]:
    path, data_root = Path(path), Path(data_root)
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        columns = columns_of(line)
        if len(columns) > 2:
            raise UserError(
                f"{path} line {number}: {len(columns)} columns, expected `image mask` or `image`; "
                "where a name has a blank in it, put a tab between image and mask"
            )
        if columns:
            mask = data_root / mask_path(columns[1]) if len(columns) == 2 else None
            entries.append(Entry(Sample(data_root / columns[0], mask), f"{path} line {number}"))
    return entries


def columns_of(line: str) -> list[str]:
    """Split at tabs where there is one (names may then hold blanks), else at blanks."""
    parts = line.split("\t") if "\t" in line else line.split()
    return [part.strip() for part in parts if part.strip()]


def folder_entries(data_root: Path, images: str, masks: str | None) -> list[Entry]:
    """Every image below a folder, by name; its mask lies at the same place below `masks`, as .png."""
    folder = data_root / images
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; correct data.custom or data_root")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not found:
        raise UserError(
            f"{folder}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))}); correct data.custom or data_root"
        )

    def mask_of(image: Path) -> Path | None:
        return None if masks is None else data_root / masks / image.relative_to(folder).with_suffix(".png")

    return [Entry(Sample(image, mask_of(image)), f"{folder}") for image in found]


def list_hash(images: Iterable[str]) -> str:
    """sha256 of a list in normal form: the image column alone, in order, a line feed after each line."""
    return hashlib.sha256("".join(f"{image}\n" for image in images).encode()).hexdigest()


def samples_hash(samples: Sequence[Sample], data_root: Path) -> str:
    """list_hash of samples below data_root: independent of where the data lies."""
    root = Path(data_root)
    return list_hash(
        (s.image.relative_to(root) if s.image.is_relative_to(root) else s.image).as_posix() for s in samples
    )


# What a run uses


def resolve(data: DataConfig, splits_root: Path = SPLITS_ROOT) -> Lists:
    """The lists that the recipe names, every file of them known to exist. Unlabeled samples never have a mask.

    A list given by path stands before data.split, a split before the folders of data.custom; where nothing names
    unlabeled images their list is empty.
    """
    spec = spec_for(data)
    root = find_data(data, spec)
    custom = data.custom or CustomDataConfig(classes=spec.classes)
    labeled = train_entries(data, "labeled", spec, root, splits_root)
    if labeled is None and custom.labeled_images is not None:
        labeled = folder_entries(root, custom.labeled_images, custom.labeled_masks)
    unlabeled = train_entries(data, "unlabeled", spec, root, splits_root)
    if unlabeled is None and custom.unlabeled_images is not None:
        unlabeled = folder_entries(root, custom.unlabeled_images, None)
    unlabeled = [Entry(Sample(entry.sample.image), entry.source) for entry in unlabeled or ()]
    val = val_entries(data, spec, root, splits_root)
    name = data.labeled_id_path or data.split or "folders"
    return checked_lists(labeled, unlabeled, val, name, root)


def train_entries(data: DataConfig, kind: str, spec: DatasetSpec, root: Path, splits_root: Path) -> list[Entry] | None:
    """The entries of the list data.<kind>_id_path or else of the split's; None where neither is named."""
    given = getattr(data, f"{kind}_id_path")
    if given is not None:
        return read_entries(existing(Path(given), f"data.{kind}_id_path"), root, spec.mask_path)
    if data.split is None:
        return None
    path = find_split(data, spec, splits_root) / f"{kind}.txt"
    return read_entries(existing(path, f"data.split={data.split}"), root, spec.mask_path)


def val_entries(data: DataConfig, spec: DatasetSpec, root: Path, splits_root: Path = SPLITS_ROOT) -> list[Entry]:
    """What the run is evaluated on: data.val_id_path, else data.custom.val_images, else splits/<dataset>/val.txt."""
    custom = data.custom
    if data.val_id_path is None and custom is not None and custom.val_images is not None:
        return folder_entries(root, custom.val_images, custom.val_masks)
    key = "the default of data.val_id_path" if data.val_id_path is None else "data.val_id_path"
    path = existing(Path(data.val_id_path or splits_root / spec.splits / "val.txt"), key)
    return read_entries(path, root, spec.mask_path)


def checked_lists(
    labeled: list[Entry] | None, unlabeled: list[Entry], val: list[Entry], name: str, root: Path
) -> Lists:
    if not labeled:
        raise UserError("no labeled images: name data.split, data.labeled_id_path or data.custom.labeled_images")
    if not val:
        raise UserError("no images to evaluate on: the val list is empty; see data.val_id_path, data.custom.val_images")
    for entry in (*labeled, *val):
        if entry.sample.mask is None:
            raise UserError(f"{entry.source}: {entry.sample.image} has no mask; name it in the list or in data.custom")
    check_files((*labeled, *unlabeled, *val))
    parts = [tuple(entry.sample for entry in entries) for entries in (labeled, unlabeled, val)]
    return Lists(*parts, hash=list_hash(samples_hash(part, root) for part in parts), name=name)


def find_data(data: DataConfig, spec: DatasetSpec) -> Path:
    """The data root, made by spec.prepare where the data set can be made."""
    root = Path(data.data_root).expanduser()
    if spec.prepare is not None:
        if distributed.rank() == 0 and not root.exists():
            spec.prepare(root)
        distributed.barrier()
    if not root.is_dir():
        variable = f"ALLSPARK_DATA_{spec.name.upper()}"
        raise UserError(
            f"data.data_root: {root} is not a folder; correct the key or set {variable}=/path/to/{spec.name}"
        )
    return root


def find_split(data: DataConfig, spec: DatasetSpec, splits_root: Path) -> Path:
    folder = splits_root / spec.splits
    if data.split and (folder / data.split / "labeled.txt").is_file():
        return folder / data.split
    there = ", ".join(sorted(path.parent.name for path in folder.glob("*/labeled.txt"))) or "none yet"
    who = f"--dataset {spec.name}" if data.custom is None else "--config FILE"
    command = f"splits make {who} --train LIST --sizes {data.split} --out {folder}"
    raise UserError(
        f"data.split: {folder / str(data.split) / 'labeled.txt'} does not exist; splits of {spec.name}: {there}. "
        f"Make one: python -m allspark {command}"
    )


def existing(path: Path, key: str) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: this list does not exist; it is asked for by {key}")
    return path


def check_files(entries: Sequence[Entry]) -> None:
    """UserError unless every file is there; each folder is read once, which costs less than asking for every file."""
    folders: dict[Path, set[str]] = {}

    def exists(path: Path) -> bool:
        if path.parent not in folders:
            folders[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        return path.name in folders[path.parent]

    paths = [(path, entry.source) for entry in entries for path in (entry.sample.image, entry.sample.mask) if path]
    missing = [(path, source) for path, source in paths if not exists(path)]
    if missing:
        path, source = missing[0]
        raise UserError(
            f"{source}: {path} does not exist ({len(missing)} of {len(paths)} files are missing); "
            "correct the list or data_root"
        )


# Before the first step


def check_data(data: DataConfig, spec: DatasetSpec, lists: Lists, seed: int = 0) -> list[str]:
    """Open files before an hour is spent: all labeled samples up to 500, else 200; 50 of val; 20 unlabeled images.

    Returns what is worth knowing; UserError on what would stop the run or make it meaningless.
    """
    rng = np.random.default_rng(seed)
    labeled = some(lists.labeled, len(lists.labeled) if len(lists.labeled) <= 500 else 200, rng)
    val, unlabeled = some(lists.val, 50, rng), some(lists.unlabeled, 20, rng)

    def values(sample: Sample) -> np.ndarray:
        return np.unique(read_pair(sample, spec)[1])

    tasks = [partial(values, sample) for sample in (*labeled, *val)]
    found = at_once(tasks + [partial(check_image, sample) for sample in unlabeled])[: len(labeled)]
    counts = f"{len(lists.labeled)} labeled, {len(lists.unlabeled)} unlabeled, {len(lists.val)} val images"
    notes = [f"{spec.name}, split {lists.name} ({lists.hash[:12]}): {counts}"]
    present = set(np.concatenate(found).tolist()) - {spec.ignore_index}
    if not present:
        raise UserError(f"split {lists.name}: no pixel of the labeled masks has a class, all are {spec.ignore_index}")
    absent = [name for index, name in enumerate(spec.classes) if index not in present]
    if absent:
        among = "images" if len(labeled) == len(lists.labeled) else f"images checked ({len(labeled)})"
        notes.append(f"classes in none of the labeled {among}: {', '.join(absent)}")
    return notes + overlaps(lists)


def check_image(sample: Sample) -> None:
    read_image(sample.image)


def some(samples: Sequence[Sample], at_most: int, rng: np.random.Generator) -> list[Sample]:
    if len(samples) <= at_most:
        return list(samples)
    return [samples[index] for index in sorted(rng.choice(len(samples), at_most, replace=False))]


def at_once(tasks: Sequence[Callable]) -> list:
    """The results of tasks, run in threads (decoding releases the interpreter); one UserError for all that failed."""

    def attempt(task: Callable):
        try:
            return task()
        except UserError as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(attempt, tasks))
    errors = [result for result in results if isinstance(result, UserError)]
    if errors:
        more = f" (and {len(errors) - 1} more of {len(tasks)} samples checked)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}")
    return results


def overlaps(lists: Lists) -> list[str]:
    images = {name: [s.image for s in getattr(lists, name)] for name in ("labeled", "unlabeled", "val")}
    notes = [
        f"{len(files) - len(set(files))} images stand more than once in the {name} list"
        for name, files in images.items()
        if len(set(files)) < len(files)
    ]
    for first, second in (("labeled", "unlabeled"), ("labeled", "val"), ("unlabeled", "val")):
        both = set(images[first]) & set(images[second])
        if both:
            notes.append(f"{len(both)} images are both {first} and {second}, such as {min(both)}")
    return notes


# Drawing new splits


def make_splits(
    entries: Sequence[Entry], spec: DatasetSpec, sizes: dict[str, int], seed: int
) -> dict[str, tuple[list[Entry], list[Entry]]]:
    """Split name -> (labeled entries in the order they were drawn, unlabeled entries in the order of the train list).

    Every labeled list is a prefix of the same sequence, so a smaller one is contained in a larger one.
    """
    for entry in entries:
        if entry.sample.mask is None:
            raise UserError(
                f"{entry.source}: {entry.sample.image} has no mask; a balanced draw needs the train list's masks"
            )
    for name, size in sizes.items():
        if not 0 < size < len(entries):
            raise UserError(f"split {name}: {size} labeled of {len(entries)} images; give 1..{len(entries) - 1}")
    check_files(entries)
    pixels = at_once([partial(class_pixels, entry.sample, spec) for entry in entries])
    drawn = balanced_order(np.stack(pixels), max(sizes.values()), seed)
    splits = {}
    for name, size in sizes.items():
        chosen = set(drawn[:size])
        rest = [entry for index, entry in enumerate(entries) if index not in chosen]
        splits[name] = ([entries[index] for index in drawn[:size]], rest)
    return splits


def class_pixels(sample: Sample, spec: DatasetSpec) -> np.ndarray:
    """(K,) the share of each class among the pixels of a mask."""
    mask = read_mask(sample.mask, spec)
    return np.bincount(mask.ravel(), minlength=256)[: spec.num_classes] / mask.size


def balanced_order(shares: np.ndarray, length: int, seed: int) -> list[int]:
    """The first `length` images of a class-balanced sequence; shares (N, K) of pixels.

    Again and again, the class that is shown by the fewest chosen images (of equals, the one that the fewest images show
    at all) gets the next image of a seeded random order that shows it. An image shows a class that covers 0.1 % of it,
    or any pixel of it where no image does.
    """
    shows = shares >= 0.001
    never = ~shows.any(axis=0)
    shows[:, never] = shares[:, never] > 0
    order = np.random.default_rng(seed).permutation(len(shares)).tolist()
    waiting = {k: [i for i in reversed(order) if shows[i, k]] for k in np.flatnonzero(shows.any(axis=0)).tolist()}
    rarity, counts = shows.sum(axis=0), np.zeros(shows.shape[1], int)
    chosen: dict[int, None] = {}  # a set that keeps its order
    anything = list(reversed(order))  # images without any class come last
    while len(chosen) < length:
        if waiting:
            k = min(waiting, key=lambda k: (counts[k], rarity[k], k))
            queue = waiting[k]
        else:
            queue = anything
        while queue and queue[-1] in chosen:
            queue.pop()
        if queue:
            index = queue.pop()
            chosen[index] = None
            counts += shows[index]
        else:
            del waiting[k]
    return list(chosen)


def parse_sizes(text: str, total: int) -> dict[str, int]:
    """'1_8,32' -> {'1_8': ceil(total / 8), '32': 32}; rounded up, as the published lists are."""
    sizes = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        fraction = re.fullmatch(r"(\d+)_(\d+)", name)
        if fraction and int(fraction[2]):
            sizes[name] = -(-total * int(fraction[1]) // int(fraction[2]))
        elif name.isdigit():
            sizes[name] = int(name)
        else:
            raise UserError(f"--sizes: '{name}' is neither a fraction such as 1_8 nor a count such as 32")
    if not sizes:
        raise UserError("--sizes: give fractions such as 1_8 or counts such as 32, separated by commas")
    return sizes


def write_splits(
    splits: dict[str, tuple[list[Entry], list[Entry]]], data_root: Path, out: Path, force: bool = False
) -> list[Path]:
    """Write <out>/<split>/{labeled,unlabeled}.txt; UserError before anything is written where a list exists."""
    files = {
        out / name / f"{kind}.txt": entries
        for name, pair in splits.items()
        for kind, entries in zip(("labeled", "unlabeled"), pair, strict=True)
    }
    there = [path for path in files if path.exists()]
    if there and not force:
        raise UserError(f"{there[0]} is there already ({len(there)} of {len(files)} lists); --force overwrites")
    for path, entries in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{list_line(entry.sample, data_root)}\n" for entry in entries)
        path.write_text(text, encoding="utf-8", newline="\n")
    return list(files)


def list_line(sample: Sample, data_root: Path) -> str:
    names = [path.relative_to(data_root).as_posix() for path in (sample.image, sample.mask) if path]
    return ("\t" if any(" " in name for name in names) else " ").join(names)
