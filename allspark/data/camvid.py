"""CamVid as distributed with the SegNet tutorial: 480 x 360 frames, stored value 11 is unlabelled."""

from __future__ import annotations

from allspark.data.base import IGNORE_INDEX, DatasetSpec, Table

CLASSES = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)
PALETTE = (
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)
UNLABELLED = len(CLASSES)  # as stored

SPEC = DatasetSpec(
    name="camvid",
    classes=CLASSES,
    palette=PALETTE,
    decode_mask=Table.of({value: value for value in range(256)} | {UNLABELLED: IGNORE_INDEX}, default=IGNORE_INDEX),
)
