"""python -m allspark compare: finished runs side by side, as a table, learning curves and a grid of predictions."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allspark.cli.loading import load_for_inference
from allspark.config import Recipe, load_config
from allspark.data import spec_for
from allspark.data.base import SegmentationDataset
from allspark.data.manifest import known_as
from allspark.data.splits import resolve
from allspark.distributed import choose_device
from allspark.engine.checkpoint import load_checkpoint
from allspark.engine.log import read_metrics
from allspark.errors import UserError
from allspark.evaluation.evaluate import predict
from allspark.evaluation.inference import inference_for
from allspark.evaluation.pictures import Curve, Example, draw_grid, plot_curves


@dataclass(frozen=True)
class Run:
    """A finished run: its name in the table, its recipe, and the lines of metrics.jsonl."""

    name: str
    folder: Path
    recipe: Recipe
    lines: list[dict[str, Any]]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "miou" in line]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that train.py wrote; name=FOLDER names it")
    parser.add_argument("--out", type=Path, required=True, help="folder for table.md, curves.png and predictions.png")
    parser.add_argument("--images", type=int, default=5, help="rows of the grid of predictions, spread over val")
    parser.add_argument("--overlay", action="store_true", help="lay the masks over the images")


def main(args: argparse.Namespace) -> None:
    runs = read_runs(args.runs)
    args.out.mkdir(parents=True, exist_ok=True)
    notes = differing_lists({run.name: load_checkpoint(run.folder / "latest.pth", ("split",))["split"] for run in runs})
    for note in notes:
        print(f"WARNING: {note}", file=sys.stderr)
    table = score_table(runs) + "".join(f"\n{note}\n" for note in notes)
    (args.out / "table.md").write_text(table, encoding="utf-8")
    plot_curves({run.name: curve(run) for run in runs}, args.out / "curves.png")
    draw_predictions(runs, args.images, args.overlay, args.out / "predictions.png")
    print(table, end="")
    print(f"pictures: {args.out / 'predictions.png'}, {args.out / 'curves.png'}")


def read_runs(words: Sequence[str]) -> list[Run]:
    """name=FOLDER or FOLDER; all on one data set."""
    runs = []
    for word in words:
        name, equals, folder = ("", "", word) if Path(word).is_dir() else word.partition("=")
        folder = Path(folder if equals else word)
        metrics = folder / "metrics.jsonl"
        if not metrics.is_file():
            raise UserError(f"{folder}: not the folder of a run, there is no metrics.jsonl; train.py writes it")
        lines = read_metrics(metrics)
        run = Run(name if equals else folder.name, folder, load_config(folder / "config.yaml"), lines)
        if not run.evaluations:
            raise UserError(f"{folder}: this run was not evaluated yet; let train.py finish it")
        runs.append(run)
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"runs of equal names: {', '.join(names)}; write name=FOLDER")
    datasets = {run.recipe.data.dataset for run in runs}
    if len(datasets) > 1:
        raise UserError(f"runs on different data sets cannot be compared: {', '.join(sorted(datasets))}")
    return runs


def differing_lists(splits: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What makes scores incomparable: other labeled images under one name, another val list. Run -> its split."""
    found: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run, split in splits.items():
        for kind, name in (("labeled", f"split {split.get('name')}"), ("val", "val")):
            if kind in split:  # older checkpoints do not say
                found[name, kind][split[kind]].append(run)
    notes = []
    for (name, kind), runs in found.items():
        if len(runs) > 1:
            told = "; ".join(f"{', '.join(names)}: {list_name(sha256)}" for sha256, names in runs.items())
            notes.append(f"{name} is not the same {kind} list in these runs, do not compare them: {told}")
    return notes


def list_name(sha256: str) -> str:
    """'sha256 1a88d02c7870 (pascal/1_8 of LiheYoung/UniMatch)'."""
    whose = known_as(sha256)
    return f"sha256 {sha256[:12]}{f' ({whose})' if whose else ''}"


def score_table(runs: Sequence[Run]) -> str:
    """Markdown: mIoU of the last epoch, of the best one, and per class of the last."""
    classes = list(runs[0].evaluations[-1]["iou"])
    rows = [["run", "mIoU last", "mIoU best", *classes]]
    for run in runs:
        last, best = run.evaluations[-1], max(line["miou"] for line in run.evaluations)
        per_class = ["-" if last["iou"][name] is None else f"{last['iou'][name]:.1f}" for name in classes]
        rows.append([run.name, f"{last['miou']:.2f}", f"{best:.2f}", *per_class])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def curve(run: Run) -> Curve:
    losses: dict[str, list[tuple[int, float]]] = {}
    for line in run.lines:
        for name in line:
            if name.startswith("loss_"):
                losses.setdefault(name, []).append((line["step"], line[name]))
    return Curve([(line["step"], line["miou"]) for line in run.evaluations], losses)


def draw_predictions(runs: Sequence[Run], count: int, overlaid: bool, path: Path) -> None:
    """Image, truth and the prediction of each run's last epoch, for `count` val images at equal distances."""
    data = runs[0].recipe.data
    spec, device = spec_for(data), choose_device("auto")
    val = SegmentationDataset(resolve(data).val, spec)
    items = [val[index * len(val) // count] for index in range(min(count, len(val)))]
    columns = []
    for run in runs:
        loaded = load_for_inference(run.folder / "latest.pth", device)
        evaluation = loaded.recipe.evaluation
        inference = inference_for(spec, loaded.recipe.data.crop_size, evaluation.mode, evaluation.window)
        columns.append([predict(loaded.model, im[None], spec, device, inference, [n])[0].cpu() for im, _, n in items])
    examples = [
        Example(name, image, (mask, *(column[row] for column in columns)))
        for row, (image, mask, name) in enumerate(items)
    ]
    heads = ["image", "truth", *(run.name for run in runs)]
    draw_grid(examples, heads, spec.classes, spec.palette, panel_width=240, overlaid=overlaid).save(path)
