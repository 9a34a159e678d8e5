"""Collects the best and the worst predicted images during an evaluation, downscaled for a web page."""

from __future__ import annotations

import bisect
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from allspark.data.spec import DatasetSpec
from allspark.evaluation.metrics import ConfusionMatrix
from allspark.visualization.pictures import has_color, index_picture, to_rgb


@dataclass(frozen=True)
class ScoredImage:
    """An evaluation image with its own metrics in percent.

    Args:
        iou: per class; nan for a class absent from truth and prediction.
        image: RGB.
        truth, prediction: class indices with palette (mode P), of the same size as the image.
    """

    name: str
    miou: float
    iou: tuple[float, ...]
    image: Image.Image
    truth: Image.Image
    prediction: Image.Image


class BestWorst:
    """A `save` function for `evaluate` that keeps the `count` best and the `count` worst images, and counts all pixels.

    At most 2 count + 1 images are in memory.

    Args:
        side: maximum width and height of a saved image.
    """

    def __init__(self, spec: DatasetSpec, count: int, side: int = 480) -> None:
        self.spec, self.count, self.side = spec, count, side
        self.confusion = ConfusionMatrix(spec.num_classes, spec.ignore_index)
        self.saved: list[ScoredImage] = []  # sorted by mIoU

    def __call__(self, name: str, image: Tensor, mask: Tensor, prediction: Tensor) -> None:
        """image (3, H, W), mask and prediction (H, W), uint8 on the CPU; prediction: ignore_index outside the crop."""
        confusion = image_confusion(mask, prediction, self.spec)
        self.confusion.matrix += confusion.matrix
        result = confusion.result(1)
        if math.isnan(result.miou):  # all pixels are ignored
            return
        position = bisect.bisect([(other.miou, other.name) for other in self.saved], (result.miou, name))
        full = len(self.saved) == 2 * self.count
        if full and position == self.count:  # neither among the best nor the worst: the usual case
            return
        photo = Image.fromarray(to_rgb(image))
        photo.thumbnail((self.side, self.side), Image.Resampling.LANCZOS)
        masks = [index_image(one, self.spec, photo.size) for one in (mask, prediction)]
        self.saved.insert(position, ScoredImage(name, result.miou, result.iou, photo, *masks))
        if full:
            del self.saved[self.count]  # the middle one of 2 count + 1

    @property
    def worst(self) -> Sequence[ScoredImage]:
        """The worst first. With fewer than 2 count images, none is both among the worst and the best."""
        return self.saved[: len(self.saved) // 2]

    @property
    def best(self) -> Sequence[ScoredImage]:
        """The best first."""
        return self.saved[len(self.saved) // 2 :][::-1]


def image_confusion(mask: Tensor, prediction: Tensor, spec: DatasetSpec) -> ConfusionMatrix:
    """Confusion matrix of one image; pixels without a prediction, outside the center crop, are not counted."""
    confusion = ConfusionMatrix(spec.num_classes, spec.ignore_index)
    outside = prediction == spec.ignore_index
    confusion.update(prediction.masked_fill(outside, 0), mask.masked_fill(outside, spec.ignore_index))
    return confusion


def index_image(mask: Tensor, spec: DatasetSpec, size: tuple[int, int]) -> Image.Image:
    """(H, W) uint8 -> class indices with palette, resized to (width, height); black classes are transparent."""
    picture = index_picture(mask, spec.palette).resize(size, Image.Resampling.NEAREST)
    black = ~has_color(spec.palette)[: len(spec.palette)]
    picture.info["transparency"] = bytes(0 if one else 255 for one in black)
    return picture


def encode_image(picture: Image.Image, kind: str) -> bytes:
    """The bytes of a PNG or JPEG file."""
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 82, "optimize": True} if kind == "JPEG" else {"optimize": True}))
    return file.getvalue()
