"""Your own data set, described by the config section data.custom: the DatasetSpec for it."""

from __future__ import annotations

import re

from allspark.config import CustomDataConfig
from allspark.data.spec import (
    IGNORE_INDEX,
    ColorTable,
    DatasetSpec,
    ImageReading,
    LookupTable,
    Statistics,
    identity,
    voc_palette,
)
from allspark.utils.errors import UserError

MAX_STORED = 2**16 - 1  # in a mask of 16 bits
BACKGROUNDS = ("background", "bg", "other", "others", "none", "nothing", "void", "unlabeled", "no data")


def make_spec(name: str, custom: CustomDataConfig) -> DatasetSpec:
    """Build the spec. custom.ignore_index and value_map refer to stored values; decoded masks use IGNORE_INDEX."""
    num_classes = len(custom.classes)
    if not 1 <= num_classes <= IGNORE_INDEX:
        raise UserError(f"data.custom.classes: {num_classes} classes; masks are 8-bit, use 1 to {IGNORE_INDEX} classes")
    if repeated := sorted({c for c in custom.classes if custom.classes.count(c) > 1}):
        raise UserError(f"data.custom.classes: repeated {', '.join(repeated)}; class names must be unique")
    if custom.background is not None and not 0 <= custom.background < num_classes:
        raise UserError(f"data.custom.background: {custom.background} is not a class index 0..{num_classes - 1}")
    palette = custom.palette if custom.palette is not None else default_palette(custom)
    if len(palette) != num_classes:
        raise UserError(f"data.custom.palette: {len(palette)} colors for {num_classes} classes; give one each or none")
    for color in palette:
        if len(color) != 3 or not all(0 <= channel <= 255 for channel in color):
            raise UserError(f"data.custom.palette: {list(color)} is not a color; give red, green, blue in 0..255")
    for key in ("mean", "std"):
        values = getattr(custom, key)
        if values is not None and len(values) != custom.channels:
            raise UserError(f"data.custom.{key}: {len(values)} values for {custom.channels} channels; give one each")
    stored_decoded = custom.value_map is None and custom.ignore_index == IGNORE_INDEX
    return DatasetSpec(
        name=name,
        classes=tuple(custom.classes),
        palette=tuple((red, green, blue) for red, green, blue in palette),
        eval_mode=custom.eval_mode,
        decode_mask=identity if stored_decoded else LookupTable.from_mapping(value_table(custom), default=num_classes),
        max_stored=max(255, custom.ignore_index, *(custom.value_map or ())),
        background=custom.background,
        colors=None if custom.color_map is None else ColorTable.from_mapping(color_table(custom)),
        statistics=Statistics.of(custom.channels, custom.mean, custom.std),
        is_custom=True,
        reading=ImageReading(custom.image_max, custom.orientation, custom.channels),
        mask_hint=f"Correct the mask (ignored pixels hold {custom.ignore_index}), or define its values with "
        "data.custom.classes, ignore_index, value_map",
    )


def default_palette(custom: CustomDataConfig) -> tuple[tuple[int, int, int], ...]:
    """The masks' own colors if color_map has one for each class, else those of VOC: black only for a background."""
    colors = {} if custom.color_map is None else {i: color for color, i in reversed(color_table(custom).items())}
    if all(index in colors for index in range(len(custom.classes))):
        return tuple(colors[index] for index in range(len(custom.classes)))
    if custom.background == 0 or custom.classes[0].lower().replace("_", " ").strip() in BACKGROUNDS:
        return voc_palette(len(custom.classes))
    return voc_palette(len(custom.classes) + 1)[1:]


def color_table(custom: CustomDataConfig) -> dict[tuple[int, int, int], int]:
    """Stored color -> class index or IGNORE_INDEX."""
    if custom.value_map is not None:
        raise UserError("data.custom: both value_map and color_map are set; masks hold either values or colors")
    if not custom.color_map:
        raise UserError('data.custom.color_map: empty; give a color for each class, such as {"255,0,0": 1}')
    table = {}
    for text, target in custom.color_map.items():
        channels = re.fullmatch(r" *(\d{1,3}) *, *(\d{1,3}) *, *(\d{1,3}) *", text)
        if channels is None or max(map(int, channels.groups())) > 255:
            raise UserError(f'data.custom.color_map: "{text}" is not a color; write red, green, blue: "255,0,0"')
        color = red, green, blue = tuple(map(int, channels.groups()))
        if color in table:
            raise UserError(f'data.custom.color_map: the color "{red},{green},{blue}" is given twice; remove one')
        table[color] = target_index(custom, f'color_map: "{text}"', target)
    return table


def value_table(custom: CustomDataConfig) -> dict[int, int]:
    """Stored value -> class index or IGNORE_INDEX. Values not in it are decoded as K, which read_mask reports."""
    num_classes = len(custom.classes)
    if custom.color_map is not None and custom.ignore_index < num_classes:
        raise UserError(
            f"data.custom.ignore_index: {custom.ignore_index} is also the index of class "
            f"'{custom.classes[custom.ignore_index]}'; leave it at {IGNORE_INDEX}, and map void colors to that"
        )
    if not 0 <= custom.ignore_index <= MAX_STORED:
        raise UserError(f"data.custom.ignore_index: {custom.ignore_index}; give a value in 0..{MAX_STORED}")
    if num_classes == IGNORE_INDEX:
        raise UserError(
            f"data.custom.classes: {num_classes} classes leave no room for value_map or another ignore_index; "
            "renumber the masks 0..K-1"
        )
    if custom.value_map is None:
        if custom.ignore_index < num_classes:
            raise UserError(
                f"data.custom.ignore_index: {custom.ignore_index} is also the index of class "
                f"'{custom.classes[custom.ignore_index]}'; give a value_map, such as {{1: 0, 2: 1}}, for the others"
            )
        return {index: index for index in range(num_classes)} | {custom.ignore_index: IGNORE_INDEX}
    table = {custom.ignore_index: IGNORE_INDEX}  # unless the map defines that stored value
    for stored, target in custom.value_map.items():
        if not 0 <= stored <= MAX_STORED:
            raise UserError(f"data.custom.value_map: stored value {stored}; give values in 0..{MAX_STORED}")
        if stored == custom.ignore_index < num_classes:
            raise UserError(
                f"data.custom.value_map: the stored value {stored} is ignore_index, and has an entry; leave one of "
                f"them out (ignored values may also be mapped to {IGNORE_INDEX}, the default of ignore_index)"
            )
        table[stored] = target_index(custom, f"value_map: {stored}", target)
    return table


def target_index(custom: CustomDataConfig, key: str, target: int) -> int:
    """The class index or IGNORE_INDEX that an entry of color_map or value_map maps to."""
    if 0 <= target < len(custom.classes):
        return target
    if target != custom.ignore_index:
        raise UserError(
            f"data.custom.{key}: {target} is neither a class index 0..{len(custom.classes) - 1} "
            f"nor ignore_index {custom.ignore_index}"
        )
    return IGNORE_INDEX
