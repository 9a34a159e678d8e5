"""Which files a run uses: finds its lists or folders, hashes them, and checks that every file exists."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from allspark import distributed
from allspark.config import CustomDataConfig, DataConfig
from allspark.config_io import root_variable
from allspark.data.datasets import spec_for
from allspark.data.entries import (
    MASK_SUFFIXES,
    Entry,
    below,
    check_name,
    drop_repeats,
    folder_entries,
    image_files,
    make_exists_check,
    mask_tail,
    read_entries,
)
from allspark.data.image_files import UNSUPPORTED
from allspark.data.spec import DatasetSpec, Sample
from allspark.split_lists.manifest import SPLITS_ROOT, list_hash, load_manifest, published_name, split_roots
from allspark.utils.errors import UserError


@dataclass(frozen=True)
class Lists:
    """The samples of a run.

    Args:
        labeled, val: images with masks.
        unlabeled: images whose masks, if any, are not opened.
        hash: sha256 of the three `hashes`.
        name: of the split, or the list file that was given.
        hashes: labeled, unlabeled, val -> list_hash of the list.
        hidden: unlabeled images with a known mask; used only to measure pseudo-labels.
        left_out: what the folders of data.custom hold beside the samples, a line each.
    """

    labeled: tuple[Sample, ...]
    unlabeled: tuple[Sample, ...]
    val: tuple[Sample, ...]
    hash: str
    name: str
    hashes: Mapping[str, str] = field(default_factory=dict)
    hidden: tuple[Sample, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def split(self) -> dict[str, str]:
        """Name and hashes, as saved in a checkpoint."""
        return {"name": self.name, "sha256": self.hash, **self.hashes}


def hash_samples(samples: Sequence[Sample], data_root: Path) -> str:
    """list_hash of the paths relative to data_root, so that it does not depend on where the data is stored."""
    root = Path(data_root)
    return list_hash(
        (s.image.relative_to(root) if s.image.is_relative_to(root) else s.image).as_posix() for s in samples
    )


def resolve(data: DataConfig, splits_root: Path = SPLITS_ROOT, problems: list[str] | None = None) -> Lists:
    """Read the lists that the config names, and check that all files exist. Unlabeled samples never have a mask.

    A list given by path takes precedence over data.split, and a split over the folders of data.custom. The unlabeled
    list may be empty.

    Args:
        data: the data section of a recipe.
        splits_root: folder of the splits.
        problems: if given, errors in the val list are appended here, and files are not checked; for `check`, which
            reports all problems at once.

    Returns:
        The samples and what identifies them.

    Raises:
        UserError: a list or file is missing, or a line is wrong.
    """
    spec = spec_for(data)
    root = find_data(data, spec)
    custom = data.custom or CustomDataConfig(classes=spec.classes)
    labeled = train_entries(data, "labeled", spec, root, splits_root)
    if labeled is None and custom.labeled_images is not None:
        labeled = folder_entries(root, custom.labeled_images, custom.labeled_masks, custom.mask_suffix)
    if labeled is None:
        names = split_names(spec, splits_root)
        raise UserError(
            f"no labeled images: set data.split (--split NAME; splits of {spec.name}: {names}), "
            "data.labeled_id_path or data.custom.labeled_images"
        )
    unlabeled, from_folder = train_entries(data, "unlabeled", spec, root, splits_root), False
    if unlabeled is None and custom.unlabeled_images is not None:
        unlabeled = folder_entries(root, custom.unlabeled_images, None, custom.mask_suffix)
        from_folder = True
    val: list[Entry] = []
    try:
        val = val_entries(data, spec, root, splits_root)
        if not val:
            raise UserError("no evaluation images: the val list is empty; see data.val_id_path, data.custom.val_images")
    except UserError as error:
        if problems is None:
            raise
        problems.append(str(error))
    if not data.allow_overlap and (overlap := describe_overlap(labeled, val)):
        if problems is None:
            raise UserError(overlap)
        problems.append(overlap)
    if from_folder:  # which may hold the masks as well
        masks = {entry.sample.mask for entry in (*labeled, *val)}
        unlabeled = [entry for entry in unlabeled if entry.sample.image not in masks]
    name = data.labeled_id_path or data.split or "folders"
    lists = build_lists(labeled, unlabeled or [], val, name, root, spec, check=problems is None)
    return replace(lists, left_out=tuple(find_left_out(custom, root, lists)))


def describe_overlap(labeled: Sequence[Entry], val: Sequence[Entry]) -> str | None:
    """What is wrong if images are both labeled and val; None if no image is."""
    train = {os.path.abspath(entry.sample.image): entry.source for entry in labeled}  # ../data/a.png is data/a.png
    both = [entry for entry in val if os.path.abspath(entry.sample.image) in train]
    if not both:
        return None
    image, source = both[0].sample.image, train[os.path.abspath(both[0].sample.image)]
    return (
        f"{len(both)} of {len(val)} val images are also labeled images, such as {image} ({both[0].source} and "
        f"{source}): the score would be that of training images. Use lists that belong together (was --split "
        "NAME or data.split forgotten?), or set data.allow_overlap=true"
    )


def train_entries(data: DataConfig, kind: str, spec: DatasetSpec, root: Path, splits_root: Path) -> list[Entry] | None:
    """The entries of data.<kind>_id_path or else of data.split; None if neither is set."""
    given = getattr(data, f"{kind}_id_path")
    if given is not None:
        return read_entries(require_file(Path(os.path.expanduser(given)), f"data.{kind}_id_path"), root, spec.mask_path)
    if data.split is None:
        return None
    path = find_split(data, spec, splits_root) / f"{kind}.txt"
    key = f"data.split={data.split}"
    return read_entries(require_file(path, key, fetch_hint(spec.splits, data.split, kind)), root, spec.mask_path)


class NoValList(UserError):
    """Neither the recipe nor splits/ has a list of validation images."""


def val_entries(data: DataConfig, spec: DatasetSpec, root: Path, splits_root: Path = SPLITS_ROOT) -> list[Entry]:
    """The evaluation images: data.val_id_path, else data.custom.val_images, else splits/<dataset>/val.txt."""
    custom = data.custom
    if data.val_id_path is None and custom is not None and custom.val_images is not None:
        return folder_entries(root, custom.val_images, custom.val_masks, custom.mask_suffix)
    places = [folder / "val.txt" for folder in split_folders(spec, splits_root)]
    path = next((path for path in places if path.is_file()), places[0])
    path = path if data.val_id_path is None else Path(os.path.expanduser(data.val_id_path))
    if data.val_id_path is None and not path.is_file():
        remedy = fetch_hint(spec.splits, None, "val") or "Set data.val_id_path"
        if custom is not None:
            train = "" if custom.labeled_images else "--train LIST "
            remedy = "Set data.custom.val_images and val_masks, or draw them from your labeled images: "
            remedy += f"python -m allspark splits make --config FILE {train}--val 1_5 --write-recipe"
        raise NoValList(f"no validation images: {path} does not exist. {remedy}")
    return drop_repeats(read_entries(require_file(path, "data.val_id_path"), root, spec.mask_path))


def build_lists(
    labeled: list[Entry],
    unlabeled: list[Entry],
    val: list[Entry],
    name: str,
    root: Path,
    spec: DatasetSpec,
    check: bool,
) -> Lists:
    if not labeled:
        raise UserError(f"no labeled images: the list or folder of {name} is empty; add images, or use another")
    for entry in (*labeled, *val):
        if entry.sample.mask is None:
            separated = any(each in str(entry.sample.image) for each in ",;")
            remedy = (
                "separate image and mask by a blank or tab" if separated else "add it to the list or to data.custom"
            )
            raise UserError(f"{entry.source}: {entry.sample.image} has no mask; {remedy}")
    masks = {entry.sample.mask for entry in (*labeled, *val)}
    for entry in (*labeled, *unlabeled, *val):
        if entry.sample.image in masks:
            raise UserError(f"{entry.source}: {entry.sample.image} is listed as an image and as a mask; correct one")
    hidden = find_hidden(labeled, unlabeled)
    unlabeled = [Entry(Sample(entry.sample.image), entry.source) for entry in unlabeled]
    if check:
        check_files((*labeled, *unlabeled, *val), prepare_hint(spec))
    lists = {"labeled": labeled, "unlabeled": unlabeled, "val": val}
    parts = {kind: tuple(entry.sample for entry in entries) for kind, entries in lists.items()}
    hashes = {kind: hash_samples(part, root) for kind, part in parts.items()}
    return Lists(**parts, hash=list_hash(hashes.values()), name=name, hashes=hashes, hidden=hidden)


def find_left_out(custom: CustomDataConfig, root: Path, lists: Lists) -> Iterator[str]:
    """What the folders of data.custom hold that is no sample: other suffixes, images of no list, masks of no image."""
    samples = (*lists.labeled, *lists.unlabeled, *lists.val, *lists.hidden)
    used = {os.path.abspath(path) for sample in samples for path in (sample.image, sample.mask) if path is not None}
    unlabeled = custom.unlabeled_images or ()
    names = (custom.labeled_images, *([unlabeled] if isinstance(unlabeled, str) else unlabeled), custom.val_images)
    folders = list(dict.fromkeys(below(root, name) for name in names if name is not None))
    found = {folder: image_files(folder) for folder in folders if folder.is_dir()}
    for folder in folders:
        if folder not in found:
            yield f"{folder}: no such folder, the lists are used; correct data.custom"
    for folder, (images, others) in found.items():
        if others:
            yield describe_others(folder, others)
        if unused := [path for path in images if os.path.abspath(path) not in used]:
            yield f"{folder}: {len(unused)} of {len(images)} images are in no list, such as {unused[0]}"
    pairs = ((custom.labeled_images, custom.labeled_masks), (custom.val_images, custom.val_masks))
    images_of: dict[Path, list[Path]] = {}  # folder of masks -> folders of their images
    for images, masks in pairs:
        if images is not None and masks is not None and below(root, images) in found:
            images_of.setdefault(below(root, masks), []).append(below(root, images))
    for place, folders in images_of.items():
        if place in folders or not place.is_dir():
            continue
        tail = mask_tail(custom.mask_suffix)
        stems = {f"{path.relative_to(each).with_suffix('')}{tail}" for each in folders for path in found[each][0]}
        files = image_files(place)[0]
        alone = [path for path in files if str(path.relative_to(place).with_suffix("")) not in stems]
        if alone:
            yield f"{place}: {len(alone)} masks have no image, such as {alone[0]}"


def describe_others(folder: Path, others: Sequence[Path]) -> str:
    """'images: 3 files without an image suffix are left out (.heic: 2, none: 1), such as images/a.heic'."""
    kinds = Counter(path.suffix or "none" for path in others)
    text = ", ".join(f"{suffix}: {count}" for suffix, count in kinds.most_common(5))
    example = others[0]
    photos = any(path.suffix.lower() in UNSUPPORTED for path in others)
    remedy = "; convert photos to JPEG or PNG" if photos else ""
    return f"{folder}: {len(others)} files without an image suffix are left out ({text}), such as {example}{remedy}"


def find_hidden(labeled: list[Entry], unlabeled: list[Entry]) -> tuple[Sample, ...]:
    """The unlabeled samples whose list line names an existing mask, except images that are also in the labeled list."""
    known, exists = {entry.sample.image for entry in labeled}, make_exists_check()
    samples = (entry.sample for entry in unlabeled)
    return tuple(s for s in samples if s.mask is not None and s.image not in known and exists(s.mask))


def describe_lists(lists: Lists) -> str:
    """A log line: hashes and origin of the lists."""

    def describe(kind: str) -> str:
        sha256 = lists.hashes[kind]
        name = published_name(sha256)
        return f"{kind} list sha256 {sha256[:12]} ({f'= {name}' if name else 'not published'})"

    return f"split {lists.name}: {describe('labeled')}, {describe('val')}"


def find_data(data: DataConfig, spec: DatasetSpec, create: bool = True) -> Path:
    """The data root.

    Args:
        create: make a data set that needs no download there; not if the path may come from a foreign checkpoint.
    """
    root = check_name(Path(os.path.expanduser(data.data_root)))
    if spec.prepare is not None and create:
        if distributed.rank() == 0:
            spec.prepare(root)
        distributed.barrier()
    if not root.is_dir():
        remedy = f"set {root_variable(spec.name)}=DIR, or {'correct it' if create else 'give --data-root'}"
        raise UserError(f"data.data_root: {root} is not a folder; {remedy}{prepare_hint(spec)}")
    return root


def prepare_hint(spec: DatasetSpec) -> str:
    """How to create a missing data set, as the end of a message; '' for one's own."""
    if spec.is_custom or spec.prepare is not None:
        return ""
    return f". `python -m allspark prepare {spec.splits} --download` creates it, or says which archives it needs"


def find_split(data: DataConfig, spec: DatasetSpec, splits_root: Path) -> Path:
    folders = split_folders(spec, splits_root)
    for folder in folders:
        if data.split and (folder / data.split / "labeled.txt").is_file():
            return folder / data.split
    folder = folders[0]
    who = f"--dataset {spec.name}" if data.custom is None else "--config FILE"
    train = "" if data.custom is not None and data.custom.labeled_images else "--train LIST "
    make = f"splits make {who} {train}--sizes {data.split} --out {folder}"
    raise UserError(
        f"data.split: {folder / str(data.split) / 'labeled.txt'} does not exist; splits of {spec.name}: "
        f"{split_names(spec, splits_root)}. "
        f"{fetch_hint(spec.splits, data.split, 'labeled') or f'Create one: python -m allspark {make}'}"
    )


def split_folders(spec: DatasetSpec, splits_root: Path) -> list[Path]:
    """The folders that may have splits of the data set."""
    return [root / spec.splits for root in split_roots(splits_root)]


def split_names(spec: DatasetSpec, splits_root: Path) -> str:
    folders = split_folders(spec, splits_root)
    names = {path.parent.name for folder in folders for path in folder.glob("*/labeled.txt")}
    return ", ".join(sorted(names)) or "none"


def fetch_hint(folder: str, split: str | None, kind: str) -> str:
    """The command that fetches a published list, '' if it is not published; split None: the data set's own lists."""
    found = load_manifest().find("/".join(filter(None, (folder, split, kind))))
    if found is None or not found[0].places:
        return ""
    command = f"It is published; fetch it: python -m allspark splits fetch --dataset {folder} --split {split or kind}"
    build = f", or derive it from the data: python -m allspark splits build --dataset {folder}"
    return command + (build if kind == "unlabeled" else "")


def require_file(path: Path, key: str, remedy: str = "") -> Path:
    if path.is_dir():
        raise UserError(f"{path}: is a folder, and {key} takes a list: a file with one image per line")
    if not path.is_file():
        raise UserError(f"{path}: this list does not exist; it is set by {key}{'. ' if remedy else ''}{remedy}")
    return path


def suggest_file(path: Path, is_mask: bool) -> str:
    """For a missing file: one that may be meant, or what is wrong with the name, as the end of a message."""
    if "\\" in str(path) and os.sep == "/":
        return "; write / instead of \\ between folders"
    try:
        names = sorted(os.listdir(path.parent))
    except (OSError, ValueError):
        return ""
    for name in names:  # macOS writes an accent as a character of its own (NFD), others do not (NFC)
        if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", path.name) != "":
            return f"; found {name}, which looks the same in other Unicode characters (NFC and NFD): rename one"
    similar = [name for name in names if Path(name).stem.startswith(path.stem)] if is_mask else []
    if not similar:
        return ""
    same = [name for name in similar if Path(name).stem == path.stem]
    if same and Path(same[0]).suffix.lower() not in MASK_SUFFIXES:
        return f"; found {same[0]}, whose format may have changed the values: save masks as PNG"
    per_class = [name for name in similar if name.startswith(f"{path.stem}_")]
    if not same and len(per_class) > 1:
        found = ", ".join(per_class[:3])
        return f"; found {found}: set data.custom.mask_suffix, or join them with `python -m allspark masks per-class`"
    return f"; found {(same or similar)[0]}: a mask must have its image's name and {', '.join(MASK_SUFFIXES)}"


def check_files(entries: Sequence[Entry], hint: str = "") -> None:
    """Raise UserError unless all files exist; `hint` ends the message if none does."""
    exists = make_exists_check()
    paths = [(path, entry) for entry in entries for path in (entry.sample.image, entry.sample.mask) if path]
    missing = [(path, entry) for path, entry in paths if not exists(path)]
    if missing:
        path, entry = missing[0]
        raise UserError(
            f"{entry.source}: {path} does not exist ({len(missing)} of {len(paths)} files are missing)"
            f"{suggest_file(path, is_mask=path == entry.sample.mask)}; add it, or correct the list, data.custom or "
            "data_root"
            f"{hint if len(missing) == len(paths) else ''}"
        )
