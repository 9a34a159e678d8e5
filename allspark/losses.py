"""Pixel losses. All take logits (B, K, H, W) and labels (B, H, W), and are 0, not NaN, where no pixel counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CrossEntropy(nn.Module):
    """Mean cross-entropy over the pixels that are not ignored.

    Args:
        ignore_index: of the mask.
        weights: of each class, for a weighted mean.
    """

    def __init__(self, ignore_index: int = 255, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        # No part of a checkpoint: the recipe has them
        self.register_buffer("weights", None if weights is None else torch.tensor(weights), persistent=False)

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        total = F.cross_entropy(
            logits, mask, self.weights, ignore_index=self.ignore_index, reduction=sum_reduction(logits)
        ).sum()
        valid = mask != self.ignore_index
        if self.weights is None:
            return total / valid.sum().clamp(min=1)
        return total / (self.weights[mask.where(valid, 0)] * valid).sum().clamp(min=1e-6)


def sum_reduction(logits: Tensor) -> str:
    """The reduction of a summed cross-entropy: CUDA has no deterministic kernel that sums as well."""
    return "none" if logits.is_cuda and torch.are_deterministic_algorithms_enabled() else "sum"


class OHEM(nn.Module):
    """Online hard example mining: mean cross-entropy over the pixels whose true class has the smallest probabilities.

    Keeps pixels with p <= thresh, and at least the min_kept pixels with the smallest p (ignored pixels: p = 1). Plain
    cross-entropy if fewer than min_kept are valid or, as released, if min_kept is 0.

    Args:
        thresh: probability of the true class up to which a pixel is hard.
        min_kept: minimum number of pixels that are kept.
        ignore_index: of the mask.
        images: batch size that min_kept refers to; scaled in proportion for others. None: not scaled.
    """

    def __init__(
        self, thresh: float = 0.7, min_kept: int = 200_000, ignore_index: int = 255, images: int | None = None
    ) -> None:
        super().__init__()
        self.thresh, self.min_kept, self.ignore_index, self.images = thresh, min_kept, ignore_index, images

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        valid = keep = mask != self.ignore_index
        loss = F.cross_entropy(logits, mask, ignore_index=self.ignore_index, reduction="none")
        least = self.min_kept if self.images is None else -(-self.min_kept * len(mask) // self.images)
        if least:
            prob = torch.where(valid, (-loss.detach()).exp(), 1.0)  # softmax probability of the true class
            rank = min(least, prob.numel())
            if torch.are_deterministic_algorithms_enabled():  # kthvalue is refused then on a GPU, before torch 2.10
                smallest = prob.flatten().sort().values[rank - 1]
            else:
                smallest = prob.flatten().kthvalue(rank).values
            threshold = smallest.clamp(min=self.thresh)
            keep = valid & ((prob <= threshold) | (valid.sum() < least))
        return (loss * keep).sum() / keep.sum().clamp(min=1)


class Dice(nn.Module):
    """1 - 2 |P ∩ Y| / (|P| + |Y|) with probabilities P, averaged over the classes Y of the batch's labels (V-Net, 2016,
    without its squares).
    """

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        valid = (mask != self.ignore_index).unsqueeze(1)
        labels = torch.arange(logits.shape[1], device=mask.device).view(1, -1, 1, 1)
        prob, truth = logits.float().softmax(1) * valid, ((mask.unsqueeze(1) == labels) & valid).float()
        areas = truth.sum((0, 2, 3))
        scores = 2 * (prob * truth).sum((0, 2, 3)) / (prob.sum((0, 2, 3)) + areas).clamp(min=1e-6)
        there = areas > 0
        return ((1 - scores) * there).sum() / there.sum().clamp(min=1)


class WithDice(nn.Module):
    """A criterion plus `weight` times Dice."""

    def __init__(self, criterion: nn.Module, weight: float, ignore_index: int = 255) -> None:
        super().__init__()
        self.criterion, self.dice, self.weight = criterion, Dice(ignore_index), weight

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        return self.criterion(logits, mask) + self.weight * self.dice(logits, mask)


def consistency_loss(
    logits: Tensor, label: Tensor, keep: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy against pseudo-labels.

    Args:
        logits: (B, K, H, W).
        label: classes (B, H, W), or soft labels (B, K, H, W), probabilities of each class.
        keep: (B, H, W) bool, confident pixels; None: all.
        valid: (B, H, W) bool, pixels that are not padding; None: all.

    Returns:
        The loss and the share of valid pixels that took part (mask_ratio). The loss is divided by the number of valid
        pixels, not of confident ones, so that little confidence also means little weight (UniMatch).
    """
    loss = F.cross_entropy(logits, label, reduction="none")
    valid = torch.ones_like(loss, dtype=torch.bool) if valid is None else valid
    counted = valid if keep is None else keep & valid
    total = valid.sum().clamp(min=1)
    return (loss * counted).sum() / total, counted.sum() / total


def build_criterion(
    name: str,
    ignore_index: int,
    *,
    thresh: float,
    min_kept: int,
    min_kept_images: int | None = None,
    class_weights: Sequence[float] | None = None,
    dice: float = 0.0,
) -> nn.Module:
    """The labeled loss of a recipe, `criterion.*`: ce | ohem, ce with a weight for each class, either with Dice."""
    criterion = (
        OHEM(thresh, min_kept, ignore_index, min_kept_images)
        if name == "ohem"
        else CrossEntropy(ignore_index, class_weights)
    )
    return WithDice(criterion, dice, ignore_index) if dice else criterion
