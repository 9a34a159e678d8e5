"""Evaluate a checkpoint: per-class IoU table, JSON, pictures. Plain python, torchrun or srun."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from allspark import distributed
from allspark.cli.loading import Loaded, load_for_inference
from allspark.config import Recipe
from allspark.data import splits
from allspark.data.base import DatasetSpec, Sample, SegmentationDataset
from allspark.errors import UserError, run_main
from allspark.evaluation.evaluate import evaluate
from allspark.evaluation.inference import MODES, Inference, inference_for
from allspark.evaluation.metrics import Scores, finite, format_table
from allspark.evaluation.pictures import colorize, overlay, save_index_png, save_rgb


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    with distributed.process_group(args.device) as device:
        loaded = load_for_inference(args.checkpoint, device)
        recipe = recipe_for(loaded, args)
        spec = loaded.spec
        mode = args.mode or recipe.evaluation.mode
        inference = inference_for(
            spec, recipe.data.crop_size, mode, recipe.evaluation.window, scales=args.scales, flip=args.flip
        )
        dataset = NamedImages(val_samples(recipe, spec, args.list), spec)
        prepare_outputs(args, dataset)
        scores = evaluate(
            loaded.model,
            dataset,
            spec,
            device,
            inference,
            batch_size=args.batch_size,
            num_workers=recipe.data.num_workers,
            progress=True,
            save=Pictures(args.save_dir, spec) if args.save_dir else None,
            absent_as_zero=args.absent_as_zero,
        )
        if math.isnan(scores.pixel_accuracy):
            raise UserError(
                f"{args.list or 'val'}: no pixel has a class, all masks hold {spec.ignore_index}; use others"
            )
        if distributed.is_main():
            print(format_table(scores, spec.classes))
            if args.json is not None:
                write_json(summary(scores, spec, inference, loaded), args.json)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE")
    parser.add_argument("--data-root", metavar="DIR", help="where the data lies, if not where the recipe says")
    parser.add_argument("--dataset", help="a check: the data set that the checkpoint must be of")
    parser.add_argument("--mode", choices=MODES, help="default: the recipe's, else the data set's own")
    parser.add_argument("--scales", type=scale_list, default=(1.0,), metavar="S,S", help="such as 0.75,1,1.25")
    parser.add_argument("--flip", action="store_true", help="average with the mirrored image")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores here")
    parser.add_argument("--save-dir", type=Path, metavar="DIR", help="write index, colour and overlay PNGs here")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="images of equal size go together")
    parser.add_argument("--list", type=Path, metavar="FILE", help="evaluate these `image mask` lines instead of val")
    parser.add_argument("--absent-as-zero", action="store_true", help="a class that is nowhere counts as IoU 0")
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)  # from launchers; not needed
    return parser.parse_args(argv)


def scale_list(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of factors such as 0.75,1,1.25") from None


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a count of 1 or more")
    return int(text)


def recipe_for(loaded: Loaded, args: argparse.Namespace) -> Recipe:
    """The checkpoint's recipe, with --data-root put in."""
    recipe = loaded.recipe
    if args.dataset not in (None, recipe.data.dataset):
        raise UserError(
            f"--dataset {args.dataset}: {args.checkpoint} was trained on {recipe.data.dataset} and knows its recipe; "
            "leave --dataset out, and name other images with --data-root and --list"
        )
    return recipe if args.data_root is None else replace(recipe, data=replace(recipe.data, data_root=args.data_root))


def val_samples(recipe: Recipe, spec: DatasetSpec, given: Path | None) -> Sequence[Sample]:
    """The samples of --list, else the recipe's val; every file known to exist. No list of training images is read."""
    root = splits.find_data(recipe.data, spec)
    if given is not None:
        entries = splits.read_entries(splits.existing(given, "--list"), root, spec.mask_path)
    else:
        entries = splits.val_entries(recipe.data, spec, root)
    for entry in entries:
        if entry.sample.mask is None:
            raise UserError(f"{entry.source}: {entry.sample.image} has no mask beside it; write `image mask`")
    splits.check_files(entries)
    return [entry.sample for entry in entries]


class NamedImages(SegmentationDataset):
    """The samples under names that no two share: the stem, or where stems collide the path below the common folder."""

    def __init__(self, samples: Sequence[Sample], spec: DatasetSpec) -> None:
        super().__init__(samples, spec)
        self.names = [sample.image.stem for sample in samples]
        if len(set(self.names)) < len(self.names):
            images = [Path(os.path.abspath(sample.image)) for sample in samples]  # no .. in a name of a file we write
            top = os.path.commonpath([image.parent for image in images])
            self.names = [image.relative_to(top).with_suffix("").as_posix() for image in images]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        image, mask, _ = super().__getitem__(index)
        return image, mask, self.names[index]


class Pictures:
    """Writes <name>.png (class indices with palette), <name>_color.png and <name>_overlay.png."""

    def __init__(self, folder: Path, spec: DatasetSpec) -> None:
        self.folder, self.palette = folder, spec.palette

    def __call__(self, name: str, image: Tensor, mask: Tensor, prediction: Tensor) -> None:
        save_index_png(prediction, self.palette, self.folder / f"{name}.png")
        save_rgb(colorize(prediction, self.palette), self.folder / f"{name}_color.png")
        save_rgb(overlay(image, prediction, self.palette), self.folder / f"{name}_overlay.png")


def prepare_outputs(args: argparse.Namespace, dataset: NamedImages) -> None:
    """Make the folders before the work, and refuse to write pictures over the data."""
    try:
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
        if args.save_dir is not None:
            args.save_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename}: the folder cannot be made ({error.strerror}); choose another") from None
    if args.json is not None and args.json.is_dir():
        raise UserError(f"--json {args.json} is a folder; name a file in it")
    if args.save_dir is not None:
        if twice := [name for name, count in Counter(dataset.names).items() if count > 1]:
            raise UserError(f"--save-dir: two images of the list have the name {twice[0]}; each may stand there once")
        inputs = {path.resolve() for sample in dataset.samples for path in (sample.image, sample.mask)}
        for name in dataset.names:
            if (args.save_dir / f"{name}.png").resolve() in inputs:
                raise UserError(f"--save-dir {args.save_dir}: {name}.png is part of the data; choose another folder")


def summary(scores: Scores, spec: DatasetSpec, inference: Inference, loaded: Loaded) -> dict:
    """What --json holds; `split` is the one that the checkpoint was trained on, null for an imported one."""
    split = loaded.meta.get("split") or {}
    return {
        "miou": finite(scores.miou),
        "iou": scores.by_class(spec.classes),
        "pixel_accuracy": finite(scores.pixel_accuracy),
        "num_images": scores.num_images,
        "mode": inference.mode,
        "split": {"name": split.get("name"), "sha256": split.get("sha256")},
        "checkpoint_sha256": loaded.meta["sha256"],
    }


def write_json(result: dict, path: Path) -> None:
    """The whole file or none: written beside and renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(run_main(main))
