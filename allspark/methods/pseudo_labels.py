"""Pseudo-labels: made from a model without touching it, averaged and fused, thresholded, and pasted by CutMix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_SIDE = 32  # of an image, in pixels: what a Segmentor takes


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
        return cls(logits, label, (logits - best.unsqueeze(1)).exp_().sum(1).reciprocal())  # softmax of the best

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
    return paste(x, box, (x if partner is None else partner).roll(1, 0)) if len(x) > 1 else x


def paste(x: Tensor, box: Tensor, other: Tensor) -> Tensor:
    """x (B, ..., H, W) with the box (B, H, W) taken from other, of the same shape."""
    return torch.where(box if x.dim() == box.dim() else box.unsqueeze(1), other, x)


@contextmanager
def labeling(model: nn.Module) -> Iterator[nn.Module]:
    """The network in evaluation mode and without gradients: a pass changes no buffer.

    Afterwards every module has the training flag that it came with.
    """
    network = getattr(model, "module", model)  # not through DDP: nothing to synchronize
    flags = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield network
    finally:
        for module, training in flags:
            module.training = training
        # Autocast of older torch (2.8, say) would give the weights that it cast in here, which have no gradient, to the
        # passes that follow: they would never be trained
        torch.clear_autocast_cache()


def predict_pseudo(model: nn.Module, image: Tensor, share_keys: bool = False) -> Pseudo:
    """Pseudo-labels of the weak view in evaluation mode.

    share_keys: batch mates share the keys of the bottleneck (Released).
    """
    with labeling(model) as network:
        return Pseudo.of(network(image, share_keys=share_keys).logits)


def predict_multi_scale(model: nn.Module, image: Tensor, scales: tuple[float, ...]) -> Pseudo:
    """Pseudo-labels from the mean of the probabilities at several scales of the image; no side goes below MIN_SIDE.

    Its logits are logarithms of the mean, so that their softmax is the mean.
    """
    total, size = 0.0, image.shape[-2:]
    for scale in scales:
        scaled = [max(MIN_SIDE, round(side * scale)) for side in size]
        prob = predict_pseudo(model, resize(image, scaled)).logits.softmax(1)
        total = total + resize(prob, size)
    prob = total / len(scales)
    return Pseudo.of(prob.clamp(min=torch.finfo(prob.dtype).tiny).log())


def resize(x: Tensor, size: list[int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def fuse(logits: Tensor, sgc_logits: Tensor, gamma: float, temperature: float) -> Tensor:
    """Calibrated fusion of two logit maps (B, K, H, W): divided by their common root mean square, softmax each, mean,
    sharpened. Released: one root mean square for the batch; here one for each image, so no image decides on another.
    """
    mean_square = torch.stack([x.square().mean((1, 2, 3)) for x in (logits, sgc_logits)]).mean(0)
    scale = (mean_square + 1e-8).rsqrt().view(-1, 1, 1, 1)
    prob = torch.lerp((sgc_logits * scale).softmax(1), (logits * scale).softmax(1), gamma)
    return (prob.log() / temperature).softmax(1)  # prob ** (1 / T) / sum
