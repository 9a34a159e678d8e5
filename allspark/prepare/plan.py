"""A data set's plan, i.e. which files are made from which sources, and `prepare`, which carries it out."""

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
from allspark.prepare.jobs import Task, run_tasks, write_file
from allspark.utils.atomic import remove_temporaries
from allspark.utils.errors import UserError

MARKER = "prepared.json"  # in the finished data set, with its counts and files
BLOCK = 4096  # bytes; disk usage of a file is a multiple
DRAWN_MASK = 2 * BLOCK  # bytes; typical size of a mask drawn from annotations


@dataclass(frozen=True)
class Archive:
    """An official archive. digest: as published, or None; urls: empty if it needs a login or has moved."""

    name: str
    origin: str
    urls: tuple[str, ...] = ()
    digest: str | None = None


@dataclass(frozen=True)
class Output:
    """A file of the prepared data set.

    Args:
        target: path below the root.
        source: file it is made from; None if `args` contains everything.
        make, args: as in Task.
    """

    target: str
    source: Key | None
    make: Callable[..., bytes] | None = None
    args: tuple[Any, ...] = ()


Sample = tuple[Output, ...]  # an image and its masks


@dataclass(frozen=True)
class Plan:
    """How a data set is prepared.

    Args:
        counts: official number of samples of each split.
        samples: (index, ignore_unknown) -> the samples of each split.
        split: a published split, for the command shown at the end.
        optional: splits that may be missing as a whole.
        lists: path of a split's list of names, containing {split}; None: no lists.
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
    """The command's options.

    Args:
        force: make all files again.
        allow_partial: leave out what the sources lack.
        ignore_unknown: ignore pixels with labels of no class.
    """

    sources: tuple[Path, ...]
    out: Path
    workers: int
    force: bool = False
    allow_partial: bool = False
    ignore_unknown: bool = False


@dataclass
class FileSet:
    """Which files exist; lists each folder once. Empty files, as left by a crash of the machine, do not count."""

    root: Path
    known: dict[Path, set[str]] = field(default_factory=dict)

    def has(self, target: str) -> bool:
        path = self.root / target
        if path.parent not in self.known:
            entries = os.scandir(path.parent) if path.parent.is_dir() else ()
            self.known[path.parent] = {entry.name for entry in entries if entry.is_file() and entry.stat().st_size > 0}
        return path.name in self.known[path.parent]


def prepare(plan: Plan, options: Options) -> None:
    """Make all files that do not exist yet. UserError: a source is missing or bad, or the disk is full."""
    out = options.out
    if not options.force and is_finished(plan, out):
        print(f"{out}: already prepared; --force prepares it again")
        return
    index = index_sources(find_sources(options.sources, [archive.name for archive in plan.archives]), plan.kinds)
    existing = FileSet(out)
    splits = complete_samples(plan, plan.samples(index, options.ignore_unknown), index, existing, options)
    outputs = {output.target: output for samples in splits.values() for sample in samples for output in sample}
    absent = [output for output in outputs.values() if options.force or not existing.has(output.target)]
    for folder in {(out / output.target).parent for output in outputs.values()}:
        remove_temporaries(folder)
    check_space(out, absent, index)
    if absent:
        run_tasks(make_tasks(plan, absent, index, out), len(absent), options.workers, f"prepare {plan.dataset}")
    finished = FileSet(out)
    if missing := [target for target in outputs if not finished.has(target)]:
        raise UserError(
            f"{out / missing[0]} was not written ({len(missing)} files are missing): did an archive change meanwhile? "
            "Run the same command again"
        )
    write_lists(plan, splits, options)
    if has_official_counts(plan, splits) and splits.keys() == plan.counts.keys():  # otherwise a later run may add to it
        counts = {split: len(samples) for split, samples in splits.items()}
        marker = {"dataset": plan.dataset, "counts": counts, "files": list(outputs)}
        write_file(out / MARKER, json.dumps(marker).encode())
    print_summary(plan, splits, out, len(absent), len(outputs))


def is_finished(plan: Plan, out: Path) -> bool:
    """Whether an earlier run finished, and all its files still exist."""
    try:
        marker = json.loads((out / MARKER).read_text(encoding="utf-8"))
        return marker["dataset"] == plan.dataset and all(map(FileSet(out).has, marker["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def complete_samples(
    plan: Plan, splits: dict[str, list[Sample]], index: Index, existing: FileSet, options: Options
) -> dict[str, list[Sample]]:
    """The samples whose files all exist or have a source. UserError unless these are all, or allow_partial."""

    def available(output: Output) -> bool:
        done = not options.force and existing.has(output.target)
        return done or output.source is None or output.source in index.files

    splits = {split: splits.get(split, []) for split in plan.counts if splits.get(split) or split not in plan.optional}
    complete = {
        split: [sample for sample in samples if all(map(available, sample))] for split, samples in splits.items()
    }
    if not any(complete.values()) or not (options.allow_partial or has_official_counts(plan, complete)):
        found = ", ".join(f"{split} {len(samples)} of {plan.counts[split]}" for split, samples in complete.items())
        absent = [o.target for samples in splits.values() for sample in samples for o in sample if not available(o)]
        lost = f"; {len(set(absent))} files have no source, first {absent[0]}" if absent else ""
        archives = ", ".join(f"{archive.name} ({archive.origin})" for archive in plan.archives)
        raise UserError(
            f"{plan.dataset}: {', '.join(map(str, options.sources))} is incomplete: {found}{lost}. Pass with "
            f"--from {archives}, or the folders they unpack to; --allow-partial prepares what is available"
        )
    return {split: samples for split, samples in complete.items() if samples}


def has_official_counts(plan: Plan, splits: Mapping[str, Sequence[Sample]]) -> bool:
    """Whether each split has its official count; optional splits may be missing."""
    required = {split for split in plan.counts if split in splits or split not in plan.optional}
    return all(len(splits.get(split, ())) == plan.counts[split] for split in required)


def read_names(index: Index, key: Key) -> list[str]:
    """Names in a list from the archives, one per line; [] if the list is missing. UserError: a line is not a name."""
    if key not in index.texts:
        return []
    found = index.files[key]
    lines = index.texts[key].decode("utf-8", errors="replace").split()
    for line in lines:
        if not re.fullmatch(r"\w+", line, re.ASCII):
            raise UserError(f"{found.source}: {found.name} contains {line!r}, which is not an image of this data set")
    return lines


def check_space(out: Path, absent: Iterable[Output], index: Index) -> None:
    """UserError if the disk has less space than the files will take, estimated by the size of their sources."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    needed = 0
    for output in absent:
        found = index.files[output.source] if output.source is not None else None
        linked = output.make is None and found and found.path and found.path.stat().st_dev == place.stat().st_dev
        needed += 0 if linked else -(-(found.size if found else DRAWN_MASK) // BLOCK) * BLOCK
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{out}: about {needed / 2**30:.2f} GiB will be written, {free / 2**30:.2f} GiB are free; "
            "free disk space or choose another --out"
        )


def make_tasks(plan: Plan, absent: Iterable[Output], index: Index, out: Path) -> Iterator[Task]:
    """A task per output. Each source is read once, in its own order, and no further than needed."""
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


def write_lists(plan: Plan, splits: dict[str, list[Sample]], options: Options) -> None:
    """Write the names of each split, one per line. Without force, a list with other names is left unchanged."""
    for split, samples in splits.items() if plan.lists else ():
        path = options.out / plan.lists.format(split=split)
        lines = [Path(sample[0].target).stem for sample in samples]
        before = path.read_text(encoding="utf-8", errors="replace").split() if path.is_file() else []
        if before == lines:
            continue
        if set(before) <= set(lines) or options.force:  # from a part of the data set, prepared earlier
            write_file(path, "".join(f"{line}\n" for line in lines).encode())
        else:
            print(f"{path}: left unchanged, although it contains other images; --force overwrites it")


def print_summary(plan: Plan, splits: dict[str, list[Sample]], out: Path, made: int, total: int) -> None:
    counts = ", ".join(f"{split} {len(samples)}" for split, samples in splits.items())
    print(f"{out}: {counts} images; {made} files written, {total - made} existed")
    root = "" if out == Path("data", plan.dataset) else f" data_root={out}"
    print(f"next: python -m allspark check --dataset {plan.dataset} --method allspark --split {plan.split}{root}")
