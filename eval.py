"""Evaluate a checkpoint: IoU per class, JSON, predictions. Runs with python, torchrun or srun."""

from __future__ import annotations

import sys

if __name__ == "__main__":  # before anything large is imported: answer --help and wrong arguments
    from allspark.utils.environment import check_environment

    check_environment()
    from allspark.arguments import parse

    parse("eval", sys.argv[1:])

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from allspark import distributed, launch
from allspark import inference as loading
from allspark.arguments import parse
from allspark.config import Recipe
from allspark.data import splits
from allspark.data.entries import drop_repeats, read_entries, read_list
from allspark.data.image_io import read_image
from allspark.data.spec import DatasetSpec, Sample
from allspark.data.transforms import to_tensor
from allspark.data.worker_pool import evaluation_workers
from allspark.evaluation.dataset import SegmentationDataset
from allspark.evaluation.evaluate import evaluate
from allspark.evaluation.metrics import EvalResult, format_table, nan_to_none
from allspark.evaluation.sliding_window import Inference
from allspark.inference import InferenceModel
from allspark.split_lists.manifest import name_clash
from allspark.utils.atomic import write_text
from allspark.utils.errors import UserError, run_main
from allspark.visualization.pictures import check_picture, plot_confusion
from allspark.visualization.prediction_writer import PredictionWriter, unique_names


def main(argv: Sequence[str]) -> None:
    args = parse("eval", argv)
    with launch.process_group(args.device) as device:
        loaded = loading.load_for_inference(args.checkpoint, device, args.dataset, args.best)
        recipe, spec = recipe_for(loaded, args), loaded.spec
        inference = loaded.inference(args.mode, windows=args.windows, scales=args.scales, flip=args.flip)
        root = splits.find_data(recipe.data, spec, create=args.data_root is not None)
        dataset = NamedImages(val_samples(recipe, spec, root, args), spec)
        val = {"name": val_name(recipe, args), "sha256": splits.hash_samples(dataset.samples, root)}
        folder = prepare_outputs(args, dataset)
        warn(changed_lists(loaded, val, args))
        with loading.precision_context(args.precision, device):
            scores = evaluate(
                loaded.model,
                dataset,
                spec,
                device,
                inference,
                batch_size=args.batch_size,
                num_workers=evaluation_workers(recipe.data.num_workers),
                timeout=recipe.data.timeout,
                progress=True,
                save=folder and (lambda name, image, mask, prediction: folder.write(name, image, prediction)),
                absent_as_zero=args.absent_as_zero,
            )
        if math.isnan(scores.pixel_accuracy) and dataset.masks:
            raise UserError(f"{val['name']}: all mask pixels are ignored ({spec.ignore_index}); use other masks")
        if not distributed.is_main():
            return
        if not dataset.masks:
            print(f"{scores.num_images} predictions in {args.save_dir}; no scores, {val['name']} has no masks")
            return
        print(format_table(scores, spec.classes))
        if args.confusion is not None:
            plot_confusion(scores.confusion, spec.classes, args.confusion)
        if args.json is not None:
            result = {**summary(scores, spec, loaded, val), **inference_settings(inference, args)}
            text = json.dumps(result, indent=2, allow_nan=False)
            write_text(args.json, f"{text}\n", "free disk space or choose another --json")


def recipe_for(loaded: InferenceModel, args: argparse.Namespace) -> Recipe:
    """The recipe of the checkpoint or, for imported weights, of --dataset, with --data-root applied."""
    recipe = loaded.recipe
    if recipe is None:
        candidates = loading.datasets_with(loaded.spec.num_classes)
        raise UserError(
            f"{args.checkpoint}: imported weights; name their data set with --dataset ({candidates}). For "
            "your own data, train from them (--config FILE model.init_from=FILE) and evaluate that run"
        )
    return recipe if args.data_root is None else replace(recipe, data=replace(recipe.data, data_root=args.data_root))


def val_samples(recipe: Recipe, spec: DatasetSpec, root: Path, args: argparse.Namespace) -> list[Sample]:
    """The samples of --list, else of the recipe's val list; UserError if a file is missing."""
    if args.list is not None:
        entries = drop_repeats(read_entries(splits.require_file(args.list, "--list"), root, spec.mask_path))
    else:
        try:
            entries = splits.val_entries(recipe.data, spec, root)
        except UserError as error:
            raise UserError(f"{error}; or give the images to evaluate with --list FILE") from None
    no_mask = [entry for entry in entries if entry.sample.mask is None]
    scores = args.json is not None or args.confusion is not None
    predict_only = len(no_mask) == len(entries) and args.save_dir is not None and not scores
    if no_mask and not predict_only:
        raise UserError(
            f"{no_mask[0].source}: {no_mask[0].sample.image} has no mask; write `image mask`, or give no masks at all "
            "and --save-dir alone, without --json and --confusion"
        )
    splits.check_files(entries)
    return [entry.sample for entry in entries]


def val_name(recipe: Recipe, args: argparse.Namespace) -> str:
    return str(args.list or recipe.data.val_id_path or "val")


class NamedImages(SegmentationDataset):
    """The samples under unique names; without a mask, all pixels are ignored."""

    def __init__(self, samples: Sequence[Sample], spec: DatasetSpec) -> None:
        super().__init__(samples, spec)
        self.names = unique_names([sample.image for sample in samples])

    @property
    def masks(self) -> list[Path]:
        return [sample.mask for sample in self.samples if sample.mask is not None]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        if self.samples[index].mask is not None:
            image, mask, _ = super().__getitem__(index)
        else:
            image = to_tensor(read_image(self.samples[index].image, self.spec.reading))
            mask = torch.full(image.shape[1:], self.spec.ignore_index, dtype=torch.uint8)
        return image, mask, self.names[index]


def prepare_outputs(args: argparse.Namespace, dataset: NamedImages) -> PredictionWriter | None:
    """Create the output folders before the work; UserError if outputs would overwrite other files."""
    if args.json is not None:
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot create the folder ({error.strerror}); choose another") from None
        if args.json.is_dir():
            raise UserError(f"--json {args.json} is a folder; name a file in it")
        if args.json.suffix != ".json" and args.json.exists():  # it may be the checkpoint or list by mistake
            raise UserError(f"--json {args.json}: exists and does not end in .json; choose another")
    if args.confusion is not None:
        check_picture(args.confusion, "--confusion")
    if args.save_dir is None:
        return None
    spec = dataset.spec
    pictures = spec.submission is None if args.pictures is None else args.pictures
    kinds = ("index", "color", "overlay") if pictures else ("index",)
    folder = PredictionWriter(args.save_dir, spec.palette, encode=spec.submission, kinds=kinds)
    folder.prepare(dataset.names, [sample.image for sample in dataset.samples], dataset.masks)
    return folder


def changed_lists(loaded: InferenceModel, val: dict[str, str], args: argparse.Namespace) -> list[str]:
    """Warnings: lists of the checkpoint that have other images than the published or local lists of the same name."""
    split, folder = loaded.meta.get("split") or {}, loaded.spec.splits
    name, labeled = str(split.get("name")), split.get("labeled")
    path = splits.SPLITS_ROOT / folder / name / "labeled.txt"
    notes = [] if labeled is None else [name_clash(name, labeled, folder)]
    if notes == [None] and path.is_file():  # the name is of no published list with other images
        images = [sample.image.as_posix() for sample in read_list(path, Path())]
        notes.append(difference(f"split {name}, {path}", labeled, splits.list_hash(images)))
    if args.list is None:
        notes.append(difference(f"the list {val['name']}", split.get("val"), val["sha256"]))
    return [message for message in notes if message is not None]


def difference(name: str, then: str | None, now: str) -> str | None:
    if then in (None, now):
        return None
    return f"{name}: other images than when the checkpoint was trained; sha256 was {then}, is {now}"


def warn(messages: Sequence[str]) -> None:
    if distributed.is_main():
        for message in messages:
            print(f"warning: {message}", file=sys.stderr)


def inference_settings(inference: Inference, args: argparse.Namespace) -> dict:
    """What decides the scores besides network and images."""
    return {
        "mode": inference.mode,
        "window": inference.window,
        "windows": inference.windows,
        "scales": list(inference.scales),
        "flip": inference.flip,
        "precision": args.precision,
        "absent_as_zero": args.absent_as_zero,
    }


def summary(scores: EvalResult, spec: DatasetSpec, loaded: InferenceModel, val: dict[str, str]) -> dict:
    """The content of --json; `split` is that of the training, unknown for imported weights."""
    result = {
        "miou": nan_to_none(scores.miou),
        "iou": scores.by_class(spec.classes),
        "dice": scores.by_class(spec.classes, "dice"),
        "class_precision": scores.by_class(spec.classes, "precision"),  # `precision` is that of the network
        "recall": scores.by_class(spec.classes, "recall"),
        "confusion": scores.confusion,  # pixels, rows = label, columns = prediction
        "pixel_accuracy": nan_to_none(scores.pixel_accuracy),
        "num_images": scores.num_images,
        "split": loaded.meta.get("split") or {"name": None, "sha256": None},
        "val": val,
        "checkpoint_sha256": loaded.meta["sha256"],
    }
    return result | {key: loaded.meta[key] for key in ("source",) if key in loaded.meta}


if __name__ == "__main__":
    sys.exit(run_main(main))
