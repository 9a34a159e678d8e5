"""What the files of a data set say about themselves, one by one and compared: files of different kinds mix meanings."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from allspark.config import MIN_SIDE
from allspark.data.image_files import TURNS, BadSample, retried
from allspark.data.image_io import STRIP, ImageFile, load_image
from allspark.data.mask_io import MaskFile, check_palette, decode_mask, format_color, load_mask, size_mismatch
from allspark.data.spec import DatasetSpec, Sample, pack_color
from allspark.utils.errors import UserError

MAX_COLORS = 4096  # a file with more different colors is not a mask
RANGES = (255, 1023, 4095, 16383)  # of cameras with 8 to 14 bits
NO_PIXELS = np.empty(0, np.uint8)


@dataclass(frozen=True)
class SampleReport:
    """What the files of a sample contain.

    Args:
        size: (width, height) of the image; None if it cannot be read.
        digest: hash of the image file.
        image, mask: what the files say, without their pixels; None if they cannot be read.
        values: stored mask value (or color as 0xRRGGBB if `mask.colored`) -> number of pixels.
        illegal: the error for mask values without a class; reported once for all masks, with the remedy.
        errors: everything else that is wrong.
    """

    kind: str
    sample: Sample
    size: tuple[int, int] | None = None
    digest: bytes = b""
    image: ImageFile | None = None
    mask: MaskFile | None = None
    values: Counter = field(default_factory=Counter)
    illegal: UserError | None = None
    errors: tuple[UserError, ...] = ()

    @property
    def is_good(self) -> bool:
        return not self.errors and self.illegal is None


def inspect_sample(kind: str, sample: Sample, spec: DatasetSpec) -> SampleReport:
    """Read image and mask as training does."""
    found, errors = SampleReport(kind, sample), []
    try:
        image = load_image(sample.image, spec.reading)
        height, width = image.pixels.shape[:2]
        digest = hashlib.blake2b(retried(sample.image.read_bytes, sample.image), digest_size=16).digest()
        found = replace(found, size=(width, height), digest=digest, image=image._replace(pixels=NO_PIXELS))
        if kind == "val" and min(width, height) < MIN_SIDE:
            needed = f"evaluation needs at least {MIN_SIDE} on each side"
            errors.append(UserError(f"{sample.image}: {width} x {height} pixels; {needed}"))
    except UserError as error:
        errors.append(error)
    if sample.mask is not None:
        try:
            mask = load_mask(sample.mask, spec)
            found = replace(found, mask=mask._replace(values=NO_PIXELS), values=count_values(mask, sample))
            mask_size = mask.values.shape[::-1]
            if found.size not in (None, mask_size):
                errors.append(size_mismatch(sample, found.size, mask_size))
            check_palette(mask, sample.mask, spec)
            found = replace(found, illegal=find_illegal(mask, sample, spec))
        except UserError as error:
            errors.append(error)
    return replace(found, errors=tuple(errors))


def find_illegal(mask: MaskFile, sample: Sample, spec: DatasetSpec) -> UserError | None:
    """The error that training would raise for the mask's values."""
    try:
        decode_mask(mask, sample.mask, spec)
    except BadSample as error:
        return error
    return None


def count_values(mask: MaskFile, sample: Sample) -> Counter:
    """Pixels of each stored value or color; BadSample if there are more colors than a mask can have."""
    counts: Counter = Counter()
    for part in np.array_split(mask.values.ravel(), -(-mask.values.size // STRIP)):
        if part.dtype in (np.uint8, np.uint16):
            numbers = np.bincount(part)
            values = np.flatnonzero(numbers)
            numbers = numbers[values]
        else:
            values, numbers = np.unique(part, return_counts=True)
        counts.update(dict(zip(values[:MAX_COLORS].tolist(), numbers[:MAX_COLORS].tolist(), strict=True)))
        if mask.colored and len(counts) >= MAX_COLORS:
            raise BadSample(
                f"{sample.mask}: more than {MAX_COLORS} different colors, which come from JPEG or smooth resizing; "
                "save masks as PNG, resize with nearest-neighbor"
            )
    return counts


def find_contradictions(reports: Sequence[SampleReport], spec: DatasetSpec) -> tuple[list[str], list[str]]:
    """Ambiguities and contradictions among files that are valid one by one -> problems, warnings."""
    # A file of several lists counts once
    masks = list({each.sample.mask: each for each in reports if each.values}.values())
    images = list({each.sample.image: each for each in reports if each.image}.values())
    problems = [*compare_bits(masks), *compare_palettes(masks, spec)]
    problems += [*check_ranges(images, spec), *check_orientations(masks, spec)]
    warnings: list[str] = []
    if not spec.is_custom:  # the answers are keys of data.custom
        problems, warnings = warnings, problems
    white = spec.reading.image_max or 65535
    brighter = [each for each in images if (each.image.peak or 0) > white]
    if brighter:
        most = max(brighter, key=lambda each: each.image.peak)
        warnings.append(
            f"{len(brighter)} images have values above data.custom.image_max={white}, which become "
            f"white, such as {most.image.peak} in {most.sample.image}"
        )
    transparent = [each for each in masks if each.mask.transparent]
    if transparent:
        warnings.append(
            f"{len(transparent)} masks have transparent pixels, such as {transparent[0].sample.mask}: their stored "
            "colors count"
        )
    return problems, warnings


def compare_bits(masks: Sequence[SampleReport]) -> Iterator[str]:
    """In a 1-bit mask 1 may be what 255 is elsewhere: lossless optimizers store 0 and 255 so, others 0 and 1."""
    examples: dict[int, SampleReport] = {}
    for each in masks:
        if any(each.values) and not each.mask.colored:  # 0 means the same everywhere
            examples.setdefault(min(each.mask.bits, 8), each)
    if len(examples) > 1:
        first, second, *_ = (
            f"{each.sample.mask} has {bits} bit(s) per pixel and values up to {max(each.values)}"
            for bits, each in sorted(examples.items())
        )
        yield f"masks of different bit depths: {first}, {second}. A value may differ in meaning: save all as 8-bit PNG"


def compare_whites(masks: Sequence[SampleReport], spec: DatasetSpec) -> Iterator[str]:
    """Some masks hold 0 and 255 alone, and no other mask with a class holds 255: it may be a class or ignored there."""
    masks = list({each.sample.mask: each for each in masks}.values())  # a file of several lists counts once
    white = [each for each in masks if each.values.keys() == {0, 255}]
    others = [each for each in masks if each.values.keys() - {0, 255}]
    if white and others and not any(255 in each.values for each in others):
        yield (
            f"{len(white)} masks hold only 0 and 255, which is ignored, such as {white[0].sample.mask}; the "
            f"{len(others)} others with a class hold no 255, such as {others[0].sample.mask}. If 255 is a class there, "
            "save all masks with the same values; if it is to be ignored, add to the config: data.custom.value_map: "
            f"{{{', '.join(f'{value}: {value}' for value in (*range(spec.num_classes), 255))}}}"
        )


def compare_palettes(masks: Sequence[SampleReport], spec: DatasetSpec) -> Iterator[str]:
    """Indices count if the palettes agree with each other, and were not made from the content of the files.

    Programs that reduce colors number those of each file anew.
    """
    remedy = "if the colors define the classes, list them in data.custom.color_map; if the indices do,"
    known: dict[int, tuple[int, SampleReport]] = {}  # index -> its color, and a file that uses it
    classes = list(map(pack_color, spec.palette))
    with_palette = [each for each in masks if each.mask.palette]
    has_unused, matches = False, True
    for each in with_palette:
        palette = each.mask.palette
        used = {index: palette[index] for index in each.values if index < len(palette)}
        for index, color in used.items():
            other, where = known.setdefault(index, (color, each))
            if other != color:
                yield (
                    f"index {index} has the color {format_color(other)} in the palette of {where.sample.mask}, and "
                    f"{format_color(color)} in that of {each.sample.mask}; {remedy} save gray masks"
                )
                return
            target = int(spec.decode_mask(np.array([index]))[0])
            matches &= target >= len(classes) or classes[target] == color
        has_unused |= bool({*palette} - {*used.values(), 0})  # padded with black
    without = [each for each in masks if any(each.values) and not each.mask.palette and not each.mask.colored]
    if with_palette and not matches and (without or not has_unused):
        colors = ", ".join(f"{index} is {format_color(color)}" for index, (color, _) in sorted(known.items()))
        beside = f", and {without[0].sample.mask} has none" if without else ""
        yield (
            f"the palette of {with_palette[0].sample.mask} does not have the classes' colors ({colors}){beside}; "
            f"{remedy} give the classes' colors in data.custom.palette"
        )


def check_ranges(images: Sequence[SampleReport], spec: DatasetSpec) -> Iterator[str]:
    """Whether white is known of images with more than 8 bits per channel."""
    deep = sorted((each for each in images if each.image.peak is not None), key=lambda each: each.image.peak)
    if not deep or spec.reading.image_max is not None:
        return
    most, least = deep[-1], next((each for each in deep if each.image.peak), deep[-1])  # not an all black one
    peak = most.image.peak
    remedy = f"set data.custom.image_max to the value of white, such as {next((x for x in RANGES if x >= peak), 65535)}"
    if peak <= 65535 // 2:
        yield (
            f"{len(deep)} of {len(images)} images have 16 bits per channel but no value above {peak} "
            f"({most.sample.image}); {remedy}"
        )
    elif least.image.peak <= peak // 8:
        yield (
            f"images with 16 bits per channel differ in their range: values up to {least.image.peak} in "
            f"{least.sample.image}, up to {peak} in {most.sample.image}; {remedy}"
        )
    elif shallow := [each for each in images if each.image.peak is None]:
        yield (
            f"{len(deep)} images have 16 bits per channel, such as {deep[0].sample.image}, the others 8, such as "
            f"{shallow[0].sample.image}; {remedy}"
        )


def check_orientations(masks: Sequence[SampleReport], spec: DatasetSpec) -> Iterator[str]:
    """Whether it is known if masks are turned like photos with an EXIF orientation; sizes tell for quarter turns."""
    pairs = [each for each in masks if each.image]
    turned = [each for each in pairs if turn_of(each.image) != turn_of(each.mask)]
    if not turned or spec.reading.orientation is not None:
        return
    sizes_tell = any(
        each.size[0] != each.size[1] and (turn_of(each.image) >= 5) != (turn_of(each.mask) >= 5) for each in turned
    )
    if not sizes_tell:
        yield (
            f"{len(turned)} of {len(pairs)} images have an EXIF orientation that their masks do not have, such as "
            f"{turned[0].sample.image}: set data.custom.orientation=shown if masks were drawn on the photo as viewers "
            "show it, or stored if on its pixels as stored"
        )


def turn_of(file: ImageFile | MaskFile) -> int:
    """Its EXIF orientation 2 to 8, or 1 for none."""
    return file.orientation if file.orientation in TURNS else 1
