"""Make docs/tensorboard.png: the last images that a run sent to TensorBoard, below each other.

python train.py --dataset shapes --method fixmatch --split 1_30 epochs=6 burn_in_epochs=3 evaluation.interval=3
python docs/tools/tensorboard_picture.py exp/shapes/fixmatch/1_30
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PER_KIND, GAP = 2, 6  # images of val and of the unlabeled list; pixels between them


def main(run: str) -> None:
    events = EventAccumulator(run, size_guidance={"images": 0}).Reload()
    names = sorted(events.Tags()["images"], reverse=True)  # val first
    kinds = [[name for name in names if name.startswith(kind)][:PER_KIND] for kind in ("val/", "unlabeled/")]
    strips = [Image.open(io.BytesIO(events.Images(name)[-1].encoded_image_string)) for kind in kinds for name in kind]
    page = Image.new("RGB", (max(s.width for s in strips), sum(s.height + GAP for s in strips) - GAP), "white")
    top = 0
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height + GAP
    page.save(Path(__file__).resolve().parents[1] / "tensorboard.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
