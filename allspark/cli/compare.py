"""python -m allspark compare: runs side by side, over their seeds: tables, learning curves, a grid of predictions."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allspark.cli.recipe import complete
from allspark.config import DataConfig, Recipe
from allspark.config_io import differences, load_config, to_plain
from allspark.data import spec_for
from allspark.data.base import DatasetSpec, SegmentationDataset
from allspark.data.splits import check_files, find_data, val_entries
from allspark.distributed import choose_device
from allspark.engine.checkpoint import LATEST
from allspark.engine.provenance import read_facts
from allspark.engine.writers import METRICS, read_metrics
from allspark.evaluation.evaluate import predict
from allspark.inference import load_for_inference, naming
from allspark.split_lists.manifest import known_as
from allspark.utils.atomic import write_text
from allspark.utils.errors import UserError
from allspark.visualization.pictures import (
    Example,
    Points,
    draw_grid,
    plot_curves,
    plot_losses,
    plot_panels,
    plot_seeds,
    save_image,
)

MOST_CLASSES = 32  # of which each gets a panel
PSEUDO = {"pseudo_accuracy": "pseudo-label accuracy", "pseudo_coverage": "pseudo-label coverage"}  # key -> head
LEGEND = """
In percent, on val. last: of the last epoch, as are the classes. best: of the best epoch of each run; best on val is a
selection, and higher for it. ±: sample standard deviation over the seeds. seeds.png: each seed's last epoch, a bar at
their mean, a band over those of the first row. curves.png: the mean over the seeds in a band from the lowest to the
highest; classes.png: the same of each class. losses.png: in training. predictions.png: the last epoch of each row's
first run.
"""
PSEUDO_LEGEND = """
Pseudo-labels: of unlabeled images whose labels training never opens; coverage: the pixels confident enough to learn
from, accuracy: of these the right ones.
"""
ORIGIN_LEGEND = """
labeled list: its sha256. minutes: of a run on average, by its logged speed, without evaluations.
"""


@dataclass(frozen=True)
class Run:
    """A run of train.py: its folder, its recipe, the lines of metrics.jsonl, the facts of run.json (older: none).

    The three files are enough for tables and curves; a run that is kept for its numbers may lack the checkpoint.
    """

    folder: Path
    recipe: Recipe
    lines: list[dict[str, Any]]
    facts: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        return self.folder / LATEST

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "miou" in line]

    def points(self, key: str) -> Points:
        """(step, value) of the lines that have a number there."""
        values = [(line["step"], line.get(key)) for line in self.lines]
        return [(step, value) for step, value in values if value is not None and math.isfinite(value)]

    def class_points(self, name: str) -> Points:
        """(step, IoU) of the evaluations in which the class has one."""
        values = [(line["step"], line["iou"].get(name)) for line in self.evaluations]
        return [(step, value) for step, value in values if value is not None]


@dataclass(frozen=True)
class Row:
    """A row of the table: runs that differ in their seeds alone."""

    name: str
    runs: list[Run]

    @property
    def by_seed(self) -> dict[int, Run]:
        return {run.recipe.seed: run for run in self.runs}


Measure = Callable[[Run], float | None]  # a number of a run, None where it has none


def main(args: argparse.Namespace) -> None:
    rows = read_rows(args.runs)
    tables = [score_table(rows), "" if args.paired is None else paired_table(rows, args.paired), origin_table(rows)]
    notes = [*unfinished(rows), *differing_lists(splits_of(rows))]
    for note in notes:
        print(f"WARNING: {note}", file=sys.stderr)
    text = "\n".join(filter(None, tables)) + "".join(f"\n{note}\n" for note in notes)
    write_text(args.out / "table.md", text, "make room or choose another --out")
    print(text, end="", flush=True)  # first: pictures need more than the numbers
    scores = {row.name: [run.points("miou") for run in row.runs] for row in rows}
    plot_curves(scores, "val mIoU (%)", args.out / "curves.png")
    plot_seeds({row.name: [last_miou(run) for run in row.runs] for row in rows}, "val mIoU (%)", args.out / "seeds.png")
    plot_losses({row.name: [losses(run) for run in row.runs] for row in rows}, args.out / "losses.png")
    made = ["seeds.png", "curves.png", "losses.png"]
    if panels := pseudo_panels(rows):
        plot_panels(panels, args.out / "pseudo_labels.png")
        made.append("pseudo_labels.png")
    if panels := class_panels(rows):
        plot_panels(panels, args.out / "classes.png")
        made.append("classes.png")
    if with_weights := [row for row in rows if row.runs[0].checkpoint.is_file()]:
        draw_predictions(with_weights, args.images, args.overlay, args.out / "predictions.png")
        made.insert(0, "predictions.png")
    print(f"pictures: {', '.join(str(args.out / name) for name in made)}")


def read_rows(words: Sequence[str]) -> list[Row]:
    """name=FOLDER or FOLDER, all on one data set; equal names are one row, whose recipes differ in the seed alone."""
    rows: dict[str, Row] = {}
    for name, run in read_runs(words):
        row = rows.setdefault(name, Row(name, []))
        for other in row.runs:
            check_seeds(name, other, run)
        row.runs.append(run)
    datasets = {run.recipe.data.dataset for row in rows.values() for run in row.runs}
    if len(datasets) > 1:
        raise UserError(f"runs on different data sets cannot be compared: {', '.join(sorted(datasets))}")
    return list(rows.values())


def named_folders(words: Sequence[str]) -> list[tuple[str, Path]]:
    """name=FOLDER or FOLDER, which has the last parts of its path for a name: as many as tell these folders apart."""
    pairs: list[tuple[str | None, Path]] = []
    for word in words:
        name, equals, folder = word.partition("=")
        plain = not equals or Path(word).is_dir()  # a folder may have = in its name
        pairs.append((None, Path(word)) if plain else (name, Path(folder)))
    parts = [folder.absolute().parts for _, folder in pairs]
    for count in range(1, max(map(len, parts)) + 1):
        own = ["/".join(part[-count:]) for part in parts]
        if len(set(own)) == len(set(parts)):
            break
    return [(last if name is None else name, folder) for (name, folder), last in zip(pairs, own, strict=True)]


def read_runs(words: Sequence[str]) -> list[tuple[str, Run]]:
    """named_folders that were evaluated at least once; the others are left out with a warning, UserError if all are."""
    runs = [(name, read_run(folder)) for name, folder in named_folders(words)]
    young = [run for _, run in runs if not run.evaluations]
    if len(young) == len(runs):
        raise UserError(f"{young[0].folder}: this run was not evaluated yet; let train.py finish it")
    for run in young:
        print(f"WARNING: {run.folder} was not evaluated yet and is left out", file=sys.stderr)
    return [(name, run) for name, run in runs if run.evaluations]


def read_run(folder: Path) -> Run:
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder}: not the folder of a run, there is no {METRICS}; train.py writes it")
    with naming(folder / "config.yaml"):
        recipe = complete(load_config(folder / "config.yaml"))
    return Run(folder, recipe, read_metrics(folder / METRICS), read_facts(folder))


def check_seeds(name: str, one: Run, other: Run) -> None:
    """UserError unless the two runs are one recipe with two seeds."""
    changed = differences(to_plain(one.recipe), to_plain(other.recipe))
    wrong = [change for change in changed if not change.startswith("seed: ")]
    if one.recipe.seed == other.recipe.seed:
        wrong.append(f"both have seed {one.recipe.seed}")
    if wrong:
        raise UserError(
            f"{name}: {one.folder} and {other.folder} are not two seeds of one recipe ({'; '.join(wrong[:5])}); "
            f"runs of one name are its seeds, so leave one out or give it another name: name=FOLDER"
        )


def splits_of(rows: Sequence[Row]) -> dict[str, Mapping[str, str]]:
    """Each run, named by its row and where there are several by its seed -> the split that it was trained on."""
    return {
        row.name if len(row.runs) == 1 else f"{row.name} seed {seed}": run.facts.get("split", {})
        for row in rows
        for seed, run in row.by_seed.items()
    }


def unfinished(rows: Sequence[Row]) -> list[str]:
    """Runs whose last evaluation is not that of their last epoch: scores on the way."""
    return [
        f"{row.name} seed {seed} is not finished: {done} of {run.recipe.epochs} epochs are evaluated"
        for row in rows
        for seed, run in row.by_seed.items()
        if (done := run.evaluations[-1]["epoch"] + 1) < run.recipe.epochs
    ]


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


def score_table(rows: Sequence[Row]) -> str:
    """Markdown: mIoU of the last epoch, of the best one, and per class of the last; mean ± std over the seeds."""
    measures = measures_of(rows)
    table = [["run", "seeds", *measures]]
    for row in rows:
        cells = [spread([measure(run) for run in row.runs], digits) for measure, digits in measures.values()]
        table.append([row.name, str(len(row.runs)), *cells])
    return markdown(table) + LEGEND + (PSEUDO_LEGEND if pseudo_keys(rows) else "")


def measures_of(rows: Sequence[Row]) -> dict[str, tuple[Measure, int]]:
    """The head of each column -> how a run's number comes about, and its digits."""

    def of_class(name: str) -> Measure:
        return lambda run: run.evaluations[-1]["iou"].get(name)

    def last_of(key: str) -> Measure:
        return lambda run: next((value for _, value in reversed(run.points(key))), None)

    measures: dict[str, tuple[Measure, int]] = {
        "mIoU last": (last_miou, 2),
        "mIoU best": (lambda run: max(line["miou"] for line in run.evaluations), 2),
    }
    measures |= {PSEUDO[key]: (last_of(key), 1) for key in pseudo_keys(rows)}
    return measures | {name: (of_class(name), 1) for name in rows[0].runs[0].evaluations[-1]["iou"]}


def last_miou(run: Run) -> float:
    return run.evaluations[-1]["miou"]


def pseudo_keys(rows: Sequence[Row]) -> list[str]:
    """What of the pseudo-labels' quality any run has logged."""
    return [key for key in PSEUDO if any(run.points(key) for row in rows for run in row.runs)]


def paired_table(rows: Sequence[Row], base: str) -> str:
    """Markdown: last mIoU of each other row less that of the row `base` with the same seed, and mean ± std of these."""
    found = {row.name: row for row in rows}
    if base not in found:
        raise UserError(f"--paired {base}: there is no such row; there are {', '.join(found)}")
    seeds = sorted(found[base].by_seed)
    table = [[f"mIoU last, less {base}", *(f"seed {seed}" for seed in seeds), "mean ± std"]]
    for row in (row for row in rows if row.name != base):
        pairs = [(row.by_seed.get(seed), found[base].by_seed[seed]) for seed in seeds]
        gains = [None if run is None else last_miou(run) - last_miou(other) for run, other in pairs]
        table.append([row.name, *(spread([gain], 2, "+") for gain in gains), spread(gains, 2, "+")])
    return markdown(table) if len(table) > 1 else ""


def origin_table(rows: Sequence[Row]) -> str:
    """Markdown: how each row came about; a line for each command, revision or list that its seeds differ in."""
    table = [["run", "trained by: python train.py ...", "revision", "labeled list", "seeds", "minutes"]]
    for row in rows:
        same: dict[tuple[str, ...], list[Run]] = defaultdict(list)
        for run in row.runs:
            if run.facts:
                words = " ".join(word for word in str(run.facts.get("command")).split() if not word.startswith("seed="))
                labeled = run.facts["split"].get("labeled", "")[:12]
                same[words, str(run.facts.get("revision")), labeled].append(run)
        for (words, revision, labeled), runs in same.items():
            seeds = ", ".join(str(run.recipe.seed) for run in runs)
            minutes = f"{statistics.fmean(map(training_minutes, runs)):.0f}"
            table.append([row.name, f"`{words}`", revision, labeled, seeds, minutes])
    return markdown(table) + ORIGIN_LEGEND if len(table) > 1 else ""


def training_minutes(run: Run) -> float:
    """From the speed that was logged, so without its evaluations and whatever it waited for."""
    minutes, before = 0.0, 0
    for line in run.lines:
        if line.get("images_per_s"):
            minutes += (line["step"] - before) * run.recipe.batch_size / line["images_per_s"] / 60
            before = line["step"]
    return minutes


def spread(values: Sequence[float | None], digits: int, sign: str = "") -> str:
    """'29.73 ± 1.79': mean and sample standard deviation of the numbers among them; of one no ±, of none '-'."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    mean = f"{statistics.fmean(numbers):{sign}.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table of equally wide columns; its first row is the head."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def losses(run: Run) -> dict[str, Points]:
    names = dict.fromkeys(key for line in run.lines for key in line if key.startswith("loss_"))
    return {name: run.points(name) for name in names}


def pseudo_panels(rows: Sequence[Row]) -> dict[str, dict[str, list[Points]]]:
    """Accuracy, coverage, and what both come to: the share of all pixels that are learned from and right."""
    keys = pseudo_keys(rows)
    panels = {f"{PSEUDO[key]} (%)": {row.name: [run.points(key) for run in row.runs] for row in rows} for key in keys}
    if len(keys) == len(PSEUDO):
        panels["confident and right, of all pixels (%)"] = {row.name: list(map(right, row.runs)) for row in rows}
    return panels


def right(run: Run) -> Points:
    """(step, accuracy times coverage of the pseudo-labels, in percent)."""
    accuracy = dict(run.points("pseudo_accuracy"))
    return [(step, accuracy[step] * share / 100) for step, share in run.points("pseudo_coverage") if step in accuracy]


def class_panels(rows: Sequence[Row]) -> dict[str, dict[str, list[Points]]]:
    """A panel for each class; none where there are too many to look at."""
    classes = rows[0].runs[0].evaluations[-1]["iou"]
    if len(classes) > MOST_CLASSES:
        return {}
    return {
        f"{name} (IoU, %)": {row.name: [run.class_points(name) for run in row.runs] for row in rows} for name in classes
    }


def val_images(data: DataConfig, spec: DatasetSpec) -> SegmentationDataset:
    """The images of val, each with its mask, every file known to exist."""
    entries = val_entries(data, spec, find_data(data, spec))
    for entry in entries:
        if entry.sample.mask is None:
            raise UserError(f"{entry.source}: {entry.sample.image} has no mask; write `image mask`")
    check_files(entries)
    return SegmentationDataset([entry.sample for entry in entries], spec)


def draw_predictions(rows: Sequence[Row], count: int, overlaid: bool, path: Path) -> None:
    """Image, truth and the last epoch's prediction of each row's first run, for `count` val images spread evenly."""
    data = rows[0].runs[0].recipe.data
    spec, device = spec_for(data), choose_device("auto")
    val = val_images(data, spec)
    items = [val[index * len(val) // count] for index in range(min(count, len(val)))]
    columns = []
    for row in rows:
        loaded = load_for_inference(row.runs[0].checkpoint, device)
        inference = loaded.inference()
        columns.append([predict(loaded.model, im[None], spec, device, inference, [n])[0].cpu() for im, _, n in items])
    examples = [
        Example(name, image, (mask, *(column[place] for column in columns)))
        for place, (image, mask, name) in enumerate(items)
    ]
    heads = ["image", "truth", *(row.name for row in rows)]
    save_image(draw_grid(examples, heads, spec.classes, spec.palette, panel_width=240, overlaid=overlaid), path)
