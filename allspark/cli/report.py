"""allspark report: runs on one self-contained HTML page that needs no network."""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from allspark.config import DataConfig, size_text
from allspark.config_io import to_plain
from allspark.config_keys import is_runtime
from allspark.data.datasets import spec_for
from allspark.data.spec import DatasetSpec
from allspark.data.worker_pool import evaluation_workers
from allspark.device import choose_device
from allspark.engine.checkpoint import BEST, LATEST
from allspark.engine.writers import is_number
from allspark.evaluation.evaluate import evaluate
from allspark.evaluation.metrics import EvalResult, nan_to_none
from allspark.inference import load_for_inference
from allspark.runs import Run, differing_lists, list_name, read_runs, val_dataset
from allspark.utils.atomic import write_text
from allspark.utils.errors import UserError
from allspark.visualization.best_worst import BestWorst, ScoredImage, encode_image

TEMPLATES = Path(__file__).parent  # of report.html, report.css and report.js
MAX_BYTES = 10 * 10**6  # of a page; images beyond are left out
TOLERANCE = 0.1  # percent of mIoU by which another device may differ
MAX_POINTS = 500  # of a curve; more are averaged
MAX_IMAGES = 100  # best ones, and as many worst ones
SUFFIXES = {".htm", ".html"}
NO_IMAGES_HINT = "; --no-images makes the page without data and checkpoint"


@dataclass
class Evaluated:
    """The evaluation of a run's checkpoint on val; meta is that of the loaded checkpoint."""

    scores: EvalResult
    extremes: BestWorst
    mode: str
    meta: Mapping[str, Any]


@dataclass
class Entry:
    """A run on the page; evaluated is None with --no-images, show_best is --best."""

    name: str
    run: Run
    evaluated: Evaluated | None = None
    show_best: bool = False

    @property
    def split(self) -> Mapping[str, str]:
        """The names and hashes of its lists."""
        return self.run.provenance.get("split", {}) if self.evaluated is None else self.evaluated.meta["split"]

    @property
    def best(self) -> dict[str, Any]:
        return max(self.run.evaluations, key=lambda line: line["miou"])


def main(args: argparse.Namespace) -> None:
    check_out(args.out)
    if args.images > MAX_IMAGES:
        raise UserError(f"--images {args.images}: give at most {MAX_IMAGES}, a page holds {MAX_BYTES / 1e6:.0f} MB")
    entries = read_entries(args.runs)
    for place, entry in enumerate(entries):
        entry.show_best = args.best
        if not args.no_images:
            entry.evaluated = evaluate_run(entry, args, 0 if place else args.images)
    notes = [*differing_lists({entry.name: entry.split for entry in entries}), *score_notes(entries)]
    text, left_out = page_within(MAX_BYTES, entries, notes)
    write_text(args.out, text, "free disk space or choose another --out")
    for note in (*notes, *left_out):
        print(f"WARNING: {note}", file=sys.stderr)
    print(f"{args.out}: {len(entries)} run(s), {len(text) / 1e6:.1f} MB; open it in a browser")


def check_out(out: Path) -> None:
    """UserError unless --out can be written; the suffix keeps a mistyped --out from replacing a checkpoint."""
    if out.suffix.lower() not in SUFFIXES or out.is_dir():
        raise UserError(f"--out {out}: must be a file whose name ends in .html, such as report.html")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot create the folder ({error.strerror}); choose another") from None


def read_entries(arguments: Sequence[str]) -> list[Entry]:
    """The runs of NAME=FOLDER or FOLDER arguments; UserError unless names differ and data set and classes agree."""
    entries = [Entry(name, run) for name, run in read_runs(arguments)]
    if twice := sorted({entry.name for entry in entries if [e.name for e in entries].count(entry.name) > 1}):
        raise UserError(f"two runs have the name {twice[0]}; give each its own name: name=FOLDER")
    first = entries[0].run.recipe.data
    for entry in entries[1:]:
        data = entry.run.recipe.data
        if data.dataset != first.dataset or spec_for(data).classes != spec_for(first).classes:
            raise UserError(
                f"{entries[0].run.folder} was trained on {first.dataset}, {entry.run.folder} on {data.dataset} or with "
                "other classes: they cannot be compared; make a page for each"
            )
    return entries


def evaluate_run(entry: Entry, args: argparse.Namespace, count: int) -> Evaluated:
    """Evaluate the checkpoint of a run on val in the mode of its recipe, collecting `count` best and worst images."""
    path = entry.run.folder / (BEST if args.best else LATEST)
    try:
        device = choose_device(args.device)
        loaded = load_for_inference(path, device)
        if loaded.recipe is None or loaded.spec.classes != spec_for(entry.run.recipe.data).classes:
            raise UserError(f"{path}: does not belong to the recipe in its folder; restore the original file")
        data = loaded.recipe.data if args.data_root is None else replace(loaded.recipe.data, data_root=args.data_root)
        extremes, inference = BestWorst(loaded.spec, count), loaded.inference()
        scores = evaluate(
            loaded.model,
            val_dataset(data, loaded.spec),
            loaded.spec,
            device,
            inference,
            batch_size=args.batch_size,
            num_workers=evaluation_workers(data.num_workers),
            timeout=data.timeout,
            progress=True,
            save=extremes,
        )
    except UserError as error:
        raise UserError(f"{error}{NO_IMAGES_HINT}") from None
    return Evaluated(scores, extremes, inference.mode, loaded.meta)


def score_notes(entries: Sequence[Entry]) -> Iterator[str]:
    """Warnings: a run is not finished, or its checkpoint now evaluates to another score than in its log."""
    for entry in entries:
        if not entry.run.is_finished:
            done, epochs = entry.run.evaluations[-1]["epoch"] + 1, entry.run.recipe.epochs
            yield f"{entry.name} is not finished: {done} of {epochs} epochs are evaluated"
        if entry.evaluated is None:
            continue
        logged = [line["miou"] for line in entry.run.evaluations if line["step"] == entry.evaluated.meta["step"]]
        today = entry.evaluated.scores.miou
        if logged and not abs(logged[-1] - today) <= TOLERANCE:
            yield (
                f"{entry.name}: mIoU {today:.2f} now, {logged[-1]:.2f} in its log at the same step: the data, "
                "the val list, the checkpoint or the precision differs from training"
            )


def page_within(limit: int, entries: Sequence[Entry], notes: Sequence[str]) -> tuple[str, list[str]]:
    """The page of at most `limit` bytes, and notes about images that were left out."""
    content, left_out = content_of(entries, notes), []
    examples, text = content["examples"], page(content)
    total = sum(map(len, examples.values()))
    while len(text) > limit and any(examples.values()):
        share = 1 - (len(text) - limit) / len(text)
        for images in examples.values():
            del images[math.floor(len(images) * share) :]
        count = sum(map(len, examples.values()))
        left_out = [f"{count} of {total} images are on the page; all would make it larger than {limit / 1e6:.0f} MB"]
        text = page({**content, "notes": [*notes, *left_out]})
    return text, left_out


def page(content: Mapping[str, Any]) -> str:
    """The three template files combined, in ASCII, with the content as escaped JSON.

    Its content security policy allows this script alone and no request.
    """
    html, style, script = ((TEMPLATES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    data = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {"SCRIPT-HASH": f"sha256-{digest}", "STYLE": style, "SCRIPT": script, "DATA": data}
    return re.sub(r"\{\{([A-Z-]+)\}\}", lambda match: parts[match[1]], html)


def content_of(entries: Sequence[Entry], notes: Sequence[str]) -> dict[str, Any]:
    """The data of report.js, as plain values."""
    spec, first = spec_for(entries[0].run.recipe.data), entries[0].evaluated
    return {
        "dataset": spec.name,
        "made": datetime.now().isoformat(" ", "minutes"),
        "notes": list(notes),
        "classes": list(spec.classes),
        "palette": ["#" + bytes(color).hex() for color in spec.palette],
        "runs": [run_content(entry, spec) for entry in entries],
        "differences": differing_keys(entries),
        "examples": {
            kind: [] if first is None else [example(scored) for scored in getattr(first.extremes, kind)]
            for kind in ("worst", "best")
        },
    }


def run_content(entry: Entry, spec: DatasetSpec) -> dict[str, Any]:
    evaluated, logged = entry.evaluated, (entry.best if entry.show_best else entry.run.evaluations[-1])["iou"]
    iou = [logged.get(name) for name in spec.classes]
    if evaluated is not None:
        iou = [nan_to_none(value) for value in evaluated.scores.iou]
    return {
        "name": entry.name,
        "facts": facts(entry),
        "recipe": yaml.safe_dump(to_plain(entry.run.recipe), sort_keys=False, allow_unicode=True),
        "curves": curves(entry.run),
        "iou": [round_digits(value) for value in iou],
        "confusion": None if evaluated is None else evaluated.extremes.confusion.matrix.tolist(),
    }


def facts(entry: Entry) -> dict[str, str]:
    """The rows of the table of runs: name -> value."""
    run, recipe, best = entry.run, entry.run.recipe, entry.best
    last, model = run.evaluations[-1], recipe.model
    evaluated = f"no; the IoU per class is that of the {'best' if entry.show_best else 'last'} epoch in the log"
    if entry.evaluated is not None:
        meta, scores = entry.evaluated.meta, entry.evaluated.scores
        evaluated = (
            f"step {meta['step']}, {entry.evaluated.mode}, {scores.num_images} images: mIoU {scores.miou:.2f}, "
            f"pixel accuracy {scores.pixel_accuracy:.2f}; checkpoint sha256 {meta['sha256'][:12]}"
        )
    return {
        "folder": str(run.folder),
        "method": recipe.method.name,
        "model": f"{model.encoder}, decoder {model.decoder}, bottleneck {model.bottleneck.name}",
        "split": split_text(recipe.data, entry.split),
        "seed": str(recipe.seed),
        "epochs": f"{last['epoch'] + 1} of {recipe.epochs}",
        "steps": f"{run.lines[-1]['step']} of {recipe.batch_size} labeled images",
        "crop, optimizer": f"{size_text(recipe.data.crop_size)}, {recipe.optim.name} with lr {recipe.optim.lr:g}",
        "mIoU, last epoch": f"{last['miou']:.2f}",
        "mIoU, best epoch": f"{best['miou']:.2f} (epoch {best['epoch'] + 1}; selected on val)",
        "device": device_text(run.provenance),
        "time": f"{duration(run.training_minutes())} by its logged speed, without evaluations",
        "evaluated now": evaluated,
    }


def duration(minutes: float) -> str:
    return str(timedelta(seconds=round(60 * minutes))) if minutes < 1e9 else "unknown"


def split_text(data: DataConfig, split: Mapping[str, str]) -> str:
    """'1_30, labeled list sha256 e0170a14f670 (shapes/1_30 of this project)'."""
    name = split.get("name") or data.split or data.labeled_id_path or "folders of the recipe"
    if "labeled" in split:
        return f"{name}, labeled list {list_name(split['labeled'])}"
    return f"{name}, lists sha256 {split['sha256'][:12]}" if "sha256" in split else f"{name}, hash unknown"


def device_text(facts: Mapping[str, Any]) -> str:
    """The machine of the last start."""
    if not {"processes", "device", "torch", "revision"} <= facts.keys():
        return "unknown: the run is older than run.json"
    processes, device, torch, revision = (facts[key] for key in ("processes", "device", "torch", "revision"))
    device = facts.get("processor", device)
    return f"{processes} process(es) on {device}, torch {torch}, revision {revision}"


def differing_keys(entries: Sequence[Entry]) -> list[tuple[str, list[str]]]:
    """The keys that differ between the recipes and may change a result, with the value of each run."""
    flat = [dict(flatten(to_plain(entry.run.recipe))) for entry in entries]
    keys = dict.fromkeys(key for recipe in flat for key in recipe if not is_runtime(key))
    rows = [(key, [one.get(key, "-") for one in flat]) for key in keys]
    return [(key, list(map(yaml_text, values))) for key, values in rows if any(value != values[0] for value in values)]


def yaml_text(value: Any) -> str:
    """A value as YAML writes it: null, true, 0.5, text without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def flatten(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value


def curves(run: Run) -> dict[str, dict[str, Any]]:
    """Each logged number: steps, values, and the number of log lines that each point is the mean of."""
    keys = dict.fromkeys(key for line in run.lines for key, value in line.items() if is_number(value))
    found = {}
    for key in keys:
        if key in ("step", "epoch"):
            continue
        points = [(line["step"], float(line[key])) for line in run.lines if is_number(line.get(key))]
        each = math.ceil(len(points) / MAX_POINTS)
        groups = [points[at : at + each] for at in range(0, len(points), each)]
        found[key] = {
            "steps": [group[-1][0] for group in groups],
            "values": [round_digits(sum(value for _, value in group) / len(group)) for group in groups],
            "each": each,
        }
    return found


def round_digits(value: float | None) -> float | None:
    """Six significant digits, to keep the page small."""
    return None if value is None else float(f"{value:.6g}")


def example(scored: ScoredImage) -> dict[str, Any]:
    pictures = {"image": "JPEG", "truth": "PNG", "prediction": "PNG"}
    return {
        "name": scored.name,
        "miou": round_digits(scored.miou),
        "size": scored.image.size,
        "iou": [[index, round_digits(value)] for index, value in enumerate(scored.iou) if not math.isnan(value)],
        **{name: data_uri(encode_image(getattr(scored, name), kind), kind) for name, kind in pictures.items()},
    }


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"
