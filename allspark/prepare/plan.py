"""A data set's plan: which files are to be made of what. And prepare, which carries it out."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allspark.prepare.archives import Index, Key, Kind, find_sources, index_sources, select_entries
from allspark.prepare.jobs import Task, remove_temporaries, run_tasks, write_file
from allspark.utils.errors import UserError

MARKER = "prepared.json"  # in the finished data set: its counts and files
BLOCK = 4096  # bytes; what a file takes on a disk is a multiple
DRAWN_MASK = 2 * BLOCK  # bytes, about; of a mask that is drawn from annotations


@dataclass(frozen=True)
class Archive:
    """An official archive. digest: as published, else None; urls: empty where it asks for a login or has moved."""

    name: str
    origin: str
    urls: tuple[str, ...] = ()
    digest: str | None = None


@dataclass(frozen=True)
class Output:
    """A file of the prepared data set, below its root. source: what it is made of, None where args hold all.

    make: as in Task.
    """

    target: str
    source: Key | None
    make: Callable[..., bytes] | None = None
    args: tuple[Any, ...] = ()


Sample = tuple[Output, ...]  # what belongs together: an image and its masks


@dataclass(frozen=True)
class Plan:
    """How a data set is prepared.

    samples: (index, ignore_unknown) -> the samples of each split. counts: the official ones; a split of `optional` may
    be absent as a whole. lists: path of a split's list of names, with {split}, or None. split: a published one, for the
    command that is shown at the end.
    """

    dataset: str
    archives: tuple[Archive, ...]
    kinds: tuple[Kind, ...]
    counts: Mapping[str, int]
    samples: Callable[[Index, bool], dict[str, list[Sample]]]
    split: str
    optional: tuple[str, ...] = ()
    lists: str | None = None


@dataclass(frozen=True)
class Options:
    """What the user asks for. allow_partial: leave out what the sources lack. ignore_unknown: labels of no class."""

    sources: tuple[Path, ...]
    out: Path
    workers: int
    force: bool = False
    allow_partial: bool = False
    ignore_unknown: bool = False


@dataclass
class FileSet:
    """Which files are there, asked once per folder. An empty one is not: a crash of the machine leaves such."""

    root: Path
    known: dict[Path, set[str]] = field(default_factory=dict)

    def has(self, target: str) -> bool:
        path = self.root / target
        if path.parent not in self.known:
            entries = os.scandir(path.parent) if path.parent.is_dir() else ()
            self.known[path.parent] = {entry.name for entry in entries if entry.is_file() and entry.stat().st_size > 0}
        return path.name in self.known[path.parent]


def prepare(plan: Plan, options: Options) -> None:
    """Make all files that are not there yet. UserError: something is missing, bad or full; what is done stays."""
    out = options.out
    if not options.force and is_finished(plan, out):
        print(f"{out}: prepared already; --force makes it again")
        return
    index = index_sources(find_sources(options.sources, [archive.name for archive in plan.archives]), plan.kinds)
    there = FileSet(out)
    splits = complete_samples(plan, plan.samples(index, options.ignore_unknown), index, there, options)
    outputs = {output.target: output for samples in splits.values() for sample in samples for output in sample}
    absent = [output for output in outputs.values() if options.force or not there.has(output.target)]
    remove_temporaries({(out / output.target).parent for output in outputs.values()})
    check_space(out, absent, index)
    if absent:
        run_tasks(make_tasks(plan, absent, index, out), len(absent), options.workers, f"prepare {plan.dataset}")
    check_outputs(outputs, out)
    write_lists(plan, splits, options)
    if has_official_counts(plan, splits) and splits.keys() == plan.counts.keys():  # else a later run may add to it
        counts = {split: len(samples) for split, samples in splits.items()}
        marker = {"dataset": plan.dataset, "counts": counts, "files": list(outputs)}
        write_file(out / MARKER, json.dumps(marker).encode())
    print_summary(plan, splits, out, len(absent), len(outputs))


def is_finished(plan: Plan, out: Path) -> bool:
    """Whether an earlier run got to its end, and every file that it counted is still there."""
    try:
        marker = json.loads((out / MARKER).read_text(encoding="utf-8"))
        there = FileSet(out)
        return marker["dataset"] == plan.dataset and all(map(there.has, marker["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def complete_samples(
    plan: Plan, splits: dict[str, list[Sample]], index: Index, there: FileSet, options: Options
) -> dict[str, list[Sample]]:
    """The samples of which everything can be had. UserError unless these are all, or a part is allowed."""

    def available(output: Output) -> bool:
        done = not options.force and there.has(output.target)
        return done or output.source is None or output.source in index.files

    splits = {split: splits.get(split, []) for split in plan.counts if splits.get(split) or split not in plan.optional}
    whole = {split: [sample for sample in samples if all(map(available, sample))] for split, samples in splits.items()}
    if not any(whole.values()) or not (options.allow_partial or has_official_counts(plan, whole)):
        found = ", ".join(f"{split} {len(samples)} of {plan.counts[split]}" for split, samples in whole.items())
        absent = [o.target for samples in splits.values() for sample in samples for o in sample if not available(o)]
        lost = f"; {len(set(absent))} files have no source, the first is {absent[0]}" if absent else ""
        archives = ", ".join(f"{archive.name} ({archive.origin})" for archive in plan.archives)
        raise UserError(
            f"{plan.dataset}: {', '.join(map(str, options.sources))} has only part of it: {found}{lost}. Name with "
            f"--from {archives}, or the folders they unpack to; --allow-partial prepares what is there"
        )
    return {split: samples for split, samples in whole.items() if samples}


def has_official_counts(plan: Plan, splits: Mapping[str, Sequence[Sample]]) -> bool:
    """Whether each split has its official count; an optional one may be absent."""
    required = {split for split in plan.counts if split in splits or split not in plan.optional}
    return all(len(splits.get(split, ())) == plan.counts[split] for split in required)


def read_names(index: Index, key: Key) -> list[str]:
    """The names in a list of the archives, one a line; [] where there is none. UserError: no such list."""
    if key not in index.texts:
        return []
    found = index.files[key]
    lines = index.texts[key].decode("utf-8", errors="replace").split()
    for line in lines:
        if not re.fullmatch(r"\w+", line, re.ASCII):
            raise UserError(f"{found.source}: {found.name} names {line!r}, which is no image of this data set")
    return lines


def check_space(out: Path, absent: Iterable[Output], index: Index) -> None:
    """UserError where the disk has less room than the files will take, which is about what their sources take."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    needed = 0
    for output in absent:
        found = index.files[output.source] if output.source is not None else None
        linked = output.make is None and found and found.path and found.path.stat().st_dev == place.stat().st_dev
        needed += 0 if linked else -(-(found.size if found else DRAWN_MASK) // BLOCK) * BLOCK
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{out}: about {needed / 2**30:.2f} GiB are to be written, {free / 2**30:.2f} GiB are free; "
            "make room or choose another --out"
        )


def make_tasks(plan: Plan, absent: Iterable[Output], index: Index, out: Path) -> Iterator[Task]:
    """A task per output, the sources read in their own order, each once and no further than needed."""
    waiting: dict[Path, dict[Key, list[Output]]] = defaultdict(lambda: defaultdict(list))
    for output in absent:
        if output.source is None:
            yield Task(out / output.target, output.target, None, output.make, output.args)
        else:
            waiting[index.files[output.source].source][output.source].append(output)
    for source, keys in waiting.items():
        for key, entry in select_entries(source, plan.kinds):
            found = keys.pop(key, ())
            content = entry.path or (entry.read() if found else None)
            for output in found:
                name = f"{source}: {entry.name}" if entry.path is None else str(entry.path)
                yield Task(out / output.target, name, content, output.make, output.args)
            if not keys:
                break


def check_outputs(outputs: Iterable[str], out: Path) -> None:
    there = FileSet(out)
    missing = [target for target in outputs if not there.has(target)]
    if missing:
        raise UserError(
            f"{out / missing[0]} was not made ({len(missing)} files are missing): did an archive change meanwhile? "
            "Run the same command again"
        )


def write_lists(plan: Plan, splits: dict[str, list[Sample]], options: Options) -> None:
    """The names of each split, one a line. Without force, a list that names something else is left alone."""
    for split, samples in splits.items() if plan.lists else ():
        path = options.out / plan.lists.format(split=split)
        lines = [Path(sample[0].target).stem for sample in samples]
        before = path.read_text(encoding="utf-8", errors="replace").split() if path.is_file() else []
        if before == lines:
            continue
        if set(before) <= set(lines) or options.force:  # of a part of the data set, prepared earlier
            write_file(path, "".join(f"{line}\n" for line in lines).encode())
        else:
            print(f"{path}: left as it is, though it names other images; --force writes it anew")


def print_summary(plan: Plan, splits: dict[str, list[Sample]], out: Path, made: int, total: int) -> None:
    counts = ", ".join(f"{split} {len(samples)}" for split, samples in splits.items())
    print(f"{out}: {counts} images; {made} files made, {total - made} were there")
    root = "" if out == Path("data", plan.dataset) else f" data_root={out}"
    print(f"next: python -m allspark check --dataset {plan.dataset} --method allspark --split {plan.split}{root}")
