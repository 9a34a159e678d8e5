"""A data set of one's own, described in YAML alone (data.custom): the spec that its section stands for."""

from __future__ import annotations

import re

from allspark.config import CustomDataConfig
from allspark.data.base import IGNORE_INDEX, ColorTable, DatasetSpec, Table, bit_palette, keep
from allspark.utils.errors import UserError


def make_spec(name: str, custom: CustomDataConfig) -> DatasetSpec:
    """custom.ignore_index and custom.value_map speak of stored values; a decoded mask always ignores IGNORE_INDEX."""
    num_classes = len(custom.classes)
    if not 1 <= num_classes <= IGNORE_INDEX:
        raise UserError(f"data.custom.classes: {num_classes} classes; name 1 to {IGNORE_INDEX}, masks are 8-bit")
    twice = sorted({c for c in custom.classes if custom.classes.count(c) > 1})
    if twice:
        raise UserError(f"data.custom.classes: named twice: {', '.join(twice)}; every class needs a name of its own")
    if custom.background is not None and not 0 <= custom.background < num_classes:
        raise UserError(f"data.custom.background: {custom.background} is not a class index 0..{num_classes - 1}")
    palette = custom.palette if custom.palette is not None else default_palette(custom)
    if len(palette) != num_classes:
        raise UserError(f"data.custom.palette: {len(palette)} colours for {num_classes} classes; give one each or none")
    for colour in palette:
        if len(colour) != 3 or not all(0 <= channel <= 255 for channel in colour):
            raise UserError(f"data.custom.palette: {list(colour)} is not a colour; give red, green, blue in 0..255")
    return DatasetSpec(
        name=name,
        classes=tuple(custom.classes),
        palette=tuple((red, green, blue) for red, green, blue in palette),
        eval_mode=custom.eval_mode,
        decode_mask=keep if stored_as_decoded(custom) else Table.of(decoding(custom), default=num_classes),
        background=custom.background,
        colors=None if custom.color_map is None else ColorTable.of(coloring(custom)),
        mask_hint=f"Correct the mask (ignored pixels hold {custom.ignore_index}), or say what its values mean: "
        "data.custom.classes, ignore_index, value_map",
    )


def default_palette(custom: CustomDataConfig) -> tuple[tuple[int, int, int], ...]:
    """The colours of the masks themselves where they are stored as such, one for each class; else those of VOC."""
    stored = {} if custom.color_map is None else {index: color for color, index in reversed(coloring(custom).items())}
    if all(index in stored for index in range(len(custom.classes))):
        return tuple(stored[index] for index in range(len(custom.classes)))
    return bit_palette(len(custom.classes))


def coloring(custom: CustomDataConfig) -> dict[tuple[int, int, int], int]:
    """Stored colour -> class index or IGNORE_INDEX."""
    if custom.value_map is not None:
        raise UserError("data.custom: value_map and color_map; masks are read as values or as colours, leave one out")
    if not custom.color_map:
        raise UserError('data.custom.color_map: names no colour; give one for each class, such as {"255,0,0": 1}')
    table = {}
    for text, target in custom.color_map.items():
        channels = re.fullmatch(r" *(\d{1,3}) *, *(\d{1,3}) *, *(\d{1,3}) *", text)
        if channels is None or max(map(int, channels.groups())) > 255:
            raise UserError(f'data.custom.color_map: "{text}" is not a colour; write red, green, blue: "255,0,0"')
        if not 0 <= target < len(custom.classes) and target != custom.ignore_index:
            raise UserError(
                f'data.custom.color_map: "{text}": {target} is neither a class index 0..{len(custom.classes) - 1} '
                f"nor ignore_index {custom.ignore_index}"
            )
        table[tuple(map(int, channels.groups()))] = target if target < len(custom.classes) else IGNORE_INDEX
    return table


def stored_as_decoded(custom: CustomDataConfig) -> bool:
    return custom.value_map is None and custom.ignore_index == IGNORE_INDEX


def decoding(custom: CustomDataConfig) -> dict[int, int]:
    """Stored value -> class index or IGNORE_INDEX. A value not in it is decoded as K, which read_mask reports."""
    num_classes = len(custom.classes)
    if not 0 <= custom.ignore_index <= 255:
        raise UserError(f"data.custom.ignore_index: {custom.ignore_index}; masks are 8-bit, give a value in 0..255")
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
    table = {custom.ignore_index: IGNORE_INDEX}  # unless the map gives that stored value a meaning
    for stored, target in custom.value_map.items():
        if not 0 <= stored <= 255:
            raise UserError(f"data.custom.value_map: stored value {stored}; masks are 8-bit, give values in 0..255")
        if not 0 <= target < num_classes and target != custom.ignore_index:
            raise UserError(
                f"data.custom.value_map: {stored}: {target} is neither a class index 0..{num_classes - 1} "
                f"nor ignore_index {custom.ignore_index}"
            )
        table[stored] = target if 0 <= target < num_classes else IGNORE_INDEX
    return table
