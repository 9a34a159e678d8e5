"""ADE20K as in the Scene Parsing Challenge 2016 (SceneParse150): 150 classes, stored as 1..150; 0 is all else."""

from __future__ import annotations

from allspark.data.spec import IGNORE_INDEX, DatasetSpec, LookupTable, voc_palette

# In the order of objectInfo150.txt (CSAILVision/sceneparsing, also in the archive), the first synonym of each.
NAMES = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop,
stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
chandelier, awning, streetlight, booth, television, airplane, dirt track, apparel, pole, land, bannister, escalator,
ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool,
stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot,
animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan,
pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""
CLASSES = tuple(" ".join(name.split()) for name in NAMES.split(","))
OTHER = 0  # stored value of pixels of no class, which the benchmark ignores

STORED = {OTHER: IGNORE_INDEX} | {index + 1: index for index in range(len(CLASSES))}
ILLEGAL = dict.fromkeys(range(len(CLASSES) + 1, 256), IGNORE_INDEX - 1)  # no class, so that read_mask reports them

SPEC = DatasetSpec(
    name="ade20k",
    classes=CLASSES,
    palette=voc_palette(len(CLASSES)),
    decode_mask=LookupTable.from_mapping(STORED | ILLEGAL, default=IGNORE_INDEX),
    mask_hint="This data set expects the official masks: 0 = no class, 1..150 = the classes",
    submission=LookupTable.from_mapping(dict(enumerate(range(1, len(CLASSES) + 1))), default=OTHER),
)
