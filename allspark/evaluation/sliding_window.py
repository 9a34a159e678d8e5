"""From normalized images to class scores: whole, center crop or sliding window, at several scales, with flips.

An image's scores never depend on the other images in its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allspark.config import MODES, Size, height_width
from allspark.data.image_io import MIN_SIDE
from allspark.data.spec import DatasetSpec
from allspark.evaluation.dataset import center_region
from allspark.models.eval_mode import eval_mode
from allspark.utils.errors import UserError


@dataclass(frozen=True)
class Inference:
    """How images are passed to the model.

    Args:
        mode: whole, center_crop or sliding_window.
        window: side, or height and width, of the window or center crop in pixels; unused by whole.
        scales: factors to resize the image by; probabilities are averaged.
        flip: average with the horizontally flipped image.
        window_batch: windows per forward pass.
    """

    mode: str = "whole"
    window: Size | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window_batch: int = 4

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"unknown evaluation mode '{self.mode}'; choose one of {', '.join(MODES)}")
        if self.mode != "whole" and (self.window is None or min(height_width(self.window)) < MIN_SIDE):
            raise UserError(f"evaluation window {self.window}: {self.mode} needs a side of at least {MIN_SIDE} pixels")
        if not self.scales or not all(0 < scale <= 16 for scale in self.scales):
            raise UserError(f"evaluation scales {self.scales}: give one or more factors above 0 and at most 16")

    @property
    def averaged(self) -> bool:
        """Whether class scores are probabilities averaged over several passes, not the logits of one pass."""
        return self.mode == "sliding_window" or self.scales != (1.0,) or self.flip

    def region(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns that are predicted and counted: the whole image, except for center_crop."""
        return center_region(height, width, self.window if self.mode == "center_crop" else max(height, width))


def inference_for(
    spec: DatasetSpec, crop_size: Size, mode: str | None = None, window: Size | None = None, **options
) -> Inference:
    """The Inference of a config; the defaults are the data set's mode and the training crop size."""
    return Inference(mode or spec.eval_mode, window or crop_size, **options)


def class_scores(model: nn.Module, image: Tensor, inference: Inference) -> Tensor:
    """Class scores of normalized images (B, 3, H, W) -> (B, K, H, W): logits, or probabilities if `averaged`.

    For center_crop the caller cuts `inference.region` from the image.
    """
    if inference.averaged:
        return average_views(model, image, inference)
    with eval_mode(model):
        return model(image).logits  # softmax would not change the maximum


def best_class(scores: Tensor, inference: Inference) -> tuple[Tensor, Tensor]:
    """Result of class_scores (B, K, H, W) -> best class (B, H, W) int64 and its probability (B, H, W)."""
    best, label = scores.max(1)
    return label, best if inference.averaged else (best - scores.logsumexp(1)).exp()


def average_views(model: nn.Module, image: Tensor, inference: Inference) -> Tensor:
    """Probabilities averaged over scales and flips: normalized images (B, 3, H, W) -> (B, K, H, W)."""
    total, views = None, 0
    with eval_mode(model):
        for scale in inference.scales:
            scaled = resize_antialiased(image, scaled_size(image.shape[-2:], scale))
            for flipped in (False, True) if inference.flip else (False,):
                view = scaled.flip(-1) if flipped else scaled
                if inference.mode == "sliding_window":
                    prob = predict_sliding(model, view, inference.window, inference.window_batch)
                else:
                    prob = model(view).logits.softmax(1)
                prob = resize_antialiased(prob.flip(-1) if flipped else prob, image.shape[-2:])
                total = prob if total is None else total + prob
                views += 1
    return total / views


def predict_sliding(model: nn.Module, image: Tensor, window: Size, window_batch: int = 4) -> Tensor:
    """Probabilities averaged over all windows that contain a pixel; the stride is 2/3 of the window.

    Args:
        model: in eval mode.
        image: (B, 3, H, W) normalized. An image smaller than the window is one window of its own size.
        window: its side, or height and width.
        window_batch: windows per forward pass.

    Returns:
        (B, K, H, W).
    """
    batch, _, height, width = image.shape
    rows, columns, corners = window_corners((height, width), window)
    total, count = None, image.new_zeros(height, width)
    per_pass = max(1, window_batch // batch)
    for first in range(0, len(corners), per_pass):
        chunk = corners[first : first + per_pass]
        windows = torch.cat([image[..., y : y + rows, x : x + columns] for y, x in chunk])  # (n * B, 3, rows, columns)
        prob = model(windows).logits.softmax(1)
        if total is None:
            total = prob.new_zeros(batch, prob.shape[1], height, width)
        for (y, x), part in zip(chunk, prob.split(batch), strict=True):
            total[..., y : y + rows, x : x + columns] += part
            count[y : y + rows, x : x + columns] += 1
    return total / count  # a mean, so that values are comparable across scales


def window_corners(size: tuple[int, int], window: Size) -> tuple[int, int, list[tuple[int, int]]]:
    """Height and width of the windows over an image of `size`, and their upper left corners (y, x), row by row."""
    sides = height_width(window)
    strides = (max(1, side * 2 // 3) for side in sides)
    tops, lefts = map(window_positions, size, sides, strides)
    rows, columns = map(min, sides, size)
    return rows, columns, [(y, x) for y in tops for x in lefts]


def window_positions(length: int, window: int, stride: int) -> list[int]:
    """First pixel of each window along one side; the windows cover the side and stay inside it."""
    # Released: supervised.py starts at 0, stride, 2 * stride ... < length and truncates the last windows (1024 px,
    # window 801: 0 and 534, the second 490 px high). Here the last window is shifted inside (0 and 223), because a
    # truncated window can be smaller than the model's minimum of 32 px, and windows of one size can be batched.
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Height and width at `scale`, at least MIN_SIDE; unchanged at scale 1."""
    if scale == 1:
        return tuple(size)
    height, width = (max(MIN_SIDE, round(side * scale)) for side in size)
    return height, width


def resize_antialiased(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear resize, as for training images: (B, C, H, W) -> (B, C, *size)."""
    if image.shape[-2:] == tuple(size):
        return image
    return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
