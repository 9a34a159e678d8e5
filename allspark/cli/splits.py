"""python -m allspark splits make | list: seeded, nested, class-balanced lists, and what lists there are."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from allspark.config import DataConfig, load_config, root_variable
from allspark.data import DATASETS, spec_for
from allspark.data.draw import make_splits, parse_sizes, write_splits
from allspark.data.splits import (
    SPLITS_ROOT,
    existing,
    find_data,
    folder_entries,
    list_hash,
    read_entries,
    read_list,
    samples_hash,
)
from allspark.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("make", help="draw labeled and unlabeled lists from a full train list")
    whose = make.add_mutually_exclusive_group(required=True)
    whose.add_argument("--dataset", help=f"one of {', '.join(DATASETS)}")
    whose.add_argument("--config", help="the recipe that describes a data set of one's own")
    make.add_argument("--data-root", help="default: the recipe's, else ALLSPARK_DATA_<DATASET>, else data/<dataset>")
    make.add_argument("--train", required=True, help="list of `image mask` lines; with --masks a folder of images")
    make.add_argument("--masks", help="folder of masks with the images' names; both folders are below the data root")
    make.add_argument("--sizes", required=True, help="fractions or counts: 1_4,1_8,1_16 or 16,32")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--out", type=Path, help="default: splits/<dataset>")
    make.add_argument("--force", action="store_true", help="overwrite lists that are there")
    show = verbs.add_parser("list", help="the splits that are there, with counts and hashes")
    show.add_argument("--dataset", help="only this one")


def main(args: argparse.Namespace) -> None:
    {"make": make, "list": show}[args.verb](args)


def make(args: argparse.Namespace) -> None:
    if args.seed < 0:
        raise UserError(f"--seed: {args.seed}; give 0 or more")
    data = data_config(args)
    spec = spec_for(data)
    root = find_data(data, spec)
    if args.masks is None:
        entries = read_entries(existing(Path(args.train), "--train"), root, spec.mask_path)
    else:
        entries = folder_entries(root, args.train, args.masks)
    splits = make_splits(entries, spec, parse_sizes(args.sizes, len(entries)), args.seed)
    out = args.out or SPLITS_ROOT / spec.splits
    write_splits(splits, root, out, args.force)
    for name, (labeled, unlabeled) in splits.items():
        digest = samples_hash([entry.sample for entry in labeled], root)
        print(f"{out / name}: {len(labeled)} labeled, {len(unlabeled)} unlabeled, sha256 {digest[:12]}")


def data_config(args: argparse.Namespace) -> DataConfig:
    """The data section of --config, or the least one that names --dataset; no crop is ever taken here."""
    if args.config is not None:
        data = load_config(args.config).data
        return data if args.data_root is None else replace(data, data_root=args.data_root)
    root = args.data_root or os.environ.get(root_variable(args.dataset)) or f"data/{args.dataset}"
    return DataConfig(dataset=args.dataset, data_root=root, crop_size=0)


def show(args: argparse.Namespace, splits_root: Path = SPLITS_ROOT) -> None:
    """A line per list: count and sha256 of its normal form, the same whatever its line ends and mask column."""
    lists = sorted(splits_root.glob(f"{args.dataset or '*'}/**/*.txt"))
    if not lists:
        raise UserError(f"{splits_root}: no lists{f' of {args.dataset}' if args.dataset else ''}; see `splits make`")
    for path in lists:
        images = [sample.image.as_posix() for sample in read_list(path, Path())]
        print(
            f"{path.relative_to(splits_root).with_suffix('').as_posix():40} {len(images):7}  {list_hash(images)[:12]}"
        )
