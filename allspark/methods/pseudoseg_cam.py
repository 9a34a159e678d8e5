"""The heads of PseudoSeg: an image classifier, and self-attention that refines its Grad-CAM."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allspark.models.resize import pad_to_multiple, resize, resize_to_image


def present_classes(mask: Tensor, num_classes: int, background: int | None) -> Tensor:
    """Which classes occur in each mask.

    Args:
        mask: (B, H, W) int64.
        num_classes: K; larger values in the mask are ignored.
        background: class to leave out; None: no class.

    Returns:
        (B, K) or (B, K - 1) float, 1 for each class that occurs.
    """
    occurs = torch.zeros(len(mask), 256, device=mask.device).scatter_(1, mask.flatten(1), 1.0)[:, :num_classes]
    return occurs if background is None else torch.cat((occurs[:, :background], occurs[:, background + 1 :]), 1)


class ImageClassifier(nn.Module):
    """Global average pooling and a linear layer: feature map (B, C, h, w) -> multi-label logits (B, L)."""

    def __init__(self, channels: int, num_labels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, num_labels)

    def forward(self, feature: Tensor) -> Tensor:
        return self.linear(feature.mean((2, 3)))

    @torch.no_grad()
    def grad_cam(self, feature: Tensor, present: Tensor) -> Tensor:
        """Grad-CAM of the classes that occur, each in 0..1.

        ReLU of the feature weighted by the spatial mean of d logit / d feature, divided by its maximum. After global
        pooling and a linear layer that gradient is weight / (h w) everywhere, and the maximum cancels the h w.

        Args:
            feature: (B, C, h, w).
            present: (B, L), 0 or 1.

        Returns:
            (B, L, h, w), without gradient.
        """
        cam = F.conv2d(feature, self.linear.weight[..., None, None]).relu() * present[..., None, None]
        return cam / cam.amax((2, 3), keepdim=True).clamp(min=torch.finfo(cam.dtype).tiny)


DIM = 128  # channels of queries and keys


class SelfAttentionCAM(nn.Module):
    """SGC: class activation maps spread to similar places, as logits of all classes (PseudoSeg, section 3.2).

    Args:
        channels: widths of the last two feature maps, which form the hypercolumn for queries and keys.
        num_classes: K.
        background: whether one of the classes has no activation map; its score is what the others leave.
        multiple: the encoder pads the sides of images to multiples of this (TimmEncoder).
        align_corners: as the decoder resizes, so that both logits lie on the image alike.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        background: bool,
        *,
        multiple: int = 1,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.q, self.k = (nn.Conv2d(sum(channels), DIM, 1, bias=False) for _ in range(2))
        self.classifier = nn.Conv2d(num_classes, num_classes, 1, bias=False)
        self.norm = nn.BatchNorm2d(num_classes)
        self.background = background
        self.multiple, self.align_corners = multiple, align_corners

    def forward(self, features: Sequence[Tensor], cam: Tensor, valid: Tensor) -> Tensor:
        """Refine activation maps.

        Args:
            features: the last two feature maps (B, C_i, h_i, w_i); they get no gradient.
            cam: (B, L, h, w), activation maps.
            valid: (B, H, W) bool. Cells without a valid pixel are not attended to, unless an image has no other.

        Returns:
            Logits (B, K, H, W).
        """
        size = cam.shape[-2:]
        column = torch.cat([resize(feature, size) for feature in features], 1).detach()
        q, k = self.q(column).flatten(2), self.k(column).flatten(2)  # (B, dim, N), N = h * w
        similarity = q.transpose(1, 2) @ k / math.sqrt(q.shape[1])  # (B, N, N)
        padded = pad_to_multiple(valid[:, None].float(), self.multiple)
        visible = F.adaptive_max_pool2d(padded, size).flatten(2) > 0  # (B, 1, N)
        # The smallest number instead of -inf: without a visible cell all have the same weight instead of NaN
        weights = similarity.masked_fill(~visible, torch.finfo(similarity.dtype).min).softmax(-1)
        scores = (cam.flatten(2) @ weights.transpose(1, 2)).unflatten(2, size) + cam  # in 0..2
        if self.background:
            scores = torch.cat((2 - scores.amax(1, keepdim=True), scores), 1)
        logits = self.norm(self.classifier(scores))
        return resize_to_image(logits, valid.shape[-2:], self.multiple, self.align_corners)
