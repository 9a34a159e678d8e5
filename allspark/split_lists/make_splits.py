"""Creating new splits: seeded, nested, class-balanced lists of labeled and unlabeled images."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from allspark.data.entries import Entry
from allspark.data.mask_io import read_mask
from allspark.data.spec import DatasetSpec, Sample
from allspark.data.splits import check_files
from allspark.utils.atomic import write_text
from allspark.utils.errors import UserError
from allspark.utils.parallel import run_in_threads, summarize_errors


def make_splits(
    entries: Sequence[Entry], spec: DatasetSpec, sizes: dict[str, int], seed: int, bare: Sequence[Entry] = ()
) -> dict[str, tuple[list[Entry], list[Entry]]]:
    """Create splits whose labeled lists are prefixes of one class-balanced sequence, so smaller ones are nested.

    Args:
        entries: the train list, all with masks.
        sizes: split name -> number of labeled images.
        bare: images without a mask, unlabeled in every split.

    Returns:
        Split name -> (labeled entries in drawing order, unlabeled entries in the order of the train list).
    """
    for entry in entries:
        if entry.sample.mask is None:
            raise UserError(
                f"{entry.source}: {entry.sample.image} has no mask; class balancing needs a mask for each image"
            )
    for name, size in sizes.items():
        if not 0 < size <= len(entries):
            raise UserError(f"split {name}: {size} labeled of {len(entries)} images; give 1..{len(entries)}")
    check_files(entries)
    shares = run_in_threads([partial(class_shares, entry.sample, spec) for entry in entries])
    if errors := [result for result in shares if isinstance(result, UserError)]:
        raise UserError(summarize_errors(errors, len(entries)))
    pixels = np.stack(shares)
    if (pixels.sum(0) > 0).sum() < 2 <= spec.num_classes and pixels.sum() < len(pixels):
        raise UserError(
            f"the masks show at most one of {spec.num_classes} classes, and ignored pixels: nothing to balance; "
            "`python -m allspark check` shows what they contain and suggests a map for the config"
        )
    drawn = balanced_order(pixels, max(sizes.values()), seed)
    splits = {}
    for name, size in sizes.items():
        chosen = set(drawn[:size])
        rest = [entry for index, entry in enumerate(entries) if index not in chosen]
        splits[name] = ([entries[index] for index in drawn[:size]], [*rest, *bare])
    return splits


def hold_out(
    entries: Sequence[Entry], count: int, seed: int, group: Callable[[Entry], str] | None = None
) -> tuple[list[Entry], list[Entry]]:
    """Split off `count` random entries for evaluation -> (val, rest), both in the order of the list.

    Args:
        group: entries with the same group stay together: whole groups are drawn while that comes nearer to `count`.
    """
    if not 0 < count < len(entries):
        raise UserError(f"--val: {count} of {len(entries)} images; give 1..{len(entries) - 1}")
    random = np.random.default_rng(seed)
    if group is None:
        chosen = set(random.permutation(len(entries))[:count].tolist())
    else:
        members = defaultdict(list)
        for index, entry in enumerate(entries):
            members[group(entry)].append(index)
        if len(members) < 2:
            raise UserError(f"--group: all {len(entries)} images are one group ({next(iter(members))}); none is left")
        chosen = set()
        for name in random.permutation(sorted(members)).tolist()[:-1]:  # one group is left
            if abs(len(chosen) + len(members[name]) - count) < abs(len(chosen) - count):
                chosen.update(members[name])
        chosen = chosen or set(min(members.values(), key=len))  # all are too large
    val = [entry for index, entry in enumerate(entries) if index in chosen]
    return val, [entry for index, entry in enumerate(entries) if index not in chosen]


def group_by_name(pattern: str, root: Path) -> Callable[[Entry], str]:
    """The group of an entry: what `pattern` finds in its image's path below the root, or what its parentheses match.

    Raises:
        UserError: the pattern is no regular expression; of the function, it finds nothing.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--group '{pattern}': not a regular expression ({error})") from None

    def group(entry: Entry) -> str:
        name = os.path.relpath(entry.sample.image, root)
        found = expression.search(name)
        if found is None:
            raise UserError(
                f"--group '{pattern}': does not match {name}, the path below the data root; every image must match "
                "(a trailing |$ makes a group of all others)"
            )
        return "/".join(part or "" for part in found.groups()) if expression.groups else found[0]

    return group


def class_shares(sample: Sample, spec: DatasetSpec) -> np.ndarray:
    """(K,) share of each class among the pixels of a mask."""
    mask = read_mask(sample.mask, spec)
    return np.bincount(mask.ravel(), minlength=256)[: spec.num_classes] / mask.size


def balanced_order(shares: np.ndarray, length: int, seed: int) -> list[int]:
    """Indices of the first `length` images of a class-balanced sequence.

    Repeatedly takes the class that the fewest chosen images show (ties: that the fewest images show at all), and
    chooses the next image in a seeded random order that shows it. An image shows a class that covers 0.1 % of it; for
    a class that covers so much of no image, any pixel counts.

    Args:
        shares: (N, K) share of each class in each image.
    """
    shows = shares >= 0.001
    never = ~shows.any(axis=0)
    shows[:, never] = shares[:, never] > 0
    order = np.random.default_rng(seed).permutation(len(shares)).tolist()
    waiting = {k: [i for i in reversed(order) if shows[i, k]] for k in np.flatnonzero(shows.any(axis=0)).tolist()}
    rarity, counts = shows.sum(axis=0), np.zeros(shows.shape[1], int)
    chosen: dict[int, None] = {}  # an ordered set
    anything = list(reversed(order))  # fallback; images without any class come last
    while len(chosen) < length:
        if waiting:
            k = min(waiting, key=lambda k: (counts[k], rarity[k], k))
            queue = waiting[k]
        else:
            queue = anything
        while queue and queue[-1] in chosen:
            queue.pop()
        if queue:
            index = queue.pop()
            chosen[index] = None
            counts += shows[index]
        else:
            del waiting[k]
    return list(chosen)


def parse_sizes(text: str, total: int, option: str = "--sizes") -> dict[str, int]:
    """'1_8,32' -> {'1_8': ceil(total / 8), '32': 32}; rounded up, as in most published lists."""
    sizes = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        fraction = re.fullmatch(r"(\d+)_(\d+)", name)
        if fraction and int(fraction[2]):
            sizes[name] = -(-total * int(fraction[1]) // int(fraction[2]))
        elif name.isascii() and name.isdigit():
            sizes[name] = int(name)
        else:
            raise UserError(f"{option}: '{name}' is neither a fraction such as 1_8 nor a count such as 32")
    if not sizes:
        raise UserError(f"{option}: give fractions such as 1_8 or counts such as 32, separated by commas")
    return sizes


def write_splits(
    splits: dict[str, tuple[list[Entry], list[Entry]]],
    data_root: Path,
    out: Path,
    force: bool = False,
    val: list[Entry] | None = None,
) -> list[Path]:
    """Write <out>/<split>/{labeled,unlabeled}.txt and <out>/val.txt.

    Raises:
        UserError: before any is written: one exists with other images, and not `force`.
    """
    files = {
        out / name / f"{kind}.txt": entries
        for name, pair in splits.items()
        for kind, entries in zip(("labeled", "unlabeled"), pair, strict=True)
    }
    if val is not None:
        files[out / "val.txt"] = val
    texts = {
        path: "".join(f"{list_line(entry.sample, data_root)}\n" for entry in entries) for path, entries in files.items()
    }
    others = [path for path, text in texts.items() if path.is_file() and path.read_bytes() != text.encode()]
    if others and not force:
        raise UserError(
            f"{others[0]} already exists with other lines ({len(others)} of {len(files)} lists); --force overwrites"
        )
    for path, text in texts.items():
        write_text(path, text, "free disk space or choose another --out")
    return list(files)


def list_line(sample: Sample, data_root: Path) -> str:
    """`image mask` or `image`; with a tab between or after them if a name contains any kind of blank."""
    paths = [path for path in (sample.image, sample.mask) if path]
    names = [(p.relative_to(data_root) if p.is_relative_to(data_root) else p).as_posix() for p in paths]
    if any(len(name.split()) > 1 for name in names):
        return "\t".join(names) if sample.mask else f"{names[0]}\t"
    return " ".join(names)
