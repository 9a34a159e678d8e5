"""From a normalized image to class scores: whole, center crop or sliding window, at several scales and flipped.

Nothing here reads files or counts pixels. Whatever the mode, an image's scores do not depend on its batch companions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allspark.config import MODES
from allspark.data.image_io import MIN_SIDE
from allspark.data.spec import DatasetSpec
from allspark.utils.errors import UserError


@dataclass(frozen=True)
class Inference:
    """How an image is put to the model. window: side in pixels of the window or center crop; whole does without."""

    mode: str = "whole"
    window: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False  # average with the horizontally flipped image
    window_batch: int = 4  # windows per forward pass

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"evaluation mode '{self.mode}' is not known: choose one of {', '.join(MODES)}")
        if self.mode != "whole" and (self.window is None or self.window < MIN_SIDE):
            raise UserError(f"evaluation window {self.window}: {self.mode} needs a side of at least {MIN_SIDE} pixels")
        if not self.scales or not all(0 < scale <= 16 for scale in self.scales):
            raise UserError(f"evaluation scales {self.scales}: give one or more factors above 0 and at most 16")

    @property
    def averaged(self) -> bool:
        """Whether class scores are mean probabilities of several passes; else they are the logits of one."""
        return self.mode == "sliding_window" or self.scales != (1.0,) or self.flip

    def region(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns of the image that are predicted and counted: all of it, but for center_crop."""
        if self.mode != "center_crop":
            return slice(0, height), slice(0, width)
        rows, columns = min(self.window, height), min(self.window, width)
        top, left = (height - rows) // 2, (width - columns) // 2
        return slice(top, top + rows), slice(left, left + columns)


def inference_for(
    spec: DatasetSpec, crop_size: int, mode: str | None = None, window: int | None = None, **options
) -> Inference:
    """The Inference of a recipe: the data set's own mode and the training crop where the recipe leaves them open."""
    return Inference(mode or spec.eval_mode, window or crop_size, **options)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards every module has the training flag that it came with."""
    # no_grad and not inference_mode: a tensor that a module caches meanwhile must stay usable in training
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def class_scores(model: nn.Module, image: Tensor, inference: Inference) -> Tensor:
    """Scores to take the maximum of: image (B, 3, H, W) normalized -> (B, K, H, W), logits or mean probabilities.

    center_crop is a matter of the caller, who cuts `inference.region` from image and mask.
    """
    if inference.averaged:
        return average_views(model, image, inference)
    with eval_mode(model):
        return predict_whole(model, image)  # the softmax would not move the maximum


def best_class(scores: Tensor, inference: Inference) -> tuple[Tensor, Tensor]:
    """What class_scores says: the class (B, H, W) int64 with the highest score, and its probability (B, H, W)."""
    best, label = scores.max(1)
    return label, best if inference.averaged else (best - scores.logsumexp(1)).exp()


def average_views(model: nn.Module, image: Tensor, inference: Inference) -> Tensor:
    """Probabilities, averaged over scales and flips: image (B, 3, H, W) normalized -> (B, K, H, W)."""
    total, views = None, 0
    with eval_mode(model):
        for scale in inference.scales:
            scaled = rescale(image, scale)
            for flipped in (False, True) if inference.flip else (False,):
                prob = predict_view(model, scaled.flip(-1) if flipped else scaled, inference)
                prob = resize_antialiased(prob.flip(-1) if flipped else prob, image.shape[-2:])
                total = prob if total is None else total + prob
                views += 1
    return total / views


def predict_view(model: nn.Module, image: Tensor, inference: Inference) -> Tensor:
    """Probabilities of one scaled and flipped view: (B, 3, H, W) -> (B, K, H, W)."""
    if inference.mode == "sliding_window":
        return predict_sliding(model, image, inference.window, inference.window_batch)
    return predict_whole(model, image).softmax(1)


def predict_whole(model: nn.Module, image: Tensor) -> Tensor:
    """Logits of the image in one pass: (B, 3, H, W) -> (B, K, H, W). The caller has the model in eval mode."""
    return model(image).logits


def predict_sliding(model: nn.Module, image: Tensor, window: int, window_batch: int = 4) -> Tensor:
    """Mean probability over all windows that see a pixel: (B, 3, H, W) -> (B, K, H, W); the stride is 2/3 window.

    An image smaller than the window is one window of its own size. The caller has the model in eval mode.
    """
    batch, _, height, width = image.shape
    rows, columns, corners = window_corners((height, width), window)
    total, seen = None, image.new_zeros(height, width)
    per_pass = max(1, window_batch // batch)
    for first in range(0, len(corners), per_pass):
        chunk = corners[first : first + per_pass]
        windows = torch.cat([image[..., y : y + rows, x : x + columns] for y, x in chunk])  # (n * B, 3, rows, columns)
        prob = model(windows).logits.softmax(1)
        if total is None:
            total = prob.new_zeros(batch, prob.shape[1], height, width)
        for (y, x), part in zip(chunk, prob.split(batch), strict=True):
            total[..., y : y + rows, x : x + columns] += part
            seen[y : y + rows, x : x + columns] += 1
    return total / seen  # a pixel's maximum is that of the sum, and the values are comparable across scales


def window_corners(size: tuple[int, int], window: int) -> tuple[int, int, list[tuple[int, int]]]:
    """Height and width of the windows over an image of `size`, and their upper left corners (y, x), row by row."""
    stride = max(1, window * 2 // 3)
    tops, lefts = (window_positions(length, window, stride) for length in size)
    return min(window, size[0]), min(window, size[1]), [(y, x) for y in tops for x in lefts]


def window_positions(length: int, window: int, stride: int) -> list[int]:
    """First pixel of each window along one side; the windows cover the side and none reaches beyond it."""
    # Released: supervised.py starts at 0, stride, 2 * stride ... < length and truncates the last windows (1024 px,
    # window 801: 0 and 534, the second 490 px high); here the last one is shifted inside (0 and 223), because a
    # truncated window can be a sliver below the model's 32 px, and equal windows go through the model in batches.
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def rescale(image: Tensor, scale: float) -> Tensor:
    """The image at `scale` times its size, no side below MIN_SIDE: (B, C, H, W) -> (B, C, H', W')."""
    return resize_antialiased(image, scaled_size(image.shape[-2:], scale))


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Height and width at `scale`; at 1 they are as they were, whatever they are."""
    if scale == 1:
        return tuple(size)
    height, width = (max(MIN_SIDE, round(side * scale)) for side in size)
    return height, width


def resize_antialiased(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear and antialiased, as the training images are scaled: (B, C, H, W) -> (B, C, *size)."""
    if image.shape[-2:] == tuple(size):
        return image
    return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
