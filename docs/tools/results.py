"""Rebuild the tables and pictures of docs/runs from the archives of the recorded runs.

    python docs/tools/results.py                        # all of docs/runs, about a minute
    python docs/tools/results.py --pack FOLDER NAME     # first add the runs FOLDER/<row>/seed_<n> to docs/runs/NAME, or
                                                        # FOLDER/<list>/<row>/seed_<n>: several draws of the labels

docs/runs/NAME/runs.jsonl.gz has the config, provenance and metrics of each run. `allspark compare` reads it and writes
its table and all pictures to exp/results/NAME. The table and the pictures that a page of docs refers to are then copied
to docs/runs/NAME, the pictures reduced to 256 colors. parts.json, from docs/tools/parts.py, is drawn as parts.png.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "tools")]

import parts

from allspark.__main__ import main as allspark
from allspark.config_io import read_yaml
from allspark.engine.provenance import read_provenance
from allspark.engine.writers import METRICS, read_metrics
from allspark.utils.errors import UserError, run_main
from allspark.visualization.pictures import save_image

RUNS = ROOT / "docs" / "runs"
OUT = ROOT / "exp" / "results"
ARCHIVE = "runs.jsonl.gz"
BASE = "supervised"  # the first row of a table
PAIRED = (
    BASE,
    "allspark_no_attention",
    "allspark_revised_no_attention",
)  # rows that the others are compared with, where they are
DIGITS = 4  # significant digits of a loss; losses are drawn, not tabulated


def main(argv: Sequence[str]) -> None:
    description, _, more = __doc__.partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=more, formatter_class=raw)
    parser.add_argument("--pack", nargs=2, metavar=("FOLDER", "NAME"), help="record the runs in a folder")
    args = parser.parse_args(argv)
    if args.pack:
        archive = RUNS / args.pack[1] / ARCHIVE
        archive.parent.mkdir(exist_ok=True)
        archive.write_bytes(pack(Path(args.pack[0]), archive))
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))
    for archive in sorted(RUNS.glob(f"*/{ARCHIVE}")):
        rebuild(archive, OUT / archive.parent.name, pages)
        print(f"results: {archive.parent.relative_to(ROOT)}", flush=True)


def pack(folder: Path, archive: Path | None = None) -> bytes:
    """The archive of the runs in a folder, added to those of `archive`. The same runs give the same bytes."""
    found = (*folder.glob(f"*/seed_*/{METRICS}"), *folder.glob(f"*/*/seed_*/{METRICS}"))
    if not found:
        raise UserError(f"{folder}: has no runs <row>/seed_<n>/{METRICS}; name a folder of scripts/compare.sh")
    entries = read_archive(archive) if archive and archive.exists() else []
    for run in (path.parent for path in found):
        config, lines = read_yaml(run / "config.yaml"), read_metrics(run / METRICS)
        metrics = [recorded(line) for line in lines]
        entry = {"name": run.parent.name, "config": config, "provenance": read_provenance(run), "metrics": metrics}
        entries = [other for other in entries if key(other) != key(entry)] + [entry]
    entries.sort(key=lambda entry: (entry["name"] != BASE, *key(entry)))
    text = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries)
    return gzip.compress(text.encode("utf-8"), mtime=0)


def key(entry: Mapping[str, Any]) -> tuple[str, str, int]:
    """What a run is compared by: row, list of the labels, seed."""
    data = entry["config"]["data"]
    return entry["name"], str(data.get("labeled_id_path") or data["split"]), entry["config"]["seed"]


def read_archive(archive: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(archive.read_bytes()).splitlines()]


def recorded(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a table or a picture needs of a line: all of an evaluation; step, speed and rounded losses of training."""
    if "miou" in line:
        return dict(line)
    exact = {key: line[key] for key in ("step", "epoch", "images_per_s") if key in line}
    losses = {key: line[key] for key in line if key.startswith("loss_") and line[key] is not None}
    return exact | {key: float(f"{value:.{DIGITS}g}") for key, value in losses.items()}


def rebuild(archive: Path, out: Path, pages: str) -> None:
    """Write table.md and the pictures that the text `pages` refers to."""
    folder = archive.parent
    with contextlib.redirect_stdout(io.StringIO()):
        allspark(["compare", str(archive), "--out", str(out), *options(archive)])
    if (folder / "parts.json").is_file():
        shutil.copy(folder / "parts.json", out)
        parts.draw(out / "parts.json")
    shutil.copy(out / "table.md", folder)
    for name in sorted(set(re.findall(rf"\(runs/{re.escape(folder.name)}/(\w+\.png)\)", pages))):
        with Image.open(out / name) as picture:
            save_image(reduce_colors(picture), folder / name)


def options(archive: Path) -> list[str]:
    """Options of compare for the rows of an archive."""
    lists: dict[str, set[str]] = {}
    for entry in read_archive(archive):
        lists.setdefault(entry["name"], set()).add(entry["config"]["data"]["split"])
    paired = [f"--paired={base}" for base in PAIRED if base in lists]
    return paired + ["--draws"] * any(len(splits) > 1 for splits in lists.values())


def reduce_colors(picture: Image.Image, exact: int = 128) -> Image.Image:
    """A palette image of 256 colors: the `exact` most frequent ones, and a palette for the others."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.int64)).view(-1, 3)  # (pixels, 3)
    codes, inverse, counts = (pixels @ torch.tensor([1 << 16, 1 << 8, 1])).unique(
        return_inverse=True, return_counts=True
    )
    colors = torch.stack((codes >> 16, codes >> 8 & 255, codes & 255), dim=1)  # (colors, 3)
    order = counts.argsort(descending=True, stable=True)
    palette = colors[order[:256]]
    if len(colors) > 256:
        frequent = palette[:exact]
        rare = pixels[~torch.isin(inverse, order[:exact])]
        strip = Image.fromarray(rare[:, None].to(torch.uint8).numpy())
        others = strip.quantize(256 - exact, method=Image.Quantize.MEDIANCUT, kmeans=3).getpalette()
        palette = torch.cat((frequent, torch.tensor(others).view(-1, 3)))[:256]
    nearest = torch.cat([torch.cdist(part, palette.double()).argmin(1) for part in colors.double().split(10_000)])
    reduced = Image.fromarray(nearest[inverse].view(picture.height, picture.width).to(torch.uint8).numpy(), mode="P")
    reduced.putpalette(palette.flatten().tolist())
    return reduced


if __name__ == "__main__":
    sys.exit(run_main(main))
