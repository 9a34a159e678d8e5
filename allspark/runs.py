"""Runs of train.py, read from their folders or from an archive: the input of `compare` and `report`."""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allspark.build import complete
from allspark.config import DataConfig, Recipe
from allspark.config_io import build_recipe, load_config
from allspark.data.spec import DatasetSpec
from allspark.data.splits import check_files, find_data, val_entries
from allspark.engine.checkpoint import LATEST
from allspark.engine.position import Position, is_finished
from allspark.engine.provenance import is_provenance, read_provenance
from allspark.engine.writers import METRICS, is_line, is_number, read_metrics
from allspark.evaluation.dataset import SegmentationDataset
from allspark.inference import prefix_errors
from allspark.split_lists.manifest import published_name
from allspark.utils.errors import UserError, reason_of
from allspark.visualization.pictures import Points

ARCHIVE = ".jsonl.gz"  # suffix of a file with the logs of several runs
MAX_ARCHIVE = 16 << 20  # bytes after decompression
ROW_NAME = r"\w[\w +.,=-]{,99}"  # in an archive


@dataclass(frozen=True)
class Run:
    """A run of train.py. Its three text files are enough for tables and curves; the checkpoint may be missing.

    Args:
        folder: of the run; below the path of the archive if it was read from one.
        recipe: from config.yaml.
        lines: of metrics.jsonl.
        provenance: content of run.json; empty for runs older than that file.
    """

    folder: Path
    recipe: Recipe
    lines: list[dict[str, Any]]
    provenance: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        return self.folder / LATEST

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "miou" in line]

    @property
    def last_miou(self) -> float:
        return self.evaluations[-1]["miou"]

    @property
    def is_finished(self) -> bool:
        best = max(self.evaluations, key=lambda line: line["miou"])
        return is_finished(self.recipe, Position(epoch=self.evaluations[-1]["epoch"] + 1, best=best))

    def points(self, key: str) -> Points:
        """(step, value) of the lines with a finite number under the key."""
        return [(line["step"], line[key]) for line in self.lines if is_number(line.get(key))]

    def class_points(self, name: str) -> Points:
        """(step, IoU) of the evaluations in which the class occurs."""
        values = [(line["step"], line["iou"].get(name)) for line in self.evaluations]
        return [(step, value) for step, value in values if value is not None]

    def training_minutes(self) -> float:
        """Training time by the logged speed: without evaluations and interruptions."""
        minutes, before = 0.0, 0
        for line in self.lines:
            if is_number(line.get("images_per_s")) and line["images_per_s"] > 0:
                minutes += (line["step"] - before) * self.recipe.batch_size / line["images_per_s"] / 60
                before = line["step"]
        return minutes


def read_runs(arguments: Sequence[str]) -> list[tuple[str, Run]]:
    """The runs of NAME=FOLDER, FOLDER or archive arguments, with their names.

    Runs without an evaluation are left out with a warning; UserError if there is no other.
    """
    folders = iter(named_folders([argument for argument in arguments if not argument.endswith(ARCHIVE)]))
    runs: list[tuple[str, Run]] = []
    for argument in arguments:
        if argument.endswith(ARCHIVE):
            runs += read_archive(Path(argument))
        else:
            name, folder = next(folders)
            runs.append((name, read_run(folder)))
    young = [run for _, run in runs if not run.evaluations]
    if len(young) == len(runs):
        raise UserError(f"{young[0].folder}: this run has no evaluation yet; let train.py finish it")
    for run in young:
        print(f"WARNING: {run.folder} has no evaluation yet and is left out", file=sys.stderr)
    return [(name, run) for name, run in runs if run.evaluations]


def read_run(folder: Path) -> Run:
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder}: not the folder of a run, it has no {METRICS}; give a folder that train.py wrote")
    with prefix_errors(folder / "config.yaml"):
        recipe = complete(load_config(folder / "config.yaml"))
    return Run(folder, recipe, read_metrics(folder / METRICS), read_provenance(folder))


def read_archive(path: Path) -> list[tuple[str, Run]]:
    """The runs of an archive, with their names.

    An archive is gzipped JSON Lines, one run per line: {"name": ..., "config": ..., "metrics": [...],
    "provenance": ...}, the contents of config.yaml, metrics.jsonl and run.json. It has no checkpoints.

    Raises:
        UserError: the file cannot be read, is too large or has a line that is not a run.
    """
    try:
        with gzip.open(path) as file:
            content = file.read(MAX_ARCHIVE + 1)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UserError(f"{path}: cannot be read ({reason}); give the path of an archive, without a name") from None
    if len(content) > MAX_ARCHIVE:
        raise UserError(f"{path}: more than {MAX_ARCHIVE >> 20} MiB of text; split the archive")
    runs = []
    for number, text in enumerate(content.splitlines(), start=1):
        try:
            entry = json.loads(text)
            name, config, lines, provenance = (entry[key] for key in ("name", "config", "metrics", "provenance"))
            valid = re.fullmatch(ROW_NAME, name) and isinstance(lines, list) and all(map(is_line, lines))
            valid = valid and (provenance == {} or is_provenance(provenance))
        except (ValueError, RecursionError, LookupError, TypeError):
            valid = False
        source = f"{path}, line {number}"
        if not valid:
            raise UserError(f"{source}: not a run; restore the archive or remove the line")
        with prefix_errors(source):
            recipe = complete(build_recipe(config, None, "config"))
        runs.append((name, Run(path / name / f"seed_{recipe.seed}", recipe, lines, provenance)))
    if not runs:
        raise UserError(f"{path}: has no runs; restore the archive")
    return runs


def named_folders(arguments: Sequence[str]) -> list[tuple[str, Path]]:
    """Name and folder of each argument; the default name is the shortest distinct end of its path."""
    pairs: list[tuple[str | None, Path]] = []
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        unnamed = not equals or Path(argument).is_dir()  # a folder's name may contain =
        pairs.append((None, Path(argument)) if unnamed else (name, Path(folder)))
    parts = [folder.absolute().parts for _, folder in pairs]
    ends: list[str] = []
    for count in range(1, max(map(len, parts), default=0) + 1):
        ends = ["/".join(part[-count:]) for part in parts]
        if len(set(ends)) == len(set(parts)):
            break
    return [(end if name is None else name, folder) for (name, folder), end in zip(pairs, ends, strict=True)]


def differing_lists(splits: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Warnings about scores that cannot be compared: lists of one name with different images.

    Args:
        splits: name of a run -> its split, as in run.json and checkpoints.
    """
    users: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run, split in splits.items():
        for kind, name in (("labeled", f"split {split.get('name')}"), ("val", "val")):
            if kind in split:  # missing in older checkpoints
                users[name, kind][split[kind]].append(run)
    notes = []
    for (name, kind), runs in users.items():
        if len(runs) > 1:
            hashes = "; ".join(f"{', '.join(names)}: {list_name(sha256)}" for sha256, names in runs.items())
            notes.append(f"{name} is not the same {kind} list in these runs, do not compare them: {hashes}")
    return notes


def list_name(sha256: str) -> str:
    """'sha256 1a88d02c7870 (pascal/1_8 of LiheYoung/UniMatch)'."""
    origin = published_name(sha256)
    return f"sha256 {sha256[:12]}{f' ({origin})' if origin else ''}"


def val_dataset(data: DataConfig, spec: DatasetSpec) -> SegmentationDataset:
    """The validation images with their masks; UserError if a file is missing."""
    entries = val_entries(data, spec, find_data(data, spec, create=False))
    for entry in entries:
        if entry.sample.mask is None:
            raise UserError(f"{entry.source}: {entry.sample.image} has no mask; write `image mask`")
    check_files(entries)
    return SegmentationDataset([entry.sample for entry in entries], spec)
