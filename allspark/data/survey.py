"""Every file of a run's lists opened, and all that is wrong with them told at once: what `check` is for."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from allspark.config import CustomDataConfig, DataConfig
from allspark.data.base import (
    IGNORE_INDEX,
    MIN_SIDE,
    THREADS,
    BadSample,
    DatasetSpec,
    Sample,
    color_name,
    differing,
    opened,
    read_image,
    read_mask,
    stored_colors,
    stored_mask,
)
from allspark.data.preflight import NAMED, overlaps
from allspark.data.splits import Lists, folder_reader, hint
from allspark.utils.errors import UserError

KINDS = ("labeled", "val", "unlabeled")
MANY = 40  # different values in masks, from which on no map is worth printing


@dataclass
class Findings:
    """notes: worth knowing; warnings: worth a thought; problems: what would stop a run or make it meaningless."""

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def told(self) -> Iterator[None]:
        """A UserError inside is one problem among others."""
        try:
            yield
        except UserError as error:
            self.problems.append(str(error))

    def add(self, other: Findings) -> None:
        for name, lines in vars(other).items():
            getattr(self, name).extend(lines)


@dataclass(frozen=True)
class Look:
    """What a sample's files hold. values: stored value (or 0xRRGGBB) -> pixels of the mask, colored says which.

    illegal: whether some of the values are no class; that, and RGB without a color_map, is told of all masks together.
    """

    kind: str
    sample: Sample
    size: tuple[int, int] | None = None  # width, height of the image
    digest: bytes = b""  # of the image file
    values: Counter = field(default_factory=Counter)
    colored: bool = False
    illegal: UserError | None = None
    errors: tuple[UserError, ...] = ()


def survey(data: DataConfig, spec: DatasetSpec, lists: Lists, at_most: int | None = None) -> Findings:
    """Opens all files of the lists, or at most so many of each, spread evenly over it."""
    gone, there = missing(lists)
    samples = [(kind, sample) for kind in KINDS for sample in spread(there[kind], at_most)]
    with ThreadPoolExecutor(THREADS) as pool:
        looked = pool.map(lambda item: look(*item, spec), samples)
        looks = list(tqdm(looked, "check", len(samples), unit="image", leave=False, disable=None))
    counts = ", ".join(f"{len(getattr(lists, kind))} {kind}" for kind in ("labeled", "unlabeled", "val"))
    found = Findings([f"{spec.name}, split {lists.name} ({lists.hash[:12]}): {counts} images"])
    found.problems += gone
    if len(samples) < sum(map(len, there.values())):
        found.notes.append(f"of these {len(samples)} were opened; without --quick it is all of them")
    found.add(unreadable(looks, skip=data.on_bad_sample == "skip"))
    found.add(sizes(looks, data.crop_size))
    found.add(mask_values(looks, spec, data.custom, skip=data.on_bad_sample == "skip"))
    found.warnings += [*overlaps(lists), *copies(looks)]
    return found


def missing(lists: Lists) -> tuple[list[str], dict[str, list[Sample]]]:
    """What to say of files that do not exist, and the samples of each list that have all of theirs."""
    exists, gone, there = folder_reader(), [], {}
    for kind in KINDS:
        files = {sample: [path for path in (sample.image, sample.mask) if path] for sample in getattr(lists, kind)}
        for mask in (False, True):
            files_of = {sample.mask if mask else sample.image for sample in getattr(lists, kind)} - {None}
            absent = sorted(path for path in files_of if not exists(path))
            remedy = "correct the list, data.custom or data_root"
            lines = [f"{path}: does not exist ({kind}); {remedy}" for path in absent]
            if len(lines) > 1 and len(absent) == len(files_of):  # all of them: one cause
                likely = hint(absent[0]) if mask else ""
                other = f"{kind} {'mask' if mask else 'image'}"
                lines = [f"{absent[0]}: does not exist, nor does any other {other} ({len(absent)}){likely}; {remedy}"]
            gone += bounded(lines, kind)
        there[kind] = [sample for sample in getattr(lists, kind) if all(map(exists, files[sample]))]
    return gone, there


def spread(samples: Sequence[Sample], at_most: int | None) -> Sequence[Sample]:
    if at_most is None or len(samples) <= at_most:
        return samples
    return [samples[index * len(samples) // at_most] for index in range(at_most)]


def look(kind: str, sample: Sample, spec: DatasetSpec) -> Look:
    """Reads image and mask as training does; keeps no pixel."""
    size, digest, errors, illegal, values, colored = None, b"", [], None, Counter(), False
    try:
        height, width = read_image(sample.image).shape[:2]
        size, digest = (width, height), hashlib.blake2b(sample.image.read_bytes(), digest_size=16).digest()
        if kind == "val" and min(size) < MIN_SIDE:
            told = f"{width} x {height} pixels; evaluation needs at least {MIN_SIDE} on each side"
            errors.append(UserError(f"{sample.image}: {told}"))
    except UserError as error:
        errors.append(error)
    if sample.mask is not None:
        try:
            values, colored, mask_size = stored_values(sample.mask, spec)
            illegal = why_illegal(sample.mask, values, colored, spec)
            if size is not None and mask_size != size:
                errors.append(differing(sample, size, mask_size))
        except UserError as error:
            errors.append(error)
    return Look(kind, sample, size, digest, values, colored, illegal, tuple(errors))


def stored_values(path: Path, spec: DatasetSpec) -> tuple[Counter, bool, tuple[int, int]]:
    """Stored value or colour -> pixels, whether these are colours, and the size (width, height)."""
    with opened(path) as image:
        of_values = image.mode in ("1", "L", "P", "F") or image.mode.startswith("I")
    colored = spec.colors is not None or not of_values
    stored = stored_colors(path) if colored else stored_mask(path)
    values, counts = np.unique(stored, return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True))), colored, stored.shape[::-1]


def why_illegal(path: Path, values: Counter, colored: bool, spec: DatasetSpec) -> UserError | None:
    """What training would say of the mask; the values tell whether it is worth asking."""
    stored = np.array(list(values))
    if spec.colors is not None:
        legal = not spec.colors.decode(stored)[1].any()
    elif colored:
        legal = False
    else:
        indices = spec.decode_mask(stored.astype(np.uint8)[None])
        legal = ((indices < spec.num_classes) | (indices == spec.ignore_index)).all()
    if legal:
        return None
    try:
        read_mask(path, spec)
    except UserError as error:
        return error
    return None


def unreadable(looks: Sequence[Look], skip: bool) -> Findings:
    """Files that are no images, each by name up to a bound. Those that training will replace are warnings."""
    found = Findings()
    for kind in KINDS:
        replaced, errors = [], []
        of_kind = [seen for seen in looks if seen.kind == kind]
        replaceable = skip and kind != "val" and not all(seen.errors for seen in of_kind)
        for error in (error for seen in of_kind for error in seen.errors):
            if replaceable and isinstance(error, BadSample):
                replaced.append(f"{kind} sample that training will replace: {error}")
            else:
                errors.append(str(error))
        found.warnings += bounded(replaced, kind)
        found.problems += bounded(errors, kind)
    return found


def bounded(lines: list[str], kind: str) -> list[str]:
    more = [f"and {len(lines) - NAMED} more {kind} samples"] if len(lines) > NAMED else []
    return lines[:NAMED] + more


def sizes(looks: Sequence[Look], crop: int) -> Findings:
    """Smallest and largest image of each list, and how many are smaller than a crop."""
    found = Findings()
    for kind in KINDS:
        of_kind = [seen.size for seen in looks if seen.kind == kind and seen.size is not None]
        if not of_kind:
            continue
        least, most = min(of_kind, key=np.prod), max(of_kind, key=np.prod)
        told = f"{least[0]} x {least[1]}" + (f" to {most[0]} x {most[1]}" if most != least else "")
        small = sum(min(size) < crop for size in of_kind)
        padded = f"; {small} are smaller than the crop of {crop} and get padded" if small and kind != "val" else ""
        found.notes.append(f"{kind} images: {told} pixels{padded}")
    return found


def mask_values(looks: Sequence[Look], spec: DatasetSpec, custom: CustomDataConfig | None, skip: bool) -> Findings:
    """What the masks of labeled and val hold: values that are no class, with a map; the pixels of each class."""
    found = illegal_values([seen for seen in looks if seen.values], spec, custom, skip)
    legal = [seen for seen in looks if seen.values and seen.illegal is None]
    shown = {kind: classes_of([seen for seen in legal if seen.kind == kind], spec) for kind in ("labeled", "val")}
    found.notes += class_table(spec, shown)
    for kind in ("labeled", "val"):
        if any(seen.kind == kind for seen in legal) and not any(images for images, _ in shown[kind]):
            found.problems.append(f"no pixel of the {kind} masks has a class, all are {spec.ignore_index}")
    absent = [name for name, (images, _) in zip(spec.classes, shown["labeled"], strict=True) if not images]
    if not absent or not any(seen.kind == "labeled" for seen in legal) or found.problems:
        return found
    if len(absent) == spec.num_classes - 1 and decoded(total(legal), spec)[IGNORE_INDEX]:
        one = next(name for name in spec.classes if name not in absent)
        found.problems.append(
            f"the labeled masks show no other class than {one}, and ignored pixels. "
            f"{remedy(total(legal), legal[0].colored, spec, custom)}"
        )
    else:
        found.warnings.append(f"classes in none of the labeled images: {', '.join(absent)}")
    return found


def illegal_values(masks: Sequence[Look], spec: DatasetSpec, custom: CustomDataConfig | None, skip: bool) -> Findings:
    """One problem for all masks with values that are no class, or with colours; a warning if training replaces them."""
    illegal = [seen for seen in masks if seen.illegal is not None]
    if not illegal:
        return Findings()
    first, *others = illegal
    more = f" (and {len(others)} more of {len(masks)} masks)" if others else ""
    alike = [seen for seen in masks if seen.colored == first.colored]
    told = f"{first.illegal}{more}. {remedy(total(alike), first.colored, spec, custom)}"
    labeled = [seen for seen in masks if seen.kind == "labeled"]
    if skip and all(seen.kind == "labeled" for seen in illegal) and len(illegal) < len(labeled):
        return Findings(warnings=[f"{len(illegal)} labeled samples that training will replace: {told}"])
    return Findings(problems=[told])


def total(looks: Iterable[Look]) -> Counter:
    values: Counter = Counter()
    for seen in looks:
        values.update(seen.values)
    return values


def decoded(values: Counter, spec: DatasetSpec) -> Counter:
    """Class index or IGNORE_INDEX -> pixels."""
    stored = np.array(list(values))
    indices = spec.colors.decode(stored)[0] if spec.colors else spec.decode_mask(stored.astype(np.uint8)[None])[0]
    found: Counter = Counter()
    for index, count in zip(indices.tolist(), values.values(), strict=True):
        found[index] += count
    return found


def classes_of(looks: Sequence[Look], spec: DatasetSpec) -> list[tuple[int, float]]:
    """Of each class: the images that show it, and its share of the pixels that have a class."""
    images, pixels = Counter(), Counter()
    for seen in looks:
        counts = decoded(seen.values, spec)
        images.update(counts.keys())
        pixels.update(counts)
    labeled = sum(pixels[index] for index in range(spec.num_classes)) or 1
    return [(images[index], pixels[index] / labeled) for index in range(spec.num_classes)]


def class_table(spec: DatasetSpec, shown: dict[str, list[tuple[int, float]]]) -> list[str]:
    width = max(map(len, (*spec.classes, "class")))
    lines = [f"{'class':{width}}  {'labeled: images':>16} {'pixels':>7}  {'val: images':>12} {'pixels':>7}"]
    for index, name in enumerate(spec.classes):
        (images, share), (val_images, val_share) = (shown[kind][index] for kind in ("labeled", "val"))
        lines.append(f"{name:{width}}  {images:16} {share:7.2%}  {val_images:12} {val_share:7.2%}")
    return lines


def remedy(values: Counter, colored: bool, spec: DatasetSpec, custom: CustomDataConfig | None) -> str:
    """The histogram of what masks hold, and the map that would make classes of it, where one can be guessed."""
    name = color_name if colored else str
    pixels = sum(values.values())
    # The rarest of many are the smooth borders or JPEG's noise between the real ones
    common = [value for value, _ in values.most_common(MANY if len(values) <= MANY else 8)]
    shown = ", ".join(f"{name(value)} ({values[value] / pixels:.2%})" for value in sorted(common))
    more = f" and {len(values) - len(common)} more" if len(values) > len(common) else ""
    told = f"All these masks together hold {shown}{more}. "
    if custom is None:
        return told + "The data set's values are fixed: prepare it again, or describe yours in data.custom"
    guess = guessed_map(sorted(values), spec.num_classes, colored)
    if guess is None:
        if len(values) > 2 * spec.num_classes + 2:
            told += "So many come from JPEG or a smooth resize: save masks as PNG, resize them by nearest-neighbour. "
        kind, key = ("colours", "color_map") if colored else ("values", "value_map")
        return f"{told}{len(values)} {kind} for {spec.num_classes} classes: say by data.custom.{key} what each means"
    quote = '"' if colored else ""
    targets = {value: custom.ignore_index if index == IGNORE_INDEX else index for value, index in guess.items()}
    text = ", ".join(f"{quote}{name(value)}{quote}: {index}" for value, index in targets.items())
    key = "color_map" if colored else "value_map"
    classes = dict(enumerate(spec.classes)) | {IGNORE_INDEX: "ignored"}
    meaning = ", ".join(f"{name(value)} is {classes[index]}" for value, index in guess.items())
    return f"{told}If {meaning}, put into the recipe: data.custom.{key}: {{{text}}}"


def guessed_map(values: Sequence[int], num_classes: int, colored: bool) -> dict[int, int] | None:
    """Stored values in rising order -> classes in theirs. Of one value too many, what is usually void is ignored.

    Where each class is there by its own index, and none beyond, other values mean nothing.
    """
    if not colored and {*range(num_classes)} < {*values} and num_classes not in values:
        return {value: value if value < num_classes else IGNORE_INDEX for value in values}
    if len(values) == num_classes:
        return {value: index for index, value in enumerate(values)}
    void = 0xFFFFFF if colored else IGNORE_INDEX
    if len(values) != num_classes + 1:
        return None
    ignored = void if void in values else 0 if not colored and 0 in values else None
    if ignored is None:
        return None
    others = [value for value in values if value != ignored]
    return dict(sorted({**{value: index for index, value in enumerate(others)}, ignored: IGNORE_INDEX}.items()))


def copies(looks: Sequence[Look]) -> list[str]:
    """Images that stand in two lists under two names: the same file, byte for byte."""
    same = defaultdict(list)
    for seen in looks:
        if seen.digest:
            same[seen.digest].append(seen)
    notes = []
    for first, second in (("labeled", "val"), ("unlabeled", "val"), ("labeled", "unlabeled")):
        pairs = [
            (one.sample.image, other.sample.image)
            for group in same.values()
            for one in group
            if one.kind == first
            for other in group
            if other.kind == second and other.sample.image != one.sample.image
        ]
        if pairs:
            such = " = ".join(map(str, pairs[0]))
            notes.append(f"{len(pairs)} {first} images have a copy among the {second} ones, such as {such}")
    return notes
