"""The all-MLP decoder of SegFormer (arXiv 2105.15203, section 3.2), and the one that mmsegmentation made of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from mmcv.cnn import ConvModule
from torch import Tensor, nn


class MLPDecoder(nn.Module):
    """Four maps (B, C_i, H_i, W_i), finest first -> logits (B, K, H_1, W_1).

    Per level a linear layer to `channels`; resize to the finest level, concatenate from deepest to finest, 1x1 fuse
    convolution with batch norm and ReLU, dropout, 1x1 classifier.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.add_levels(in_channels, channels)
        self.fuse = ConvModule(len(in_channels) * channels, channels, 1, norm_cfg={"type": "BN"})
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def add_levels(self, in_channels: Sequence[int], channels: int) -> None:
        self.linears = nn.ModuleList(nn.Linear(size, channels) for size in in_channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        fused = self.fuse.activate(self.fuse.norm(self.fused_sum(features)))
        return self.classifier(self.dropout(fused))

    def fused_sum(self, features: Sequence[Tensor]) -> Tensor:
        """fuse.conv(concat_i(up(W_i c_i + b_i))), computed as sum_i up((F_i W_i) c_i + F_i b_i).

        A 1x1 convolution commutes with bilinear resizing, so each level is fused at its own resolution: the same
        numbers up to the order of the sums, at a fraction of the work. F_i: the columns of the fuse weight for level i.
        """
        size = features[0].shape[-2:]
        columns = self.fuse.conv.weight.flatten(1).chunk(len(features), 1)[::-1]  # concatenated deepest first
        levels = []
        for feature, linear, part in zip(features, self.linears, columns, strict=True):
            level = F.conv2d(feature, (part @ linear.weight)[..., None, None], part @ linear.bias)
            levels.append(resize(level, size))
        return sum(levels)


class MLPBNDecoder(MLPDecoder):
    """mmsegmentation's SegformerHead: each level has batch norm and ReLU, and the finest is concatenated first."""

    def add_levels(self, in_channels: Sequence[int], channels: int) -> None:
        self.convs = nn.ModuleList(ConvModule(size, channels, 1, norm_cfg={"type": "BN"}) for size in in_channels)

    def fused_sum(self, features: Sequence[Tensor]) -> Tensor:
        """fuse.conv(concat_i(up(level_i))), computed as sum_i up(F_i level_i)."""
        size = features[0].shape[-2:]
        columns = self.fuse.conv.weight.chunk(len(features), 1)
        levels = zip(features, self.convs, columns, strict=True)
        return sum(resize(F.conv2d(conv(feature), part), size) for feature, conv, part in levels)


DECODERS = {"mlp": MLPDecoder, "mlp_bn": MLPBNDecoder}


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, align_corners=False; x itself if it has the size."""
    size = tuple(size)
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)
