"""Which files a run trains and is evaluated on: lists and folders, read, hashed, and every file known to exist."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from allspark import distributed
from allspark.config import CustomDataConfig, DataConfig
from allspark.config_io import root_variable
from allspark.data import spec_for
from allspark.data.base import DatasetSpec, Sample, all_below, same_path
from allspark.split_lists.manifest import SPLITS_ROOT, known_as, list_hash, load_manifest, other_images, roots
from allspark.utils.errors import UserError

MAX_LIST = 256 << 20  # bytes; the longest published one has 6 MB
MASK_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff")  # of what keeps the values; the first is the usual one
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jp2", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Lists:
    """The samples of a run. name: the split's, or the file that was given.

    hidden: those unlabeled images whose mask is known all the same, with it: to measure by, never to train on.
    hashes: labeled, unlabeled, val -> sha256 of the list's normal form; hash: sha256 of those three.
    """

    labeled: tuple[Sample, ...]
    unlabeled: tuple[Sample, ...]
    val: tuple[Sample, ...]
    hash: str
    name: str
    hashes: Mapping[str, str] = field(default_factory=dict)
    hidden: tuple[Sample, ...] = ()

    @property
    def split(self) -> dict[str, str]:
        """What a checkpoint says of its lists."""
        return {"name": self.name, "sha256": self.hash, **self.hashes}


@dataclass(frozen=True)
class Entry:
    """A sample and where it stands: the list file and its line, or the folder."""

    sample: Sample
    source: str


def read_list(path: Path, data_root: Path, mask_path: Callable[[str], str] = same_path) -> list[Sample]:
    """The samples of a list file: a line is `image mask` or `image`, relative to data_root, or blank."""
    return [entry.sample for entry in read_entries(path, data_root, mask_path)]


def read_entries(path: Path, data_root: Path, mask_path: Callable[[str], str] = same_path) -> list[Entry]:
    data_root = Path(data_root)
    return [
        Entry(Sample(data_root / line.image, data_root / mask_path(line.mask) if line.mask else None), line.source)
        for line in read_lines(path)
    ]


def each_once(entries: Sequence[Entry]) -> list[Entry]:
    """Without those that repeat another, and a word of it; UserError where one image has two masks."""
    first: dict[Path, Entry] = {}
    for entry in entries:
        other = first.setdefault(entry.sample.image, entry)
        if other.sample != entry.sample:
            raise UserError(f"{entry.source}: {entry.sample.image} has another mask in {other.source}; leave one out")
    if len(first) < len(entries) and distributed.is_main():
        print(f"{len(entries) - len(first)} lines name an image again and are left out")
    return list(first.values())


@dataclass(frozen=True)
class Line:
    """A line of a list file, as it is written."""

    image: str
    mask: str | None
    source: str


def read_lines(path: Path) -> list[Line]:
    """The lines of a list file that are not blank; UserError where it is no list."""
    lines = []
    try:
        if (size := Path(path).stat().st_size) > MAX_LIST:
            raise UserError(f"{path}: not a list, it has {size} bytes; give a file of `image mask` lines")
        texts = Path(path).read_text(encoding="utf-8-sig").split("\n")  # \r\n is read as that, too
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of `image mask` lines") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a list, it is no UTF-8 text; give a file of `image mask` lines") from None
    for number, text in enumerate(texts, start=1):
        columns = columns_of(text)
        if len(columns) > 2:
            raise UserError(
                f"{path} line {number}: {len(columns)} columns, expected `image mask` or `image`; "
                "where a name has a blank in it, put a tab between image and mask, or behind an image without one"
            )
        if columns:
            lines.append(Line(columns[0], columns[1] if len(columns) == 2 else None, f"{path} line {number}"))
    return lines


def columns_of(line: str) -> list[str]:
    """Split at tabs where there is one (names may then hold blanks), else at blanks."""
    parts = line.split("\t") if "\t" in line else line.split()
    return [part.strip() for part in parts if part.strip()]


def folder_entries(data_root: Path, images: str, masks: str | None) -> list[Entry]:
    """Every image below a folder, by name; its mask lies at the same place below `masks`, as .png if in doubt."""
    folder = data_root / images
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; correct data.custom or data_root")
    found = sorted(p for p in all_below(folder) if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not found:
        raise UserError(
            f"{folder}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))}); correct data.custom or data_root"
        )

    def mask_of(image: Path) -> Path | None:
        if masks is None:
            return None
        usual = data_root / masks / image.relative_to(folder).with_suffix(MASK_SUFFIXES[0])
        kinds = (usual.with_suffix(suffix) for each in MASK_SUFFIXES for suffix in (each, each.upper()))
        return next(filter(exists, kinds), usual)

    exists = folder_reader()
    return [Entry(Sample(image, mask_of(image)), f"{folder}") for image in found]


def samples_hash(samples: Sequence[Sample], data_root: Path) -> str:
    """list_hash of samples below data_root: independent of where the data lies."""
    root = Path(data_root)
    return list_hash(
        (s.image.relative_to(root) if s.image.is_relative_to(root) else s.image).as_posix() for s in samples
    )


@contextlib.contextmanager
def collected(problems: list[str] | None) -> Iterator[None]:
    """A UserError inside is put there, where there is such a list."""
    try:
        yield
    except UserError as error:
        if problems is None:
            raise
        problems.append(str(error))


def resolve(data: DataConfig, splits_root: Path = SPLITS_ROOT, problems: list[str] | None = None) -> Lists:
    """The lists that the recipe names, every file of them known to exist. Unlabeled samples never have a mask.

    problems: gets what is wrong with the val list, and nobody looks whether the files exist; None: a UserError.
    A list given by path stands before data.split, a split before the folders of data.custom; where nothing names
    unlabeled images their list is empty.
    """
    spec = spec_for(data)
    root = find_data(data, spec)
    custom = data.custom or CustomDataConfig(classes=spec.classes)
    labeled = train_entries(data, "labeled", spec, root, splits_root)
    if labeled is None and custom.labeled_images is not None:
        labeled = folder_entries(root, custom.labeled_images, custom.labeled_masks)
    if labeled is None:
        there = names_of_splits(spec, splits_root)
        raise UserError(
            f"no labeled images: name data.split (--split NAME; splits of {spec.name}: {there}), "
            "data.labeled_id_path or data.custom.labeled_images"
        )
    unlabeled = train_entries(data, "unlabeled", spec, root, splits_root)
    if unlabeled is None and custom.unlabeled_images is not None:
        unlabeled = folder_entries(root, custom.unlabeled_images, None)
    val: list[Entry] = []
    with collected(problems):
        val = val_entries(data, spec, root, splits_root)
        if not val:
            raise UserError(
                "no images to evaluate on: the val list is empty; see data.val_id_path, data.custom.val_images"
            )
    name = data.labeled_id_path or data.split or "folders"
    return checked_lists(labeled, unlabeled or [], val, name, root, present=problems is None)


def train_entries(data: DataConfig, kind: str, spec: DatasetSpec, root: Path, splits_root: Path) -> list[Entry] | None:
    """The entries of the list data.<kind>_id_path or else of the split's; None where neither is named."""
    given = getattr(data, f"{kind}_id_path")
    if given is not None:
        return read_entries(existing(Path(given), f"data.{kind}_id_path"), root, spec.mask_path)
    if data.split is None:
        return None
    path = find_split(data, spec, splits_root) / f"{kind}.txt"
    key = f"data.split={data.split}"
    return read_entries(existing(path, key, how_to_get(spec.splits, data.split, kind)), root, spec.mask_path)


def val_entries(data: DataConfig, spec: DatasetSpec, root: Path, splits_root: Path = SPLITS_ROOT) -> list[Entry]:
    """What the run is evaluated on: data.val_id_path, else data.custom.val_images, else splits/<dataset>/val.txt."""
    custom = data.custom
    if data.val_id_path is None and custom is not None and custom.val_images is not None:
        return folder_entries(root, custom.val_images, custom.val_masks)
    key = "the default of data.val_id_path" if data.val_id_path is None else "data.val_id_path"
    places = [root / spec.splits / "val.txt" for root in roots(splits_root)]
    path = Path(data.val_id_path or next((path for path in places if path.is_file()), places[0]))
    remedy = how_to_get(spec.splits, None, "val") if data.val_id_path is None else ""
    if custom is not None and data.val_id_path is None:
        make = (
            f"--train {custom.labeled_images or 'LIST'} --masks {custom.labeled_masks or 'DIR'} --val 1_5 --sizes 1_8"
        )
        remedy = "Name data.custom.val_images and val_masks, or draw it from your images, together with a split: "
        remedy += f"python -m allspark splits make --config FILE {make}"
    return read_entries(existing(path, key, remedy), root, spec.mask_path)


def checked_lists(
    labeled: list[Entry], unlabeled: list[Entry], val: list[Entry], name: str, root: Path, present: bool
) -> Lists:
    if not labeled:
        raise UserError(f"no labeled images in the list or folder of {name}; put some there, or name another")
    for entry in (*labeled, *val):
        if entry.sample.mask is None:
            raise UserError(f"{entry.source}: {entry.sample.image} has no mask; name it in the list or in data.custom")
    hidden = known_labels(labeled, unlabeled)
    unlabeled = [Entry(Sample(entry.sample.image), entry.source) for entry in unlabeled]
    if present:
        check_files((*labeled, *unlabeled, *val))
    lists = {"labeled": labeled, "unlabeled": unlabeled, "val": val}
    parts = {kind: tuple(entry.sample for entry in entries) for kind, entries in lists.items()}
    hashes = {kind: samples_hash(part, root) for kind, part in parts.items()}
    return Lists(**parts, hash=list_hash(hashes.values()), name=name, hashes=hashes, hidden=hidden)


def known_labels(labeled: list[Entry], unlabeled: list[Entry]) -> tuple[Sample, ...]:
    """The unlabeled samples whose line names a mask that is there. An image that is labeled, too, hides nothing."""
    shown, exists = {entry.sample.image for entry in labeled}, folder_reader()
    samples = (entry.sample for entry in unlabeled)
    return tuple(s for s in samples if s.mask is not None and s.image not in shown and exists(s.mask))


def provenance(lists: Lists, spec: DatasetSpec) -> list[str]:
    """Which lists these are: their hashes and whose they are, and a warning where a published name means others."""

    def told(kind: str) -> str:
        sha256 = lists.hashes[kind]
        return f"{kind} list sha256 {sha256[:12]} ({f'= {whose}' if (whose := known_as(sha256)) else 'not published'})"

    warning = other_images(lists.name, lists.hashes["labeled"], spec.splits)
    return [f"split {lists.name}: {told('labeled')}, {told('val')}"] + ([f"WARNING: {warning}"] if warning else [])


def find_data(data: DataConfig, spec: DatasetSpec) -> Path:
    """The data root, made by spec.prepare where the data set can be made."""
    root = Path(os.path.expanduser(data.data_root))
    if spec.prepare is not None:
        if distributed.rank() == 0:
            spec.prepare(root)
        distributed.barrier()
    if not root.is_dir():
        raise UserError(
            f"data.data_root: {root} is not a folder; correct the key or set {root_variable(spec.name)}=DIR"
        )
    return root


def find_split(data: DataConfig, spec: DatasetSpec, splits_root: Path) -> Path:
    folders = [root / spec.splits for root in roots(splits_root)]
    for folder in folders:
        if data.split and (folder / data.split / "labeled.txt").is_file():
            return folder / data.split
    folder = folders[0]
    there = names_of_splits(spec, splits_root)
    who = f"--dataset {spec.name}" if data.custom is None else "--config FILE"
    make = f"splits make {who} --train LIST --sizes {data.split} --out {folder}"
    raise UserError(
        f"data.split: {folder / str(data.split) / 'labeled.txt'} does not exist; splits of {spec.name}: {there}. "
        f"{how_to_get(spec.splits, data.split, 'labeled') or f'Make one: python -m allspark {make}'}"
    )


def names_of_splits(spec: DatasetSpec, splits_root: Path) -> str:
    names = {path.parent.name for root in roots(splits_root) for path in (root / spec.splits).glob("*/labeled.txt")}
    return ", ".join(sorted(names)) or "none yet"


def how_to_get(folder: str, split: str | None, kind: str) -> str:
    """The command that brings a published list, empty where it is not one; split: None for the data set's own lists."""
    found = load_manifest().find("/".join(filter(None, (folder, split, kind))))
    if found is None or not found[0].places:
        return ""
    command = f"It is published, fetch it: python -m allspark splits fetch --dataset {folder} --split {split or kind}"
    build = f", or derive it from the data: python -m allspark splits build --dataset {folder}"
    return command + (build if kind == "unlabeled" else "")


def existing(path: Path, key: str, remedy: str = "") -> Path:
    if not path.is_file():
        raise UserError(f"{path}: this list does not exist; it is asked for by {key}{'. ' if remedy else ''}{remedy}")
    return path


def folder_reader() -> Callable[[Path], bool]:
    """Path.exists that reads each folder once, which costs less than asking for every file."""
    folders: dict[Path, set[str]] = {}

    def exists(path: Path) -> bool:
        if path.parent not in folders:
            try:
                folders[path.parent] = set(os.listdir(path.parent))
            except (OSError, ValueError):  # not there, no folder, not ours to read, or no path at all
                folders[path.parent] = set()
        return path.name in folders[path.parent]

    return exists


def hint(path: Path) -> str:
    """Of a mask that is not there: what lies in its place and may be meant."""
    try:
        found = sorted(name for name in os.listdir(path.parent) if Path(name).stem.startswith(path.stem))
    except (OSError, ValueError):
        return ""
    if not found:
        return ""
    same = [name for name in found if Path(name).stem == path.stem]
    if same and Path(same[0]).suffix.lower() not in MASK_SUFFIXES:
        return f"; there is {same[0]}, which may hold other values than were painted: save masks as PNG"
    return f"; there is {(same or found)[0]}: a mask in a folder has its image's name and {', '.join(MASK_SUFFIXES)}"


def check_files(entries: Sequence[Entry]) -> None:
    """UserError unless every file is there."""
    exists = folder_reader()
    paths = [(path, entry) for entry in entries for path in (entry.sample.image, entry.sample.mask) if path]
    missing = [(path, entry) for path, entry in paths if not exists(path)]
    if missing:
        path, entry = missing[0]
        raise UserError(
            f"{entry.source}: {path} does not exist ({len(missing)} of {len(paths)} files are missing)"
            f"{hint(path) if path == entry.sample.mask else ''}; correct the list, data.custom or data_root"
        )
