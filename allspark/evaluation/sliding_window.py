"""From normalized images to class scores: whole, center crop or sliding window, at several scales, with flips.

An image's scores never depend on the other images in its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allspark.config import MIN_SIDE, MODES, WINDOWS, EvaluationConfig, Size, height_width
from allspark.data.spec import DatasetSpec
from allspark.evaluation.dataset import center_region, check_min_size
from allspark.models.eval_mode import eval_mode
from allspark.models.resize import check_scales, scaled_size
from allspark.utils.errors import UserError


@dataclass(frozen=True)
class Inference:
    """How images are passed to the model.

    Args:
        mode: whole, center_crop or sliding_window.
        window: side, or height and width, of the window or center crop in pixels; unused by whole.
        scales: factors to resize the image by; probabilities are averaged.
        flip: average with the horizontally flipped image.
        windows: inside or released, see `window_spans`.
        window_batch: windows per forward pass.
    """

    mode: str = "whole"
    window: Size | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    windows: str = "inside"
    window_batch: int = 4

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"unknown evaluation mode '{self.mode}'; choose one of {', '.join(MODES)}")
        if self.windows not in WINDOWS:
            raise UserError(f"unknown evaluation windows '{self.windows}'; choose one of {', '.join(WINDOWS)}")
        if self.mode != "whole" and (self.window is None or min(height_width(self.window)) < MIN_SIDE):
            raise UserError(f"evaluation window {self.window}: {self.mode} needs a side of at least {MIN_SIDE} pixels")
        check_scales(self.scales, "scales")

    @property
    def averaged(self) -> bool:
        """Whether class scores are probabilities averaged over several passes, not the logits of one pass."""
        return self.mode == "sliding_window" or self.scales != (1.0,) or self.flip

    def region(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns that are predicted and counted: the whole image, except for center_crop."""
        return center_region(height, width, self.window if self.mode == "center_crop" else max(height, width))


def inference_for(
    spec: DatasetSpec,
    crop_size: Size,
    evaluation: EvaluationConfig | None = None,
    *,
    mode: str | None = None,
    windows: str | None = None,
    **options,
) -> Inference:
    """The Inference of a config; the defaults are the data set's mode and the training crop size.

    Args:
        spec: of the data set.
        crop_size: of the training crops.
        evaluation: of the config.
        mode, windows: in place of those of the config.
        **options: scales and flip.
    """
    evaluation = evaluation or EvaluationConfig()
    mode, windows = mode or evaluation.mode or spec.eval_mode, windows or evaluation.windows
    return Inference(mode, evaluation.window or crop_size, windows=windows, **options)


def class_scores(model: nn.Module, image: Tensor, inference: Inference) -> Tensor:
    """Class scores of normalized images (B, C, H, W) -> (B, K, H, W): logits, or probabilities if `averaged`.

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
    """Probabilities averaged over scales and flips: normalized images (B, C, H, W) -> (B, K, H, W)."""
    total, views = None, 0
    with eval_mode(model):
        for scale in inference.scales:
            scaled = resize_antialiased(image, scaled_size(image.shape[-2:], scale))
            for flipped in (False, True) if inference.flip else (False,):
                view = scaled.flip(-1) if flipped else scaled
                if inference.mode == "sliding_window":
                    prob = predict_sliding(model, view, inference)
                else:
                    prob = model(view).logits.softmax(1)
                prob = resize_antialiased(prob.flip(-1) if flipped else prob, image.shape[-2:])
                total = prob if total is None else total + prob
                views += 1
    return total / views


def predict_sliding(model: nn.Module, image: Tensor, inference: Inference) -> Tensor:
    """Probabilities averaged over all windows that contain a pixel; the stride is 2/3 of the window.

    Args:
        model: in eval mode.
        image: (B, C, H, W) normalized. An image smaller than the window is one window of its own size.

    Returns:
        (B, K, H, W).
    """
    batch, _, height, width = image.shape
    total, count = None, image.new_zeros(height, width)
    for chunk in window_batches((height, width), inference, batch):
        windows = torch.cat([image[..., rows, columns] for rows, columns in chunk])  # (n * B, 3, rows, columns)
        prob = model(windows).logits.softmax(1)
        if total is None:
            total = prob.new_zeros(batch, prob.shape[1], height, width)
        for (rows, columns), part in zip(chunk, prob.split(batch), strict=True):
            total[..., rows, columns] += part
            count[rows, columns] += 1
    return total / count  # a mean, so that values are comparable across scales


def window_batches(size: tuple[int, int], inference: Inference, batch: int) -> list[list[tuple[slice, slice]]]:
    """Rows and columns of the windows over images (B, 3, *size), row by row, in forward passes of one window size."""
    vertical, horizontal = side_spans(size, inference)
    windows = [(slice(*rows), slice(*columns)) for rows in vertical for columns in horizontal]
    per_pass = max(1, inference.window_batch // batch)
    batches = []
    for _, group in groupby(windows, lambda window: [span.stop - span.start for span in window]):
        same_size = list(group)
        batches += [same_size[first : first + per_pass] for first in range(0, len(same_size), per_pass)]
    return batches


def side_spans(size: tuple[int, int], inference: Inference) -> list[list[tuple[int, int]]]:
    """window_spans of the height and of the width of an image of `size`."""
    windows = height_width(inference.window)
    return [window_spans(*pair, inference.windows) for pair in zip(size, windows, strict=True)]


def window_spans(length: int, window: int, windows: str = "inside") -> list[tuple[int, int]]:
    """First pixel and end of each window along one side; the stride is 2/3 of the window.

    Args:
        windows: inside: the last window is shifted inside, so that all have one size (1024 pixels, window 801: 0 to 801
            and 223 to 1024). Released (supervised.py): it is cut off at the border (0 to 801, 534 to 1024).
    """
    stride = max(1, window * 2 // 3)
    if windows == "released":
        return [(first, min(first + window, length)) for first in range(0, length, stride)]
    last = max(length - window, 0)
    return [(first, min(first + window, length)) for first in (*range(0, last, stride), last)]


def check_size(image: Tensor, name: object, inference: Inference) -> None:
    """Raise UserError if an image (..., H, W), or a released window on it, is smaller than the models accept."""
    check_min_size(image, name)
    if inference.mode == "sliding_window" and inference.windows == "released":
        spans = (side_spans(scaled_size(image.shape[-2:], scale), inference) for scale in inference.scales)
        sides = [end - first for sides in spans for side in sides for first, end in side]
        if min(sides) < MIN_SIDE:
            raise UserError(
                f"{name}: with evaluation.windows=released its last window has a side of {min(sides)} pixels; the "
                f"model needs at least {MIN_SIDE}; use inside"
            )


def resize_antialiased(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear resize, as for training images: (B, C, H, W) -> (B, C, *size)."""
    if image.shape[-2:] == tuple(size):
        return image
    return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
