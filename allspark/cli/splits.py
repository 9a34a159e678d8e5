"""allspark splits list | verify | fetch | build | make: published lists and lists of your own."""

from __future__ import annotations

import argparse
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath

import yaml

from allspark.config import DataConfig
from allspark.config_io import load_config, root_variable
from allspark.data.datasets import DATASETS, spec_for
from allspark.data.entries import Entry, drop_repeats, folder_entries, make_exists_check, read_entries, read_list
from allspark.data.spec import DatasetSpec, Sample
from allspark.data.splits import NoValList, find_data, hash_samples, require_file, val_entries
from allspark.split_lists import published
from allspark.split_lists.layouts import get_layout
from allspark.split_lists.make_splits import group_by_name, hold_out, make_splits, parse_sizes, write_splits
from allspark.split_lists.manifest import SPLITS_ROOT, list_hash, load_manifest, name_clash, split_roots
from allspark.utils.atomic import write_text
from allspark.utils.errors import UserError
from allspark.utils.safe_yaml import parse_yaml


def main(args: argparse.Namespace) -> None:
    verbs = {
        "make": make,
        "list": show,
        "verify": published.verify_lists,
        "fetch": published.fetch_lists,
        "build": build,
    }
    verbs[args.verb](args)


def build(args: argparse.Namespace) -> None:
    get_layout(published.folder_of(args.dataset))  # raises for a data set without its own lists
    root = data_root(args)
    if not root.is_dir():
        raise UserError(f"--data-root {root} is not a folder; correct it or set {root_variable(args.dataset)}=DIR")
    published.build_lists(args, root)


def make(args: argparse.Namespace) -> None:
    if args.write_recipe and args.config is None:
        raise UserError("--write-recipe: needs --config FILE; with --dataset train with --split NAME")
    data = data_config(args)
    spec = spec_for(data)
    root = find_data(data, spec)
    entries, no_mask = train_images(args, data, spec, root)
    existing = [] if args.val is not None or data.allow_overlap else existing_val(data, spec, root)
    entries, no_mask = without(existing, entries), without(existing, no_mask)
    val, entries, no_mask = draw_val(args, entries, no_mask, root, existing)
    splits = make_splits(entries, spec, parse_sizes(args.sizes, len(entries)), args.seed, no_mask)
    out = args.out or SPLITS_ROOT / spec.splits
    write_splits(splits, root, out, args.force, val)
    if no_mask:
        print(f"{len(no_mask)} images have no mask, such as {no_mask[0].sample.image}: unlabeled in every split")
    if val is not None:
        digest = hash_samples([entry.sample for entry in val], root)
        print(f"{out / 'val.txt'}: {len(val)} images to evaluate on, sha256 {digest[:12]}")
    for name, (labeled, unlabeled) in splits.items():
        digest = hash_samples([entry.sample for entry in labeled], root)
        print(f"{out / name}: {len(labeled)} labeled, {len(unlabeled)} unlabeled, sha256 {digest[:12]}")
    use_lists(args, data, out, next(iter(splits)), val is not None)


def train_images(
    args: argparse.Namespace, data: DataConfig, spec: DatasetSpec, root: Path
) -> tuple[list[Entry], list[Entry]]:
    """The images to draw from, and those without a mask; also those of data.custom.unlabeled_images."""
    custom = data.custom
    train, masks = args.train, args.masks
    if train is None:
        if masks is not None:
            raise UserError(f"--masks {masks}: belongs to --train; without it data.custom.labeled_masks are taken")
        if custom is None or custom.labeled_images is None:
            raise UserError("--train: give a list or a folder; only with data.custom.labeled_images it may be omitted")
        train, masks = custom.labeled_images, custom.labeled_masks
    if masks is None:
        if Path(train).is_dir():
            raise UserError(f"--train {train}: is a folder; add the folder of its masks, --masks, or give a list")
        entries, no_mask = drop_repeats(read_entries(require_file(Path(train), "--train"), root, spec.mask_path)), []
    else:
        suffix = ".png" if custom is None else custom.mask_suffix
        entries, no_mask = split_by_mask(folder_entries(root, train, masks, suffix))
    if custom is not None and custom.unlabeled_images is not None:
        known = {path for entry in (*entries, *no_mask) for path in (entry.sample.image, entry.sample.mask)}
        others = folder_entries(root, custom.unlabeled_images, None, custom.mask_suffix)
        no_mask += [entry for entry in others if entry.sample.image not in known]
    return entries, no_mask


def existing_val(data: DataConfig, spec: DatasetSpec, root: Path) -> list[Entry]:
    """The recipe's validation images, if it has some already."""
    try:
        return val_entries(data, spec, root)
    except NoValList:
        return []


def without(val: list[Entry], entries: list[Entry]) -> list[Entry]:
    """The entries that are not in the val list."""
    known = {entry.sample.image for entry in val}
    kept = [entry for entry in entries if entry.sample.image not in known]
    if len(kept) < len(entries):
        print(f"{len(entries) - len(kept)} images are in the val list and left out; --val SIZE draws another one")
    return kept


def draw_val(
    args: argparse.Namespace, entries: list[Entry], no_mask: list[Entry], root: Path, existing: list[Entry]
) -> tuple[list[Entry] | None, list[Entry], list[Entry]]:
    """The images of --val, None without it, and the rest of both lists, in which no group of --group is left.

    Without --val, images in a group of the existing val list are left out.
    """
    if args.val is None:
        if args.group is None:
            return None, entries, no_mask
        if not existing:
            raise UserError("--group: keeps images together when some are drawn for evaluation; add --val, such as 1_5")
        group = group_by_name(args.group, root)
        groups = {group(entry) for entry in existing}
        kept = [[entry for entry in each if group(entry) not in groups] for each in (entries, no_mask)]
        left_out = len(entries) + len(no_mask) - sum(map(len, kept))
        print(f"{left_out} images of the {len(groups)} groups in the val list are left out")
        return None, *kept
    count, *others = parse_sizes(args.val, len(entries), "--val").values()
    if others:
        raise UserError(f"--val {args.val}: give one size, such as 1_5")
    if args.group is None:
        return *hold_out(entries, count, args.seed), no_mask
    group = group_by_name(args.group, root)
    warn_of_folders(args.group, {group(entry) for entry in entries}, {group(entry) for entry in no_mask})
    val, entries = hold_out(entries, count, args.seed, group)
    groups = {group(entry) for entry in val}
    kept = [entry for entry in no_mask if group(entry) not in groups]
    left_out = len(no_mask) - len(kept)
    print(f"{len(groups)} groups to evaluate on, such as {min(groups)}; {left_out} images without a mask are left out")
    return val, entries, kept


def warn_of_folders(pattern: str, groups: set[str], others: set[str]) -> None:
    """Print a warning if groups of images with and without a mask differ in their folders alone."""
    names = {PurePath(group).name: group for group in groups}
    same = sorted(group for group in others if PurePath(group).name in names)
    if same and not groups & others:
        print(
            f"WARNING: --group '{pattern}': {names[PurePath(same[0]).name]} and {same[0]} are two groups. If they are "
            "of one video, its images without a mask would be trained on and the others evaluated on: use a pattern "
            "without the folder, such as '([^/]*)_[0-9]+[.]'"
        )


def use_lists(args: argparse.Namespace, data: DataConfig, out: Path, split: str, val: bool) -> None:
    """Say what makes a run use the lists, and with --write-recipe put it into the recipe."""
    usual = out == SPLITS_ROOT / spec_for(data).splits and data.labeled_id_path is data.unlabeled_id_path is None
    lists = {f"{kind}_id_path": str(out / split / f"{kind}.txt") for kind in ("labeled", "unlabeled")}
    keys = {"split": split} if usual else lists
    if val and not (usual and data.val_id_path is None and (data.custom is None or data.custom.val_images is None)):
        keys["val_id_path"] = str(out / "val.txt")
    if args.write_recipe:
        set_data_keys(Path(args.config), keys)
        print(f"{args.config}: now uses these lists")
        return
    lines = yaml.safe_dump({"data": keys}, sort_keys=False, allow_unicode=True)
    print(f"To use them, put this into the recipe{', or add --write-recipe' if args.config else ''}:\n{lines}", end="")


def set_data_keys(path: Path, keys: Mapping[str, str]) -> None:
    """Set keys of the section `data` in a YAML file, all else, comments included, as it is.

    Raises:
        UserError: the file is not laid out so that this is possible, or cannot be written.
    """
    text = path.read_text(encoding="utf-8")
    before = parse_yaml(text)
    head = re.search(r"^data:[ ]*(#.*)?\n(?:[ ]*(#.*)?\n)*?([ ]+)\S", text, re.MULTILINE)
    new = text
    if head is not None:
        start, indent = text.index("\n", head.start()) + 1, head[3]
        own = re.compile(rf"^{indent}({'|'.join(keys)}):.*\n", re.MULTILINE)
        added = yaml.safe_dump(dict(keys), sort_keys=False, allow_unicode=True, width=10**6)
        new = text[:start] + "".join(indent + line for line in added.splitlines(True)) + own.sub("", text[start:])
    if parse_yaml(new) != {**before, "data": {**before["data"], **keys}}:
        lines = "; ".join(f"{key}: '{value}'" for key, value in keys.items())
        raise UserError(f"--write-recipe: {path} cannot be edited; write below data: {lines}")
    write_text(path, new, "make it writable")


def split_by_mask(entries: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    """The entries with an existing mask and those without; if none has one, all are returned as if they had."""
    exists = make_exists_check()
    masked = [entry for entry in entries if exists(entry.sample.mask)]
    no_mask = [Entry(Sample(entry.sample.image), entry.source) for entry in entries if not exists(entry.sample.mask)]
    return (masked, no_mask) if masked else (entries, [])


def data_config(args: argparse.Namespace) -> DataConfig:
    """The data section of --config, or a minimal one for --dataset; its crop size is not used."""
    if args.config is not None:
        data = load_config(args.config).data
        return data if args.data_root is None else replace(data, data_root=args.data_root)
    return DataConfig(dataset=args.dataset, data_root=str(data_root(args)), crop_size=0)


def data_root(args: argparse.Namespace) -> Path:
    root = args.data_root or os.environ.get(root_variable(args.dataset)) or f"data/{args.dataset}"
    return Path(os.path.expanduser(root))


def show(args: argparse.Namespace, splits_root: Path = SPLITS_ROOT) -> None:
    """Print each list with its count and the sha256 of its images, the same for any line ends and mask column.

    Published splits, recognized by their hash, are followed by origin, users and known problems. At the end stands
    what can be fetched.
    """
    only = DATASETS[args.dataset].splits if args.dataset in DATASETS else args.dataset
    hashes: dict[str, dict[str, str]] = defaultdict(dict)  # split -> kind -> sha256
    lines: dict[str, list[str]] = defaultdict(list)
    pattern, files = f"{only or '*'}/**/*.txt", {}
    for root in reversed(split_roots(splits_root)):  # an earlier root takes precedence
        files |= {path.relative_to(root).with_suffix(""): path for path in root.glob(pattern)}
    for name, path in sorted(files.items()):
        images = [sample.image.as_posix() for sample in read_list(path, Path())]
        split = name.parent.as_posix()
        hashes[split][name.name] = list_hash(images)
        lines[split].append(f"{name.as_posix():40} {len(images):7}  {list_hash(images)[:12]}")
    for split in lines:
        print("\n".join((*lines[split], *describe_split(split, hashes[split]))))
    fetchable = [
        split.name if "/" in split.name else split.list_name(kind)
        for split, kind, facts in load_manifest().all_lists(only)
        if split.places and not facts.derived and split.name not in lines
    ]
    if fetchable:
        print(f"published, available with `splits fetch`: {', '.join(dict.fromkeys(fetchable))}")
    elif not lines:
        known = ", ".join(sorted(path.name for path in splits_root.glob("*") if path.is_dir())) or "none"
        raise UserError(f"{splits_root}: no lists{f' of {only}' if only else ''}; there are {known}; see `splits make`")


def describe_split(name: str, hashes: dict[str, str]) -> list[str]:
    """Indented lines: origin and known problems of the published split with these hashes; none for other lists."""
    lines = []
    found = [load_manifest().by_hash(sha256) for sha256 in hashes.values()]
    for split in {split.name: split for split, _ in filter(None, found)}.values():
        origin = "; ".join(f"{place.source} {place.path} ({place.source.license})" for place in split.places)
        lines.append(f"= {split.name} of {origin or split.owner}")
        lines += [f"used by {user}" for user in split.used_by]
        lines += [split.note] if split.note else []
        lines += [f"trap: {trap}" for trap in split.traps]
    folder, _, split_name = name.partition("/")
    if "labeled" in hashes and (warning := name_clash(split_name, hashes["labeled"], folder)):
        lines.append(f"WARNING: {warning}")
    return [f"    {line}" for line in lines]
