"""Drawing new splits: seeded, nested, class-balanced lists of labeled and unlabeled images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from allspark.data.base import at_once
from allspark.data.image_io import read_mask
from allspark.data.spec import DatasetSpec, Sample
from allspark.data.splits import Entry, check_files
from allspark.utils.atomic import write_text
from allspark.utils.errors import UserError


def make_splits(
    entries: Sequence[Entry], spec: DatasetSpec, sizes: dict[str, int], seed: int, bare: Sequence[Entry] = ()
) -> dict[str, tuple[list[Entry], list[Entry]]]:
    """Split name -> (labeled entries in the order they were drawn, unlabeled entries in the order of the train list).

    Every labeled list is a prefix of the same sequence, so a smaller one is contained in a larger one. bare: images
    without a mask, unlabeled in every split.
    """
    for entry in entries:
        if entry.sample.mask is None:
            raise UserError(
                f"{entry.source}: {entry.sample.image} has no mask; a balanced draw needs the train list's masks"
            )
    most = len(entries) - (not bare)
    for name, size in sizes.items():
        if not 0 < size <= most:
            raise UserError(f"split {name}: {size} labeled of {len(entries)} images; give 1..{most}")
    check_files(entries)
    pixels = np.stack(at_once([partial(class_shares, entry.sample, spec) for entry in entries]))
    if (pixels.sum(0) > 0).sum() < 2 <= spec.num_classes and pixels.sum() < len(pixels):
        raise UserError(
            f"the masks show one of {spec.num_classes} classes at most, and ignored pixels, so there is nothing to "
            "balance; `python -m allspark check` tells what they hold and which map to put into the recipe"
        )
    drawn = balanced_order(pixels, max(sizes.values()), seed)
    splits = {}
    for name, size in sizes.items():
        chosen = set(drawn[:size])
        rest = [entry for index, entry in enumerate(entries) if index not in chosen]
        splits[name] = ([entries[index] for index in drawn[:size]], [*rest, *bare])
    return splits


def hold_out(entries: Sequence[Entry], count: int, seed: int) -> tuple[list[Entry], list[Entry]]:
    """`count` entries by a seeded draw, to evaluate on, and the others; both in the order of the list."""
    if not 0 < count < len(entries):
        raise UserError(f"--val: {count} of {len(entries)} images; give 1..{len(entries) - 1}")
    chosen = set(np.random.default_rng(seed).permutation(len(entries))[:count].tolist())
    held = [entry for index, entry in enumerate(entries) if index in chosen]
    return held, [entry for index, entry in enumerate(entries) if index not in chosen]


def class_shares(sample: Sample, spec: DatasetSpec) -> np.ndarray:
    """(K,) the share of each class among the pixels of a mask."""
    mask = read_mask(sample.mask, spec)
    return np.bincount(mask.ravel(), minlength=256)[: spec.num_classes] / mask.size


def balanced_order(shares: np.ndarray, length: int, seed: int) -> list[int]:
    """The first `length` images of a class-balanced sequence; shares (N, K) of pixels.

    Again and again, the class that is shown by the fewest chosen images (of equals, the one that the fewest images show
    at all) gets the next image of a seeded random order that shows it. An image shows a class that covers 0.1 % of it,
    or any pixel of it where no image does.
    """
    shows = shares >= 0.001
    never = ~shows.any(axis=0)
    shows[:, never] = shares[:, never] > 0
    order = np.random.default_rng(seed).permutation(len(shares)).tolist()
    waiting = {k: [i for i in reversed(order) if shows[i, k]] for k in np.flatnonzero(shows.any(axis=0)).tolist()}
    rarity, counts = shows.sum(axis=0), np.zeros(shows.shape[1], int)
    chosen: dict[int, None] = {}  # a set that keeps its order
    anything = list(reversed(order))  # images without any class come last
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


def parse_sizes(text: str, total: int, word: str = "--sizes") -> dict[str, int]:
    """'1_8,32' -> {'1_8': ceil(total / 8), '32': 32}; rounded up, as the published lists are."""
    sizes = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        fraction = re.fullmatch(r"(\d+)_(\d+)", name)
        if fraction and int(fraction[2]):
            sizes[name] = -(-total * int(fraction[1]) // int(fraction[2]))
        elif name.isascii() and name.isdigit():
            sizes[name] = int(name)
        else:
            raise UserError(f"{word}: '{name}' is neither a fraction such as 1_8 nor a count such as 32")
    if not sizes:
        raise UserError(f"{word}: give fractions such as 1_8 or counts such as 32, separated by commas")
    return sizes


def write_splits(
    splits: dict[str, tuple[list[Entry], list[Entry]]],
    data_root: Path,
    out: Path,
    force: bool = False,
    val: list[Entry] | None = None,
) -> list[Path]:
    """Write <out>/<split>/{labeled,unlabeled}.txt, <out>/val.txt; UserError before anything is written where one is."""
    files = {
        out / name / f"{kind}.txt": entries
        for name, pair in splits.items()
        for kind, entries in zip(("labeled", "unlabeled"), pair, strict=True)
    }
    if val is not None:
        files[out / "val.txt"] = val
    there = [path for path in files if path.exists()]
    if there and not force:
        raise UserError(f"{there[0]} is there already ({len(there)} of {len(files)} lists); --force overwrites")
    for path, entries in files.items():
        text = "".join(f"{list_line(entry.sample, data_root)}\n" for entry in entries)
        write_text(path, text, "make room or choose another --out")
    return list(files)


def list_line(sample: Sample, data_root: Path) -> str:
    """`image mask` or `image`; a tab is between or behind them where a name has a blank in it, of whatever kind."""
    paths = [path for path in (sample.image, sample.mask) if path]
    names = [(p.relative_to(data_root) if p.is_relative_to(data_root) else p).as_posix() for p in paths]
    if any(len(name.split()) > 1 for name in names):
        return "\t".join(names) if sample.mask else f"{names[0]}\t"
    return " ".join(names)
