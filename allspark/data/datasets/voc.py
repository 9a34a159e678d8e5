"""PASCAL VOC 2012. The masks are SBD's 8-bit indices or VOC's own palette PNGs, both read as indices."""

from __future__ import annotations

from allspark.data.spec import DatasetSpec, voc_palette

NAMES = """
background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse, motorbike,
person, potted plant, sheep, sofa, train, tv/monitor
"""
CLASSES = tuple(" ".join(name.split()) for name in NAMES.split(","))

SPEC = DatasetSpec(name="pascal", classes=CLASSES, palette=voc_palette(len(CLASSES)), background=0)
