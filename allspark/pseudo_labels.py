"""Pseudo-labels with their confidence, and CutMix, which pastes images and pseudo-labels alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pseudo:
    """Pseudo-labels of a batch of images, without gradient.

    Args:
        logits: (B, K, H, W).
        label: (B, H, W) int64, the most probable class.
        confidence: (B, H, W), the probability of that class.
    """

    logits: Tensor
    label: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Pseudo:
        """The pseudo-labels of logits (B, K, H, W)."""
        logits = logits.detach()
        best, label = logits.max(1)
        return cls(logits, label, (logits - best.unsqueeze(1)).exp_().sum(1).reciprocal())  # softmax of the maximum

    @classmethod
    def cat(cls, parts: list[Pseudo]) -> Pseudo:
        """Concatenate along the batch."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "label", "confidence")))

    def cutmix(self, box: Tensor, partner: Pseudo | None = None) -> Pseudo:
        """Apply `cutmix` to logits, labels and confidences alike.

        Args:
            box: (B, H, W) bool, True where the partner image is pasted.
            partner: pseudo-labels to paste from, of the same batch of images; default: these.
        """
        partner = self if partner is None else partner
        return Pseudo(
            cutmix(self.logits, box, partner.logits),
            cutmix(self.label, box, partner.label),
            cutmix(self.confidence, box, partner.confidence),
        )


def confident(label: Tensor, confidence: Tensor, threshold: float | Tensor | None) -> Tensor | None:
    """The pixels whose pseudo-labels are used; NaN is never confident.

    Args:
        label: (B, H, W) int64.
        confidence: (B, H, W).
        threshold: minimum confidence, one for all classes or (K,) one per class.

    Returns:
        (B, H, W) bool; None, for all pixels, if the threshold is None.
    """
    minimum = threshold[label] if isinstance(threshold, Tensor) else threshold
    return None if minimum is None else confidence >= minimum


def cutmix(x: Tensor, box: Tensor, partner: Tensor | None = None) -> Tensor:
    """Replace the box by the same region of another image of the batch, `partner.roll(1, 0)`.

    A batch of one image is returned unchanged: there is no other image to paste from.

    Args:
        x: (B, ..., H, W).
        box: (B, H, W) bool, True where the other image is pasted.
        partner: tensor to paste from, shaped like x; default: x.
    """
    return paste(x, box, (x if partner is None else partner).roll(1, 0)) if len(x) > 1 else x


def paste(x: Tensor, box: Tensor, other: Tensor) -> Tensor:
    """x (B, ..., H, W) with the box (B, H, W) taken from other, which has the same shape."""
    return torch.where(box if x.dim() == box.dim() else box.unsqueeze(1), other, x)
