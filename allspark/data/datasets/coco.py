"""COCO 2017 as semantic segmentation: void (background), then the 80 thing classes in id order."""

from __future__ import annotations

from allspark.data.spec import DatasetSpec, voc_palette

NAMES = """
void, person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote,
keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair
drier, toothbrush
"""
CLASSES = tuple(" ".join(name.split()) for name in NAMES.split(","))  # names may contain a line break

SPEC = DatasetSpec(name="coco", classes=CLASSES, palette=voc_palette(len(CLASSES)), background=0)
