"""Make docs/camvid_lite0_predictions.png, in fewer colors, and from it docs/readme.png, the picture of the README.

python -m allspark compare --overlay --images 4 --out exp/grid supervised=exp/random_6_0/supervised/seed_0 \
    fixmatch=... allspark_revised_without=... allspark_revised=...    # of docs/tools/camvid_pretrained.sh
python docs/tools/readme_picture.py exp/grid/predictions.png          # without an argument: readme.png alone
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from results import reduce_colors

DOCS = Path(__file__).resolve().parents[1]
COLUMNS = {0: "image", 1: "ground truth", 2: "supervised", 5: "allspark_revised"}  # number in the source -> title
ROWS = (0, 1, 3)
WIDTH, HEIGHT = 240, 180  # of a picture
LEFT, TOP = 20, 54  # of the first picture of the source
STEP_X, STEP_Y = 248, 204  # between pictures of the source
LEGEND = (16, 874, 1420, 904)  # box in the source
ENTRY_WIDTH, ENTRIES = 119, 12  # of the legend
GAP, TITLE, ENTRY_HEIGHT = 6, 28, 26


def main(predictions: str | None = None) -> None:
    path = DOCS / "camvid_lite0_predictions.png"
    if predictions is not None:
        reduce_colors(Image.open(predictions)).save(path, optimize=True)
    source = Image.open(path).convert("RGB")
    width = len(COLUMNS) * (WIDTH + GAP) - GAP
    grid = TITLE + len(ROWS) * (HEIGHT + GAP)
    picture = Image.new("RGB", (width, grid + 2 * ENTRY_HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 17)
    for place, (column, title) in enumerate(COLUMNS.items()):
        x = place * (WIDTH + GAP)
        draw.text((x + WIDTH / 2, TITLE / 2), title, fill="#202124", font=font, anchor="mm")
        for number, row in enumerate(ROWS):
            left, top = LEFT + column * STEP_X, TOP + row * STEP_Y
            picture.paste(source.crop((left, top, left + WIDTH, top + HEIGHT)), (x, TITLE + number * (HEIGHT + GAP)))
    left, top, _, bottom = LEGEND
    for number in range(ENTRIES):
        x = left + number * ENTRY_WIDTH
        entry = source.crop((x, top, x + ENTRY_WIDTH, bottom))
        picture.paste(entry, (number % 6 * (width // 6), grid + number // 6 * ENTRY_HEIGHT))
    picture.save(DOCS / "readme.png", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
