"""allspark compare: runs side by side, over their seeds: tables, learning curves, a grid of predictions."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from allspark.config_io import differences, to_plain
from allspark.data.datasets import spec_for
from allspark.data.image_io import read_image
from allspark.data.transforms import to_tensor
from allspark.device import choose_device
from allspark.evaluation.evaluate import predict
from allspark.inference import load_for_inference
from allspark.runs import Run, differing_lists, read_runs, val_dataset
from allspark.utils.atomic import write_text
from allspark.utils.errors import UserError
from allspark.utils.markdown import markdown_table
from allspark.visualization.pictures import (
    GridRow,
    Points,
    check_picture,
    draw_grid,
    plot_curves,
    plot_losses,
    plot_panels,
    plot_seeds,
    save_image,
)

PICTURES = ("seeds", "curves", "losses", "pseudo_labels", "classes", "predictions")
MAX_CLASSES = 32  # with more, there are no panels per class
PSEUDO = {"pseudo_accuracy": "pseudo-label accuracy", "pseudo_coverage": "pseudo-label coverage"}  # key -> column
LEGEND = """
All values in percent, on val. last: last epoch, also of the classes. best: best epoch of each run; it is selected on
val and therefore higher. ±: sample standard deviation over the seeds. seeds.png: last epoch of each seed, with the
mean, and the range of the first row as a band. curves.png: mean over the seeds, and their range as a band; classes.png:
the same per class. losses.png: training losses. predictions.png: last epoch of the first run of each row.
"""
PSEUDO_LEGEND = """
Pseudo-labels: on unlabeled images whose labels training does not use. coverage: share of pixels that are confident
enough to be learned from. accuracy: share of those that are correct.
"""
ORIGIN_LEGEND = """
labeled list: its sha256. minutes: mean training time of a run by its logged speed, without evaluations.
"""


PAIRED_LEGEND = """
95 % interval and p: of the mean difference, by a paired t-test over the {samples} that both rows have.
"""
LISTS = ("data.split", "data.labeled_id_path", "data.unlabeled_id_path")  # differ between draws of the labeled images


@dataclass(frozen=True)
class Row:
    """A row of the table: runs of one recipe that differ in their seeds and, if draws is set, in their lists."""

    name: str
    runs: list[Run]
    draws: bool = False

    @property
    def by_label(self) -> dict[str, Run]:
        """'seed 0', with draws 'random_6_0 seed 0' -> run."""
        return {self.label(run): run for run in self.runs}

    def label(self, run: Run) -> str:
        return f"{f'{draw_of(run)} ' if self.draws else ''}seed {run.recipe.seed}"


def draw_of(run: Run) -> str:
    """Name of the labeled list."""
    data = run.recipe.data
    return str(data.labeled_id_path or data.split)


Measure = Callable[[Run], float | None]  # a number of a run, None if it has none


def main(args: argparse.Namespace) -> None:
    rows = read_rows(args.runs, args.draws)
    splits = {
        row.name if len(row.runs) == 1 else f"{row.name} {label}": run.provenance.get("split", {})
        for row in rows
        for label, run in row.by_label.items()
    }
    notes = [*unfinished(rows), *differing_lists(splits), *differing_unlabeled(rows)]
    for note in notes:
        print(f"WARNING: {note}", file=sys.stderr)
    check_out(args.out)
    text = tables(rows, args.paired) + "".join(f"\n{note}\n" for note in notes)
    write_text(args.out / "table.md", text, "free disk space or choose another --out")
    print(text, end="", flush=True)  # before the figures, which may fail for other reasons
    scores = {row.name: [run.points("miou") for run in row.runs] for row in rows}
    plot_curves(scores, "val mIoU (%)", args.out / "curves.png")
    plot_seeds({row.name: [run.last_miou for run in row.runs] for row in rows}, "val mIoU (%)", args.out / "seeds.png")
    plot_losses({row.name: [losses(run) for run in row.runs] for row in rows}, args.out / "losses.png")
    made = ["seeds.png", "curves.png", "losses.png"]
    for name, panels in (("pseudo_labels.png", pseudo_panels(rows)), ("classes.png", class_panels(rows))):
        if panels:
            plot_panels(panels, args.out / name)
            made.append(name)
    if with_weights := [row for row in rows if row.runs[0].checkpoint.is_file()]:
        device = choose_device(args.device)
        draw_predictions(with_weights, args.images, args.overlay, args.out / "predictions.png", device)
        made.insert(0, "predictions.png")
    print(f"pictures: {', '.join(str(args.out / name) for name in made)}")


def check_out(out: Path) -> None:
    """UserError if a file in the folder would be replaced that `compare` did not write."""
    table = out / "table.md"
    if table.exists() and not table.read_text(encoding="utf-8", errors="replace").startswith("| run "):
        raise UserError(f"{table}: exists and was not written by this program; choose another --out")
    for name in PICTURES:
        check_picture(out / f"{name}.png", "--out")


def read_rows(arguments: Sequence[str], draws: bool = False) -> list[Row]:
    """The rows of NAME=FOLDER or FOLDER arguments; UserError if they are not comparable.

    Args:
        arguments: as on the command line.
        draws: the runs of a row may be trained on different lists.
    """
    rows: dict[str, Row] = {}
    for name, run in read_runs(arguments):
        row = rows.setdefault(name, Row(name, [], draws))
        for other in row.runs:
            check_same_recipe(row, other, run)
        row.runs.append(run)
    datasets = {run.recipe.data.dataset for row in rows.values() for run in row.runs}
    if len(datasets) > 1:
        raise UserError(f"runs on different data sets cannot be compared: {', '.join(sorted(datasets))}")
    if len({spec_for(run.recipe.data).classes for row in rows.values() for run in row.runs}) > 1:
        raise UserError("runs with other classes cannot be compared; make a table for each")
    return list(rows.values())


def check_same_recipe(row: Row, one: Run, other: Run) -> None:
    """UserError unless the two runs differ in their seeds and lists alone."""
    allowed = ("seed", *(LISTS if row.draws else ()))
    changed = differences(to_plain(one.recipe), to_plain(other.recipe))
    wrong = [f"{key}: {old} -> {new}" for key, old, new in changed if key not in allowed]
    if row.label(one) == row.label(other):
        wrong.append(f"both have {row.label(one)}")
    if wrong:
        lists = "" if row.draws or "data.split: " not in wrong[0] else ", allow several lists with --draws"
        raise UserError(
            f"{row.name}: {one.folder} and {other.folder} are not two seeds of one recipe ({'; '.join(wrong[:5])}); "
            f"leave one out{lists} or give it another name: name=FOLDER"
        )


def unfinished(rows: Sequence[Row]) -> list[str]:
    """Warnings about runs that did not evaluate their last epoch."""
    return [
        f"{row.name} {label} is not finished: {run.evaluations[-1]['epoch'] + 1} of {run.recipe.epochs} epochs are "
        "evaluated"
        for row in rows
        for label, run in row.by_label.items()
        if not run.is_finished
    ]


def differing_unlabeled(rows: Sequence[Row]) -> list[str]:
    """Warnings about rows whose runs have equal labeled and other unlabeled images, as of a folder that has grown."""
    notes = []
    for row in rows:
        splits = [run.provenance.get("split", {}) for run in row.runs]
        pairs = {(split["labeled"], split["unlabeled"]) for split in splits if "unlabeled" in split}
        if len(pairs) > len({labeled for labeled, _ in pairs}):
            notes.append(f"{row.name}: its runs do not have the same unlabeled images; give each list a row of its own")
    return notes


def tables(rows: Sequence[Row], bases: Sequence[str] = ()) -> str:
    """Scores, differences to each of the rows `bases`, and where the runs are from."""
    parts = [score_table(rows), *(paired_table(rows, base) for base in bases), origin_table(rows)]
    return "\n".join(filter(None, parts))


def score_table(rows: Sequence[Row]) -> str:
    """Markdown: mIoU of the last and best epoch and IoU per class, each as mean ± std over the seeds."""
    measures = table_columns(rows)
    table = [["run", "seeds", *measures]]
    for row in rows:
        cells = [mean_std([measure(run) for run in row.runs], digits) for measure, digits in measures.values()]
        table.append([row.name, str(len(row.runs)), *cells])
    return markdown_table(table) + LEGEND + (PSEUDO_LEGEND if pseudo_keys(rows) else "")


def table_columns(rows: Sequence[Row]) -> dict[str, tuple[Measure, int]]:
    """Header of each column -> the number of a run, and its digits."""

    def class_iou(name: str) -> Measure:
        return lambda run: run.evaluations[-1]["iou"].get(name)

    def last_value(key: str) -> Measure:
        return lambda run: next((value for _, value in reversed(run.points(key))), None)

    columns: dict[str, tuple[Measure, int]] = {
        "mIoU last": (lambda run: run.last_miou, 2),
        "mIoU best": (lambda run: max(line["miou"] for line in run.evaluations), 2),
    }
    columns |= {PSEUDO[key]: (last_value(key), 1) for key in pseudo_keys(rows)}
    return columns | {name: (class_iou(name), 1) for name in rows[0].runs[0].evaluations[-1]["iou"]}


def pseudo_keys(rows: Sequence[Row]) -> list[str]:
    """The measures of the pseudo-labels' quality that any run has logged."""
    return [key for key in PSEUDO if any(run.points(key) for row in rows for run in row.runs)]


def paired_table(rows: Sequence[Row], base: str) -> str:
    """Markdown: last mIoU of each other row minus that of the row `base`, run by run, and a paired t-test.

    Runs on one draw of the labeled images are not independent, so a draw counts once, with the mean over its seeds.
    """
    from scipy import stats  # takes a second to import

    by_name = {row.name: row for row in rows}
    if base not in by_name:
        raise UserError(f"--paired {base}: there is no such row; there are {', '.join(by_name)}")
    base_runs, draws, others = by_name[base].by_label, by_name[base].draws, []
    table = [[f"mIoU last, minus {base}", *base_runs, "mean ± std", "95 % interval", "p"]]
    for row in (row for row in rows if row.name != base):
        runs = row.by_label
        gains = [runs[label].last_miou - run.last_miou if label in runs else None for label, run in base_runs.items()]
        cells = [*(mean_std([gain], 2, "+") for gain in gains), mean_std(gains, 2, "+")]
        groups = defaultdict(list)
        for (label, run), gain in zip(base_runs.items(), gains, strict=True):
            if gain is not None:
                groups[draw_of(run) if draws else label].append(gain)
        if any(label in runs and has_other_list(run, runs[label]) for label, run in base_runs.items()):
            others.append(row.name)
        paired = list(map(statistics.fmean, groups.values()))
        if len(set(paired)) < 2:  # one pair, or no spread
            table.append([row.name, *cells, "-", "-"])
            continue
        test = stats.ttest_1samp(paired, 0)
        low, high = test.confidence_interval(0.95)
        table.append([row.name, *cells, f"{low:+.2f} to {high:+.2f}", f"{test.pvalue:.2g}"])
    if len(table) == 1:
        return ""
    legend = PAIRED_LEGEND.format(samples="draws of labeled images" if draws else "runs")
    if others:
        legend += f"\nOther labeled images than {base}: {', '.join(others)}.\n"
    return markdown_table(table) + legend


def has_other_list(run: Run, other: Run) -> bool:
    """Whether both runs recorded their labeled images, and these differ."""
    lists = [each.provenance.get("split", {}).get("labeled") for each in (run, other)]
    return None not in lists and lists[0] != lists[1]


def origin_table(rows: Sequence[Row]) -> str:
    """Markdown: command, revision, labeled list and processor of each row; a line for each combination of them."""
    table = [["run", "trained by: python train.py ...", "revision", "labeled list", "processor", "seeds", "minutes"]]
    for row in rows:
        origins: dict[tuple[str, ...], list[Run]] = defaultdict(list)
        for run in (run for run in row.runs if run.provenance):
            facts = run.provenance
            command = " ".join(word for word in str(facts.get("command")).split() if not word.startswith("seed="))
            labeled, processor = facts["split"].get("labeled", "")[:12], facts.get("processor", "")
            origins[f"`{command}`", str(facts.get("revision")), labeled, processor].append(run)
        for origin, runs in origins.items():
            seeds = ", ".join(dict.fromkeys(str(run.recipe.seed) for run in runs))
            minutes = f"{statistics.fmean(run.training_minutes() for run in runs):.0f}"
            table.append([row.name, *origin, seeds, minutes])
    return markdown_table(table) + ORIGIN_LEGEND if len(table) > 1 else ""


def mean_std(values: Sequence[float | None], digits: int, sign: str = "") -> str:
    """'29.73 ± 1.79': mean and sample standard deviation of the numbers; a single number has no ±, none gives '-'."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    mean = f"{statistics.fmean(numbers):{sign}.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def losses(run: Run) -> dict[str, Points]:
    names = dict.fromkeys(key for line in run.lines for key in line if key.startswith("loss_"))
    return {name: run.points(name) for name in names}


def pseudo_panels(rows: Sequence[Row]) -> dict[str, dict[str, list[Points]]]:
    """Accuracy, coverage, and their product: the share of all pixels that are learned from and correct."""

    def product(run: Run) -> Points:
        accuracy = dict(run.points("pseudo_accuracy"))
        coverage = run.points("pseudo_coverage")
        return [(step, accuracy[step] * share / 100) for step, share in coverage if step in accuracy]

    keys = pseudo_keys(rows)
    panels = {f"{PSEUDO[key]} (%)": {row.name: [run.points(key) for run in row.runs] for row in rows} for key in keys}
    if len(keys) == len(PSEUDO):
        panels["confident and correct, of all pixels (%)"] = {row.name: list(map(product, row.runs)) for row in rows}
    return panels


def class_panels(rows: Sequence[Row]) -> dict[str, dict[str, list[Points]]]:
    """A panel per class; none if there are too many classes."""
    classes = rows[0].runs[0].evaluations[-1]["iou"]
    if len(classes) > MAX_CLASSES:
        return {}
    return {
        f"{name} (IoU, %)": {row.name: [run.class_points(name) for run in row.runs] for row in rows} for name in classes
    }


def draw_predictions(rows: Sequence[Row], count: int, overlaid: bool, path: Path, device: torch.device) -> None:
    """Image, truth and last prediction of each row's first run, for `count` images spread evenly over val."""
    data = rows[0].runs[0].recipe.data
    spec = spec_for(data)
    val = val_dataset(data, spec)
    count = min(count, len(val))
    places = [index * len(val) // count for index in range(count)]
    items = [val[place] for place in places]
    columns = []
    for row in rows:
        loaded = load_for_inference(row.runs[0].checkpoint, device)
        own, inference = loaded.spec, loaded.inference()  # each reads and normalizes images as in its training
        column = []
        for place, (_, _, name) in zip(places, items, strict=True):
            image = to_tensor(read_image(val.samples[place].image, own.reading))[None]
            column.append(predict(loaded.model, image, own, device, inference, [name])[0].cpu())
        columns.append(column)
    examples = [
        GridRow(name, image, (mask, *(column[place] for column in columns)))
        for place, (image, mask, name) in enumerate(items)
    ]
    titles = ["image", "truth", *(row.name for row in rows)]
    save_image(draw_grid(examples, titles, spec.classes, spec.palette, panel_width=240, overlaid=overlaid), path)
