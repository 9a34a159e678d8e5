"""The all-MLP decoder of SegFormer (arXiv 2105.15203, section 3.2), and mmsegmentation's variant."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allspark.models.resize import resize


def conv_bn_relu(in_channels: int, channels: int) -> nn.Module:
    """mmcv's ConvModule with a 1x1 convolution.

    The logger that mmengine makes for it looks up visible GPU number LOCAL_RANK, and fails where each process sees only
    one GPU.
    """
    from mmcv.cnn import ConvModule  # takes as long to import as torch

    local_rank = os.environ.pop("LOCAL_RANK", None)
    try:
        return ConvModule(in_channels, channels, 1, norm_cfg={"type": "BN"})
    finally:
        if local_rank is not None:
            os.environ["LOCAL_RANK"] = local_rank


class MLPDecoder(nn.Module):
    """Four maps (B, C_i, H_i, W_i), finest first -> logits (B, K, H_1, W_1).

    A linear layer per level; resize to the finest level, concatenate from deepest to finest, 1x1 fuse convolution with
    batch norm and ReLU, dropout, 1x1 classifier.

    Args:
        in_channels: C_i, widths of the maps.
        num_classes: K.
        channels: width of the decoder.
        dropout: before the classifier.
        strides: of the maps; this decoder accepts any.
    """

    align_corners = False
    takes_tokens = False
    example = "mit_b5"

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int,
        dropout: float = 0.1,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.add_levels(in_channels, channels)
        self.fuse = conv_bn_relu(len(in_channels) * channels, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    @staticmethod
    def unsupported(strides: Sequence[int]) -> str | None:
        return None

    def add_levels(self, in_channels: Sequence[int], channels: int) -> None:
        self.linears = nn.ModuleList(nn.Linear(size, channels) for size in in_channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        fused = self.fuse.activate(self.fuse.norm(self.fused_sum(features)))
        return self.classifier(self.dropout(fused))

    def fused_sum(self, features: Sequence[Tensor]) -> Tensor:
        """fuse.conv(concat_i(up(W_i c_i + b_i))), computed as sum_i up((F_i W_i) c_i + F_i b_i).

        A 1x1 convolution commutes with bilinear resizing, so each level is fused at its own resolution: the same
        result up to rounding, at a fraction of the cost. F_i: the columns of the fuse weight for level i.
        """
        columns = self.fuse.conv.weight.flatten(1).chunk(len(features), 1)[::-1]  # concatenated deepest first
        with torch.autocast(features[0].device.type, enabled=False):  # bf16 is too coarse for a product of weights
            weights = [part @ linear.weight for linear, part in zip(self.linears, columns, strict=True)]
            bias = sum(part @ linear.bias for linear, part in zip(self.linears, columns, strict=True))
        kernels = [weight[..., None, None] for weight in weights]
        return resized_sum(features, kernels, bias)


def resized_sum(features: Sequence[Tensor], kernels: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """sum_i up(kernel_i * feature_i) + bias at the size of the first feature map, summed in place."""
    total = F.conv2d(features[0], kernels[0], bias)
    for feature, kernel in zip(features[1:], kernels[1:], strict=True):
        total += resize(F.conv2d(feature, kernel), total.shape[-2:])
    return total


class MLPBNDecoder(MLPDecoder):
    """mmsegmentation's SegformerHead: batch norm and ReLU in each level, and the finest level is concatenated first."""

    def add_levels(self, in_channels: Sequence[int], channels: int) -> None:
        self.convs = nn.ModuleList(conv_bn_relu(size, channels) for size in in_channels)

    def fused_sum(self, features: Sequence[Tensor]) -> Tensor:
        """fuse.conv(concat_i(up(level_i))), computed as sum_i up(F_i level_i)."""
        columns = self.fuse.conv.weight.chunk(len(features), 1)
        return resized_sum([conv(feature) for feature, conv in zip(features, self.convs, strict=True)], columns)
