"""Perturbations of the features on their way to the decoder: whole channels are dropped. Each is a model's `perturb`.

Features are four maps (B, C_i, h_i, w_i), finest first. Draws come from torch's generator on their device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from allspark.utils.errors import UserError


@dataclass(frozen=True)
class FeatureDropout:
    """UniMatch: channel dropout on the finest and the deepest map, the inputs of its decoder; others stay as they are.

    rate: probability of a channel to be 0 in one image; the channels that stay are divided by 1 - rate.
    """

    rate: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise UserError(f"method.feature_dropout={self.rate} is a rate and must be at least 0 and below 1")

    def __call__(self, features: Sequence[Tensor]) -> list[Tensor]:
        finest, *others, deepest = features
        return [F.dropout2d(finest, self.rate), *others, F.dropout2d(deepest, self.rate)]


@dataclass(frozen=True)
class ComplementaryDropout:
    """UniMatch V2: of an image one view keeps a random half of the channels, the other view the other half.

    m1 ~ 2 * Bernoulli(0.5) per image and channel, m2 = 2 - m1. Released (dpt.py:149-165): four maps of a plain
    transformer, equally wide, share one mask; here each map of the pyramid has its own.
    share: of the images that are perturbed, rounded up; the others, drawn at random, have masks of ones in both views
    and all maps.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UserError(f"method.feature_dropout={self.share} is a share of the images and must be in 0..1")

    def __call__(self, features: Sequence[Tensor], num_labeled: int = 0) -> list[Tensor]:
        """Maps of num_labeled labeled images, which are left alone, then of views 1 and 2 of the same B images."""
        batch = (len(features[0]) - num_labeled) // 2
        perturbed = torch.randperm(batch, device=features[0].device) < math.ceil(batch * self.share)
        result = []
        for feature in features:
            mask = 2 * feature.new_empty(batch, feature.shape[1]).bernoulli_(0.5)
            mask = torch.where(perturbed[:, None], mask, 1)
            labeled = mask.new_ones(num_labeled, feature.shape[1])
            result.append(feature * torch.cat((labeled, mask, 2 - mask))[..., None, None])
        return result
