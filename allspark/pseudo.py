"""Pseudo-labels: made from a model without touching it, thresholded, and pasted by CutMix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Pseudo:
    """logits (B, K, H, W), detached; label (B, H, W) int64, the likeliest class; confidence (B, H, W), its prob."""

    logits: Tensor
    label: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Pseudo:
        logits = logits.detach()
        best, label = logits.max(1)
        return cls(logits, label, (best - logits.logsumexp(1)).exp())

    def cutmix(self, box: Tensor, partner: Pseudo | None = None) -> Pseudo:
        """Paste from the partner image (default: the next in this batch) where box (B, H, W) is True."""
        partner = self if partner is None else partner
        return Pseudo(
            cutmix(self.logits, box, partner.logits),
            cutmix(self.label, box, partner.label),
            cutmix(self.confidence, box, partner.confidence),
        )


def cutmix(x: Tensor, box: Tensor, partner: Tensor | None = None) -> Tensor:
    """x (B, ..., H, W) with the box (B, H, W) taken from another image of the batch, `roll(1, 0)`: never from itself.

    A batch of one has no other image: nothing changes then.
    """
    other = (x if partner is None else partner).roll(1, 0)
    box = box if x.dim() == box.dim() else box.unsqueeze(1)
    return torch.where(box, other, x) if len(x) > 1 else x


@torch.no_grad()
def predict_pseudo(model: nn.Module, image: Tensor, share_keys: bool = False) -> Pseudo:
    """Pseudo-labels of the weak view in evaluation mode: no gradient, no buffer changes, the mode is restored.

    share_keys: batch mates share the keys of the bottleneck (Released).
    """
    network = getattr(model, "module", model)  # not through DDP: nothing to synchronize
    training = network.training
    network.eval()
    try:
        return Pseudo.of(network(image, share_keys=share_keys).logits)
    finally:
        network.train(training)
