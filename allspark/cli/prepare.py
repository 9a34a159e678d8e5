"""python -m allspark prepare <dataset>: official archives -> the layout that the configs expect."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from allspark.config_io import root_variable
from allspark.data.base import usable_cores
from allspark.prepare import PLANS
from allspark.prepare.coco import OVERLAP
from allspark.prepare.plan import Options, Plan, prepare
from allspark.utils.download import fetch
from allspark.utils.errors import UserError

NOTES = {
    "voc": "The masks of VOC and SBD together: SegmentationClassAug, train_aug of 10,582 images.",
    "cityscapes": "Of all that gtFine holds the labelIds are taken, and labelTrainIds made from them.",
    "coco": OVERLAP,
    "camvid": "Either the SegNet tutorial, 11 classes at 480 x 360, or both original archives: their frames halved, "
    "their labels of 32 colours grouped to the same classes (allspark/data/datasets/camvid.py says how, and by whom).",
    "ade20k": "The 150 classes of the Scene Parsing Challenge 2016, images and masks as they are; not the full ADE20K.",
}
MORE = "Goes on where a stopped run ended; checks the counts; overwrites nothing without --force."
MOST_WORKERS = 16  # by default; more wait for the disk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    datasets = parser.add_subparsers(dest="verb", required=True, metavar="dataset")
    for name, plan in PLANS.items():
        archives = ", ".join(archive.name for archive in plan.archives)
        aliases = {plan.dataset} - {name}  # what --dataset calls it
        verb = datasets.add_parser(name, aliases=aliases, help=f"from {archives}", description=f"{NOTES[name]} {MORE}")
        verb.set_defaults(plan=plan)
        verb.add_argument(
            "--from",
            dest="sources",
            type=Path,
            nargs="+",
            metavar="PATH",
            help=f"{archives}; the folder that has them, or what they unpack to (default: the folder --out)",
        )
        verb.add_argument(
            "--out", type=Path, metavar="DIR", help=f"default: {root_variable(plan.dataset)}, else data/{plan.dataset}"
        )
        verb.add_argument("--workers", type=int, help="processes (default: one per core, 16 at most)", metavar="N")
        verb.add_argument("--force", action="store_true", help="make files again that are there")
        verb.add_argument(
            "--allow-partial", action="store_true", help="prepare what is there, be it a part of the data set"
        )
        verb.add_argument(
            "--ignore-unknown", action="store_true", help="labels of no known class become ignored pixels"
        )
        if any(archive.urls for archive in plan.archives):
            verb.add_argument("--download", action="store_true", help="bring the archives to --out first, verified")


def main(args: argparse.Namespace) -> None:
    plan = args.plan
    out = args.out or Path(os.environ.get(root_variable(plan.dataset)) or f"data/{plan.dataset}")
    sources = list(args.sources or ())
    if getattr(args, "download", False):
        sources += download(plan, out)
    if not sources and not out.is_dir():
        archives = ", ".join(f"{archive.name} ({archive.origin})" for archive in plan.archives)
        raise UserError(f"{out}: nothing there to prepare from; put {archives} there or name them with --from")
    options = Options(
        tuple(sources or [out]), out, workers(args.workers), args.force, args.allow_partial, args.ignore_unknown
    )
    try:
        prepare(plan, options)
    except KeyboardInterrupt:
        raise UserError(f"{out}: stopped; the same command goes on from here") from None


def download(plan: Plan, out: Path) -> list[Path]:
    return [fetch(archive.urls, out / archive.name, digest=archive.digest) for archive in plan.archives]


def workers(asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise UserError(f"--workers: {asked}; give 1 or more")
    return asked or min(usable_cores(), MOST_WORKERS)
