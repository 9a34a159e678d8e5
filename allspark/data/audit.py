"""What is wrong with a run's data: `preflight` opens some files before training, `audit` all of them, for `check`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from allspark.config import CustomDataConfig, DataConfig, Size, height_width, size_text
from allspark.data.datasets.custom import color_table, value_table
from allspark.data.entries import make_exists_check
from allspark.data.image_files import TURNS, BadSample
from allspark.data.mask_io import format_color
from allspark.data.spec import IGNORE_INDEX, DatasetSpec, Sample, pack_color
from allspark.data.splits import Lists, prepare_hint, suggest_file
from allspark.data.survey import SampleReport, compare_bits, compare_whites, find_contradictions, inspect_sample
from allspark.split_lists.manifest import name_clash
from allspark.utils.errors import UserError
from allspark.utils.parallel import THREADS, summarize_errors
from allspark.utils.progress import disable_bar

KINDS = ("labeled", "val", "unlabeled")
PAIRS = (("labeled", "unlabeled"), ("labeled", "val"), ("unlabeled", "val"))
MAX_LINES = 20  # maximum number of messages per list
MAX_VALUES = 40  # different mask values above which no complete histogram is printed


@dataclass
class AuditReport:
    """problems: would stop the run or make it meaningless; warnings: probably a mistake; notes: good to know."""

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def collect_errors(self) -> Iterator[None]:
        """Add a UserError raised inside the block to the problems."""
        try:
            yield
        except UserError as error:
            self.problems.append(str(error))

    def extend(self, other: AuditReport) -> None:
        for name, lines in vars(other).items():
            getattr(self, name).extend(lines)

    @property
    def lines(self) -> list[str]:
        """Notes and warnings, as they are printed."""
        return [*self.notes, *(f"WARNING: {line}" for line in self.warnings)]


def preflight(data: DataConfig, spec: DatasetSpec, lists: Lists) -> list[str]:
    """Open a part of the files before training: all labeled samples up to 500, else 200; 50 val; 20 unlabeled images.

    Returns:
        Messages to log.

    Raises:
        UserError: the first problem found.
    """
    limits = {"labeled": None if len(lists.labeled) <= 500 else 200, "val": 50, "unlabeled": 20}
    samples = {kind: spread(getattr(lists, kind), limit) for kind, limit in limits.items()}
    report, _ = check_samples(data, spec, lists, samples)
    if report.problems:
        first, *others = report.problems
        more = f" (and {len(others)} more problems; `python -m allspark check` lists all)" if others else ""
        raise UserError(f"{first}{more}")
    return AuditReport(report.notes[:1], report.warnings).lines


def audit(data: DataConfig, spec: DatasetSpec, lists: Lists, limit: int | None = None) -> AuditReport:
    """Open all files of the lists, or at most `limit` of each list, and report everything that is wrong."""
    missing, present = find_missing(lists, spec)
    samples = {kind: spread(present[kind], limit) for kind in KINDS}
    report, files = check_samples(data, spec, lists, samples, progress=True)
    report.problems[:0] = missing
    report.warnings += find_copies(files)
    opened, total = (sum(map(len, lists_of.values())) for lists_of in (samples, present))
    if opened < total:
        report.notes.insert(1, f"opened {opened} of these; without --quick all are opened")
    return report


def select_hidden(lists: Lists, spec: DatasetSpec, limit: int) -> tuple[list[Sample], AuditReport]:
    """Choose the unlabeled samples, with known masks, that pseudo-labels are measured on.

    Unreadable samples are left out with a warning: a label that training does not use must not stop a run.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        chosen = spread(lists.hidden, limit)
        reports = list(pool.map(lambda sample: inspect_sample("val", sample, spec), chosen))
    good = [report.sample for report in reports if report.is_good]
    bad = [error for report in reports for error in (*report.errors, report.illegal) if error is not None]
    found = AuditReport()
    if bad:
        found.warnings.append(f"pseudo-labels are not measured here: {summarize_errors(bad, len(chosen))}")
    if good:
        found.notes.append(
            f"pseudo-labels are measured on {len(good)} unlabeled images; training never opens their labels"
        )
    return good, found


def spread(samples: Sequence[Sample], limit: int | None) -> Sequence[Sample]:
    """At most `limit` samples at equal distances."""
    if limit is None or len(samples) <= limit:
        return samples
    return [samples[index * len(samples) // limit] for index in range(limit)]


def check_samples(
    data: DataConfig, spec: DatasetSpec, lists: Lists, samples: Mapping[str, Sequence[Sample]], progress: bool = False
) -> tuple[AuditReport, list[SampleReport]]:
    """Open these samples of the lists. The first note says which lists they are."""
    items = [(kind, sample) for kind in KINDS for sample in samples[kind]]
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(lambda item: inspect_sample(*item, spec), items)
        hidden = disable_bar(progress)
        reports = list(tqdm(results, "check", len(items), unit="image", leave=False, disable=hidden))
    counts = ", ".join(f"{len(getattr(lists, kind))} {kind}" for kind in ("labeled", "unlabeled", "val"))
    report = AuditReport([f"{spec.name}, split {lists.name} ({lists.hash[:12]}): {counts} images"])
    skip = [
        kind
        for kind in ("labeled", "unlabeled")
        if data.on_bad_sample == "skip" and any(each.is_good for each in reports if each.kind == kind)
    ]
    report.extend(report_errors(reports, skip))
    problems, warnings = find_contradictions(reports, spec)
    report.extend(AuditReport(warnings=warnings, problems=problems))
    report.notes += [*describe_sizes(reports, data.crop_size), *describe_orientations(reports, spec)]
    every = len(samples["labeled"]) == len(lists.labeled)
    report.extend(report_masks(reports, spec, data.custom, skip, "" if every else " that were opened"))
    report.warnings += [*lists.left_out, *find_repeats(lists), *find_shared_masks(lists)]
    if "labeled" in lists.hashes and (clash := name_clash(lists.name, lists.hashes["labeled"], spec.splits)):
        report.warnings.append(clash)
    return report, reports


def find_missing(lists: Lists, spec: DatasetSpec) -> tuple[list[str], dict[str, list[Sample]]]:
    """Problems with files that do not exist, and the samples of each list whose files all exist."""
    exists, problems, present = make_exists_check(), [], {}
    for kind in KINDS:
        samples = getattr(lists, kind)
        for name in ("image", "mask"):
            paths = {getattr(sample, name) for sample in samples} - {None}
            absent = sorted(path for path in paths if not exists(path))
            if not absent:
                continue
            remedy = "add it, or correct the list, data.custom or data_root"
            likely = suggest_file(absent[0], is_mask=name == "mask")
            lines = [f"{path}: does not exist ({kind}); {remedy}" for path in absent]
            lines[0] = f"{absent[0]}: does not exist ({kind}){likely}; {remedy}"
            if len(lines) > 1 and len(absent) == len(paths):  # all of them: one cause
                others = f"nor does any other {kind} {name} ({len(absent)})"
                lines = [f"{absent[0]}: does not exist, {others}{likely}; {remedy}{prepare_hint(spec)}"]
            problems += limit_lines(lines, kind)
        present[kind] = [s for s in samples if exists(s.image) and (s.mask is None or exists(s.mask))]
    return problems, present


def find_shared_masks(lists: Lists) -> Iterator[str]:
    """Masks of two images: one of them is wrong, unless the camera does not move."""
    images: dict[Path, set[Path]] = defaultdict(set)
    for sample in (*lists.labeled, *lists.val):
        images[sample.mask].add(sample.image)
    shared = [mask for mask, users in images.items() if len(users) > 1]
    if shared:
        first, second, *_ = sorted(images[shared[0]])
        yield (
            f"{len(shared)} masks are those of several images, such as {shared[0]} of {first} and {second}; correct "
            "the list or data.custom, unless the images show the same scene"
        )


def report_errors(reports: Sequence[SampleReport], skip: Sequence[str]) -> AuditReport:
    """Files that cannot be used, by name; warnings in the lists (`skip`) where training replaces such samples."""
    result = AuditReport()
    for kind in KINDS:
        of_kind = [each for each in reports if each.kind == kind]
        errors = [error for each in of_kind for error in each.errors]
        replaced = [error for error in errors if kind in skip and isinstance(error, BadSample)]
        lines = [f"{kind} sample that training will replace: {line}" for line in group(replaced)]
        result.warnings += limit_lines(lines, kind)
        result.problems += limit_lines(group([error for error in errors if error not in replaced]), kind)
        bad = sum(not each.is_good for each in of_kind)
        if bad and kind in skip:
            result.warnings.append(f"{bad} of {len(of_kind)} {kind} samples cannot be used")
    return result


def group(errors: Sequence[UserError]) -> list[str]:
    """The first of the errors that differ in the file alone, and the number of the others."""
    same: dict[str, list[UserError]] = defaultdict(list)
    for error in errors:
        same[str(error).partition(": ")[2] or str(error)].append(error)
    return [f"{first}{f' (and {len(others)} more files)' if others else ''}" for first, *others in same.values()]


def limit_lines(lines: list[str], kind: str) -> list[str]:
    more = [f"and {len(lines) - MAX_LINES} more {kind} samples"] if len(lines) > MAX_LINES else []
    return lines[:MAX_LINES] + more


def describe_sizes(reports: Sequence[SampleReport], crop: Size) -> list[str]:
    """Smallest and largest image of each list, and how many are smaller than a crop."""
    notes = []
    for kind in KINDS:
        sizes = [each.size for each in reports if each.kind == kind and each.size is not None]
        if not sizes:
            continue
        least, most = min(sizes, key=np.prod), max(sizes, key=np.prod)
        text = f"{least[0]} x {least[1]}" + (f" to {most[0]} x {most[1]}" if most != least else "")
        height, width = height_width(crop)
        small = sum(size[0] < width or size[1] < height for size in sizes)
        padded = (
            f"; {small} are smaller than the crop of {size_text(crop)} and get padded"
            if small and kind != "val"
            else ""
        )
        notes.append(f"{kind} images: {text} pixels{padded}")
    return notes


def describe_orientations(reports: Sequence[SampleReport], spec: DatasetSpec) -> list[str]:
    """How many images have an EXIF orientation, and what is done about it."""
    images = {each.sample.image: each.image.orientation for each in reports if each.image}
    turned = [path for path, orientation in images.items() if orientation in TURNS]
    if not turned:
        return []
    done = "ignored (data.custom.orientation)" if spec.reading.orientation == "stored" else "applied"
    return [f"{len(turned)} of {len(images)} images have an EXIF orientation, which is {done}, such as {turned[0]}"]


def report_masks(
    reports: Sequence[SampleReport], spec: DatasetSpec, custom: CustomDataConfig | None, skip: Sequence[str], which: str
) -> AuditReport:
    """Illegal values, the pixels of each class, and classes that occur in no labeled mask.

    Args:
        which: follows "labeled images" in messages.
    """
    masks = [each for each in reports if each.values]
    result = report_illegal_values(masks, spec, custom, skip)
    legal = [each for each in masks if each.illegal is None]
    stored = custom is not None and custom.value_map is custom.color_map is None  # values are classes, 255 is ignored
    if stored and spec.ignore_index == custom.ignore_index and len(legal) == len(masks):
        result.problems += compare_whites(masks, spec)
    labeled = [each for each in legal if each.kind == "labeled"]
    statistics = {kind: class_statistics([m for m in legal if m.kind == kind], spec) for kind in ("labeled", "val")}
    if legal:
        result.notes += format_class_table(spec, statistics)
    for kind in ("labeled", "val"):
        if any(each.kind == kind for each in legal) and not any(images for images, _ in statistics[kind]):
            result.problems.append(f"no pixel of the {kind} masks has a class, all are {spec.ignore_index}")
    seen = {
        kind: {name for name, (images, _) in zip(spec.classes, rows, strict=True) if images}
        for kind, rows in statistics.items()
    }
    absent = [name for name in spec.classes if name not in seen["labeled"]]
    no_val = [name for name in spec.classes if name in seen["labeled"] - seen["val"]]
    if not labeled or result.problems:
        return result
    if no_val and seen["val"]:
        result.warnings.append(
            f"classes that occur in no val image{which}: {', '.join(no_val)}; their IoU is 0 if they are predicted "
            "anywhere, else left out of the mean"
        )
    if not absent:
        return result
    if custom is not None and len(absent) == spec.num_classes - 1 and decode_counts(labeled, spec)[IGNORE_INDEX]:
        (only,) = set(spec.classes) - set(absent)
        result.problems.append(
            f"the labeled masks show no other class than {only}, and ignored pixels. {suggest_map(legal, spec, custom)}"
        )
    else:
        result.warnings.append(f"classes in none of the labeled images{which}: {', '.join(absent)}")
    return result


def report_illegal_values(
    masks: Sequence[SampleReport], spec: DatasetSpec, custom: CustomDataConfig | None, skip: Sequence[str]
) -> AuditReport:
    """One message for all masks with illegal values or colors: a warning if training replaces them, else a problem."""
    illegal = [each for each in masks if each.illegal is not None]
    if not illegal:
        return AuditReport()
    more = ""
    if len(illegal) > 1:
        names = ", ".join(each.sample.mask.name for each in illegal[1:8]) + (", ..." if len(illegal) > 8 else "")
        which = "" if len(illegal) == len(masks) else f": {names}"
        more = f" (and {len(illegal) - 1} more of {len(masks)} masks{which})"
    alike = [each for each in masks if each.mask.colored == illegal[0].mask.colored]
    message = f"{illegal[0].illegal}{more}"
    if not any(compare_bits(masks)):  # no map could be right for all
        message += f". {suggest_map(alike, spec, custom)}"
    if all(each.kind in skip for each in illegal):
        return AuditReport(warnings=[f"{len(illegal)} labeled samples that training will replace: {message}"])
    return AuditReport(problems=[message])


def decode_counts(masks: Iterable[SampleReport], spec: DatasetSpec) -> Counter:
    """Pixels of each class index and of IGNORE_INDEX."""
    counts: Counter = Counter()
    for mask in masks:
        stored = np.array(list(mask.values))
        indices = spec.colors.decode(stored)[0] if spec.colors else spec.decode_mask(stored)
        for index, count in zip(indices.tolist(), mask.values.values(), strict=True):
            counts[index] += count
    return counts


def class_statistics(masks: Sequence[SampleReport], spec: DatasetSpec) -> list[tuple[int, float]]:
    """For each class the number of images that show it, and its share of the pixels that have a class."""
    images, pixels = Counter(), Counter()
    for mask in masks:
        counts = decode_counts([mask], spec)
        images.update(counts.keys())
        pixels.update(counts)
    labeled = sum(pixels[index] for index in range(spec.num_classes)) or 1
    return [(images[index], pixels[index] / labeled) for index in range(spec.num_classes)]


def format_class_table(spec: DatasetSpec, statistics: Mapping[str, list[tuple[int, float]]]) -> list[str]:
    width = max(map(len, (*spec.classes, "class")))
    lines = [f"{'class':{width}}  {'labeled: images':>16} {'pixels':>7}  {'val: images':>12} {'pixels':>7}"]
    for name, (images, share), (val_images, val_share) in zip(
        spec.classes, statistics["labeled"], statistics["val"], strict=True
    ):
        lines.append(f"{name:{width}}  {images:16} {share:7.2%}  {val_images:12} {val_share:7.2%}")
    return lines


def suggest_map(masks: Sequence[SampleReport], spec: DatasetSpec, custom: CustomDataConfig | None) -> str:
    """A histogram of the masks' values, and the map that would make classes of them, if one can be guessed.

    A map that the recipe has is kept, and extended by the values that it lacks.
    """
    values, colored = sum((mask.values for mask in masks), Counter()), masks[0].mask.colored
    name = format_color if colored else str
    pixels = sum(values.values())
    # Among many values the rare ones come from smoothed borders or JPEG noise
    common = [value for value, _ in values.most_common(MAX_VALUES if len(values) <= MAX_VALUES else 8)]
    histogram = ", ".join(f"{name(value)} ({values[value] / pixels:.2%})" for value in sorted(common))
    more = f" and {len(values) - len(common)} more" if len(values) > len(common) else ""
    text = f"All these masks together hold {histogram}{more}. "
    if custom is None:
        return text + "The values of this data set are fixed: prepare it again, or describe yours in data.custom"
    kind, key = ("colors", "color_map") if colored else ("values", "value_map")
    given = stored_values(custom, colored)
    if given.keys() >= values.keys():  # the values may mean something else
        given = {}
    free = [index for index in range(spec.num_classes) if index not in given.values()]
    guess = guess_map(sorted(values.keys() - given.keys()), len(free), colored)
    if guess is None:
        if len(values) > 2 * spec.num_classes + 2:
            return f"{text}So many come from JPEG or smooth resizing: save masks as PNG, resize with nearest-neighbor"
        void = custom.ignore_index
        example = f'{{"0,0,0": 0, "255,0,0": 1, "9,9,9": {void}}}' if colored else f"{{0: 0, 1: 1, 9: {void}}}"
        more = "add missing names to data.custom.classes, and " if len(values) > spec.num_classes else ""
        return (
            f"{text}{len(values)} {kind} for {spec.num_classes} classes: {more}define each one in data.custom.{key}, "
            f"such as {example} ({void}: ignored)"
        )
    quote = '"' if colored else ""
    new = {value: IGNORE_INDEX if number == IGNORE_INDEX else free[number] for value, number in guess.items()}
    targets = {value: custom.ignore_index if index == IGNORE_INDEX else index for value, index in (given | new).items()}
    entries = ", ".join(f"{quote}{name(value)}{quote}: {index}" for value, index in targets.items())
    classes = dict(enumerate(spec.classes)) | {IGNORE_INDEX: "ignored"}
    meaning = ", ".join(f"{name(value)} is {classes[index]}" for value, index in new.items())
    other = " (otherwise swap the indices)" if colored and len(free) > 1 else ""  # their order means nothing
    suggestion = f"{text}If {meaning}, add to the config{other}: data.custom.{key}: {{{entries}}}"
    if guess.get(0) == IGNORE_INDEX and not given and not colored:  # as likely the last value is the void
        *others, last = guess
        entries = ", ".join(f"{value}: {index}" for index, value in enumerate(others))
        suggestion += (
            f"; if instead {last} is ignored, and 0 is {spec.classes[0]}: {{{entries}, {last}: {custom.ignore_index}}}"
        )
    return suggestion


def stored_values(custom: CustomDataConfig, colored: bool) -> dict[int, int]:
    """Stored value or 0xRRGGBB -> class index or IGNORE_INDEX, as the recipe's map says; {} without a map."""
    if colored:
        colors = color_table(custom) if custom.color_map else {}
        return {pack_color(color): index for color, index in colors.items()}
    return value_table(custom) if custom.value_map else {}


def guess_map(values: Sequence[int], num_classes: int, colored: bool) -> dict[int, int] | None:
    """Map the sorted stored values to the classes in order; if there is one too many, ignore the usual void value.

    If all class indices occur and no K, any further value is ignored. So is a single value for which no class is left.
    """
    if num_classes and not colored and {*range(num_classes)} < {*values} and num_classes not in values:
        return {value: value if value < num_classes else IGNORE_INDEX for value in values}
    if len(values) == num_classes:
        return {value: index for index, value in enumerate(values)}
    void = 0xFFFFFF if colored else IGNORE_INDEX
    if len(values) != num_classes + 1:
        return None
    ignored = void if void in values else 0 if not colored and 0 in values else None if num_classes else values[0]
    if ignored is None:
        return None
    others = [value for value in values if value != ignored]
    return dict(sorted({**{value: index for index, value in enumerate(others)}, ignored: IGNORE_INDEX}.items()))


def find_repeats(lists: Lists) -> list[str]:
    """Warnings about images that are listed twice, in one list or in two."""
    images = {kind: [sample.image for sample in getattr(lists, kind)] for kind in ("labeled", "unlabeled", "val")}
    warnings = [
        f"{len(files) - len(set(files))} images occur more than once in the {kind} list"
        for kind, files in images.items()
        if len(set(files)) < len(files)
    ]
    for first, second in PAIRS:
        if both := set(images[first]) & set(images[second]):
            warnings.append(f"{len(both)} images are both {first} and {second}, such as {min(both)}")
    return warnings


def find_copies(reports: Sequence[SampleReport]) -> list[str]:
    """Warnings about identical image files under different names in two lists."""
    same = defaultdict(list)
    for each in reports:
        if each.digest:
            same[each.digest].append(each)
    warnings = []
    for first, second in PAIRS:
        copies: dict[Path, Path] = {}
        for group in same.values():
            images, others = ({each.sample.image for each in group if each.kind == kind} for kind in (first, second))
            for image in images if others else ():
                if other := next((other for other in others if other != image), None):
                    copies[image] = other
        if copies:
            image = min(copies)
            warnings.append(
                f"{len(copies)} {first} images have a copy among the {second} images, such as {image} = {copies[image]}"
            )
    return warnings
