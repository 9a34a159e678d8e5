"""What is looked at before the first step: files that cannot be read, masks that mean nothing, lists that overlap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from allspark.config import DataConfig
from allspark.data.base import MIN_SIDE, BadSample, DatasetSpec, Sample, attempts, one_message, read_image, read_pair
from allspark.data.splits import Lists
from allspark.utils.errors import UserError

NAMED = 20  # bad samples, at most


def check_data(data: DataConfig, spec: DatasetSpec, lists: Lists) -> list[str]:
    """Open files before an hour is spent: all labeled samples up to 500, else 200; 50 of val; 20 unlabeled images.

    Returns what is worth knowing; UserError on what would stop the run or make it meaningless.
    """
    rng = np.random.default_rng(0)
    labeled = some(lists.labeled, len(lists.labeled) if len(lists.labeled) <= 500 else 200, rng)
    val, unlabeled = some(lists.val, 50, rng), some(lists.unlabeled, 20, rng)

    found = opened_samples(
        {
            "labeled": [partial(mask_values, sample, spec) for sample in labeled],
            "val": [partial(check_whole, sample, spec) for sample in val],
            "unlabeled": [partial(read_image, sample.image) for sample in unlabeled],
        },
        skip=data.on_bad_sample == "skip",
    )
    counts = f"{len(lists.labeled)} labeled, {len(lists.unlabeled)} unlabeled, {len(lists.val)} val images"
    notes = [f"{spec.name}, split {lists.name} ({lists.hash[:12]}): {counts}"]
    present, ignored = classes_in(found, "labeled", spec, lists)
    if val:
        classes_in(found, "val", spec, lists)
    absent = [name for index, name in enumerate(spec.classes) if index not in present]
    if data.custom is not None and ignored and len(present) == 1 < spec.num_classes:
        raise UserError(
            f"split {lists.name}: the labeled masks show no other class than {spec.classes[present.pop()]}, and "
            "ignored pixels; where these are a class, say so, as in data.custom.value_map: {0: 0, 255: 1}. "
            "`python -m allspark check` tells what the masks hold"
        )
    if absent:
        among = "images" if len(labeled) == len(lists.labeled) else f"images checked ({len(labeled)})"
        notes.append(f"classes in none of the labeled {among}: {', '.join(absent)}")
    return notes + replaced(found) + overlaps(lists)


def opened_samples(tasks: dict[str, list[Callable]], skip: bool) -> dict[str, list]:
    """The results of tasks by list; of samples that training will skip their BadSample.

    UserError for any other, and for a list of which nothing can be read.
    """
    results = iter(attempts([task for listed in tasks.values() for task in listed]))
    found = {kind: [next(results) for _ in listed] for kind, listed in tasks.items()}
    errors = [
        result
        for kind, listed in found.items()
        for result in listed
        if isinstance(result, UserError) and not (skip and kind != "val" and isinstance(result, BadSample))
    ]
    if errors:
        raise UserError(one_message(errors, sum(map(len, tasks.values()))))
    for kind, listed in found.items():
        if listed and all(isinstance(result, UserError) for result in listed):
            raise UserError(f"{listed[0]} (and no other of {len(listed)} {kind} samples checked can be read)")
    return found


def classes_in(found: dict[str, list], kind: str, spec: DatasetSpec, lists: Lists) -> tuple[set[int], bool]:
    """The classes that the masks of a list show, and whether they have ignored pixels. UserError: they show none."""
    values = np.concatenate([result for result in found[kind] if not isinstance(result, UserError)])
    present = set(values.tolist()) - {spec.ignore_index}
    if not present:
        raise UserError(f"split {lists.name}: no pixel of the {kind} masks has a class, all are {spec.ignore_index}")
    return present, spec.ignore_index in values


def replaced(found: dict[str, list]) -> list[str]:
    """Warnings: the samples that training will replace, by name; not more than anybody reads."""
    notes = []
    for kind, listed in found.items():
        bad = [result for result in listed if isinstance(result, UserError)]
        notes += [f"WARNING: {kind} sample that training will replace: {error}" for error in bad[:NAMED]]
        if bad:
            notes.append(f"WARNING: {len(bad)} of {len(listed)} {kind} samples checked cannot be read")
    return notes


def mask_values(sample: Sample, spec: DatasetSpec) -> np.ndarray:
    return np.unique(read_pair(sample, spec)[1])


def hidden_sample(lists: Lists, spec: DatasetSpec, at_most: int) -> tuple[list[Sample], list[str]]:
    """The samples that pseudo-labels are measured on, at equal distances over lists.hidden, and what to say of them.

    Those that cannot be read are left out with a warning: a label that is not trained on must not end a run.
    """
    count = min(at_most, len(lists.hidden))
    chosen = [lists.hidden[index * len(lists.hidden) // count] for index in range(count)]
    found = attempts([partial(check_whole, sample, spec) for sample in chosen])
    broken = [result for result in found if isinstance(result, UserError)]
    notes = [f"WARNING: pseudo-labels are not measured here: {one_message(broken, count)}"] if broken else []
    good = [sample for sample, result in zip(chosen, found, strict=True) if not isinstance(result, UserError)]
    if good:
        notes.append(f"pseudo-labels are measured on {len(good)} unlabeled images, whose labels training never opens")
    return good, notes


def check_whole(sample: Sample, spec: DatasetSpec) -> np.ndarray:
    """The values of its mask; UserError unless the sample can be evaluated on."""
    image, mask = read_pair(sample, spec)
    if min(image.shape[:2]) < MIN_SIDE:
        height, width = image.shape[:2]
        raise UserError(f"{sample.image}: {width} x {height} pixels; evaluation needs at least {MIN_SIDE} on each side")
    return np.unique(mask)


def some(samples: Sequence[Sample], at_most: int, rng: np.random.Generator) -> list[Sample]:
    if len(samples) <= at_most:
        return list(samples)
    return [samples[index] for index in sorted(rng.choice(len(samples), at_most, replace=False))]


def overlaps(lists: Lists) -> list[str]:
    images = {name: [s.image for s in getattr(lists, name)] for name in ("labeled", "unlabeled", "val")}
    notes = [
        f"{len(files) - len(set(files))} images stand more than once in the {name} list"
        for name, files in images.items()
        if len(set(files)) < len(files)
    ]
    for first, second in (("labeled", "unlabeled"), ("labeled", "val"), ("unlabeled", "val")):
        both = set(images[first]) & set(images[second])
        if both:
            notes.append(f"{len(both)} images are both {first} and {second}, such as {min(both)}")
    return notes
