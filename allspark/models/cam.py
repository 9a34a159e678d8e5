"""What PseudoSeg trains beside the decoder: an image classifier, and self-attention that refines its Grad-CAM."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allspark.models.mlp_decoder import cover, resize, uncover


def present_classes(mask: Tensor, num_classes: int, background: int | None) -> Tensor:
    """1 for each class, but the background, that occurs in the mask (B, H, W): (B, K) or (B, K - 1) float."""
    occurs = torch.zeros(len(mask), 256, device=mask.device).scatter_(1, mask.flatten(1), 1.0)[:, :num_classes]
    return occurs if background is None else torch.cat((occurs[:, :background], occurs[:, background + 1 :]), 1)


class ImageClassifier(nn.Module):
    """Which classes occur in an image: feature map (B, C, h, w) -> multi-label logits (B, L), by a global pool."""

    def __init__(self, channels: int, num_labels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, num_labels)

    def forward(self, feature: Tensor) -> Tensor:
        return self.linear(feature.mean((2, 3)))

    @torch.no_grad()
    def grad_cam(self, feature: Tensor, present: Tensor) -> Tensor:
        """Grad-CAM of the classes that occur (present (B, L), 0 or 1), each in 0..1: (B, L, h, w), detached.

        ReLU of the feature weighted by the spatial mean of d logit / d feature, divided by its maximum. Behind a global
        pool and a linear layer that gradient is weight / (h w) at every place, and the maximum takes the h w out.
        """
        cam = F.conv2d(feature, self.linear.weight[..., None, None]).relu() * present[..., None, None]
        return cam / cam.amax((2, 3), keepdim=True).clamp(min=torch.finfo(cam.dtype).tiny)


class SelfAttentionCAM(nn.Module):
    """SGC: class activation maps spread to places that look alike, as logits of all classes (PseudoSeg, section 3.2).

    channels: of the last two stages, whose maps make the hypercolumn that queries and keys are projected from.
    background: whether one of the classes has no map of its own; its score is what the others leave.
    multiple, resize: of the encoder and the decoder, whose logits and these have to lie on the image alike.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        background: bool,
        dim: int = 128,
        *,
        multiple: int = 1,
        resize: Callable[[Tensor, Sequence[int]], Tensor] = resize,
    ) -> None:
        super().__init__()
        self.q, self.k = (nn.Conv2d(sum(channels), dim, 1, bias=False) for _ in range(2))
        self.classifier = nn.Conv2d(num_classes, num_classes, 1, bias=False)
        self.norm = nn.BatchNorm2d(num_classes)
        self.background = background
        self.multiple, self.resize = multiple, resize

    def forward(self, features: Sequence[Tensor], cam: Tensor, valid: Tensor) -> Tensor:
        """Maps of the last two stages, cam (B, L, h, w) and valid (B, H, W) bool -> logits (B, K, H, W).

        Cells without a valid pixel are not attended to, except where an image has no other. The maps get no gradient.
        """
        size = cam.shape[-2:]
        column = torch.cat([resize(feature, size) for feature in features], 1).detach()
        q, k = self.q(column).flatten(2), self.k(column).flatten(2)  # (B, dim, N), N = h * w
        similarity = q.transpose(1, 2) @ k / math.sqrt(q.shape[1])  # (B, N, N)
        seen = F.adaptive_max_pool2d(cover(valid[:, None].float(), self.multiple), size).flatten(2) > 0  # (B, 1, N)
        # The lowest number and not -inf: where no cell is seen, all weigh the same instead of NaN
        weights = similarity.masked_fill(~seen, torch.finfo(similarity.dtype).min).softmax(-1)
        scores = (cam.flatten(2) @ weights.transpose(1, 2)).unflatten(2, size) + cam  # in 0..2
        if self.background:
            scores = torch.cat((2 - scores.amax(1, keepdim=True), scores), 1)
        return uncover(self.norm(self.classifier(scores)), valid.shape[-2:], self.multiple, self.resize)
