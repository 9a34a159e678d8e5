"""The images that a model predicts best and worst, found on the way through an evaluation, small enough for a page."""

from __future__ import annotations

import bisect
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from allspark.data.spec import DatasetSpec
from allspark.evaluation.metrics import ConfusionMatrix
from allspark.visualization.pictures import full_palette, has_color, to_rgb


@dataclass(frozen=True)
class ScoredImage:
    """An image of val with its own scores in percent; iou: nan for a class that is neither in truth nor prediction.

    image: RGB; truth, prediction: class indices with palette (mode P), all of one size.
    """

    name: str
    miou: float
    iou: tuple[float, ...]
    image: Image.Image
    truth: Image.Image
    prediction: Image.Image


class BestWorst:
    """`evaluate` calls it with each image: it keeps the `count` best and the `count` worst, and counts every pixel.

    side: the most pixels that a kept image has in width or height. No more than 2 count + 1 images are ever held.
    """

    def __init__(self, spec: DatasetSpec, count: int, side: int = 480) -> None:
        self.spec, self.count, self.side = spec, count, side
        self.confusion = ConfusionMatrix(spec.num_classes, spec.ignore_index)
        self.kept: list[ScoredImage] = []  # by their mIoU, rising

    def __call__(self, name: str, image: Tensor, mask: Tensor, prediction: Tensor) -> None:
        """image (3, H, W), mask and prediction (H, W), uint8 on the CPU; ignore_index where nothing was predicted."""
        own = image_confusion(mask, prediction, self.spec)
        self.confusion.matrix += own.matrix
        scores = own.result(1)
        if math.isnan(scores.miou):  # all of it ignored
            return
        place = bisect.bisect([(kept.miou, kept.name) for kept in self.kept], (scores.miou, name))
        full = len(self.kept) == 2 * self.count
        if full and place == self.count:  # neither among the best nor among the worst: the usual case, so not shrunk
            return
        photo = Image.fromarray(to_rgb(image))
        photo.thumbnail((self.side, self.side), Image.Resampling.LANCZOS)
        masks = [index_image(one, self.spec, photo.size) for one in (mask, prediction)]
        self.kept.insert(place, ScoredImage(name, scores.miou, scores.iou, photo, *masks))
        if full:
            del self.kept[self.count]  # the middle one of 2 count + 1

    @property
    def worst(self) -> Sequence[ScoredImage]:
        """The worst first; where there are fewer than 2 count, none of them is among the best, too."""
        return self.kept[: len(self.kept) // 2]

    @property
    def best(self) -> Sequence[ScoredImage]:
        """The best first."""
        return self.kept[len(self.kept) // 2 :][::-1]


def image_confusion(mask: Tensor, prediction: Tensor, spec: DatasetSpec) -> ConfusionMatrix:
    """Of one image; a pixel without a prediction, outside the center crop, is not counted."""
    confusion = ConfusionMatrix(spec.num_classes, spec.ignore_index)
    nothing = prediction == spec.ignore_index
    confusion.update(prediction.masked_fill(nothing, 0), mask.masked_fill(nothing, spec.ignore_index))
    return confusion


def index_image(mask: Tensor, spec: DatasetSpec, size: tuple[int, int]) -> Image.Image:
    """(H, W) uint8 -> class indices with palette, of `size` = (width, height); black classes are transparent."""
    picture = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8)).resize(size, Image.Resampling.NEAREST)
    picture.putpalette(full_palette(spec.palette).tobytes())
    black = ~has_color(spec.palette)[: len(spec.palette)]
    picture.info["transparency"] = bytes(0 if one else 255 for one in black)
    return picture


def encode_image(picture: Image.Image, kind: str) -> bytes:
    """The bytes of a PNG or JPEG file."""
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 82, "optimize": True} if kind == "JPEG" else {"optimize": True}))
    return file.getvalue()
