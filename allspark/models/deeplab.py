"""The decoder of DeepLabV3+ (arXiv 1802.02611): atrous spatial pyramid pooling, refined with the finest map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allspark.models.resize import resize

LOW_CHANNELS = 48  # of the finest map, "low-level features" (section 4.1)
RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # stride of the deepest map -> dilations (arXiv 1706.05587, section 3.3)


def conv(in_channels: int, channels: int, kernel: int = 1, rate: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU; the map keeps its size."""
    padding = rate * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, padding=padding, dilation=rate, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


class PooledBatchNorm(nn.BatchNorm2d):
    """Batch norm of one value per image and channel.

    A single image has no variance: the running statistics are used then, and not updated. SyncBatchNorm, which sees the
    images of all processes, replaces this class.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class ASPP(nn.Module):
    """(B, C_in, h, w) -> (B, C, h, w): 1x1, three dilated 3x3 and image pooling in parallel, projected by a 1x1."""

    def __init__(self, in_channels: int, channels: int, rates: Sequence[int]) -> None:
        super().__init__()
        dilated = (conv(in_channels, channels, kernel=3, rate=rate) for rate in rates)
        self.branches = nn.ModuleList([conv(in_channels, channels), *dilated])
        self.pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(in_channels, channels, 1, bias=False),
            PooledBatchNorm(channels),
            nn.ReLU(inplace=True),
        )
        self.project = conv((len(self.branches) + 1) * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        maps = [branch(x) for branch in self.branches]
        return self.project(torch.cat((*maps, self.pool(x).expand_as(maps[0])), 1))


class DeepLabV3Plus(nn.Module):
    """Maps (B, C_i, H_i, W_i), finest first -> logits (B, K, H_1, W_1); uses the finest and the deepest map.

    Args:
        in_channels: C_i, widths of the maps.
        num_classes: K.
        channels: width of the decoder.
        dropout: before the classifier.
        strides: of the maps; the deepest one sets the dilations.
    """

    align_corners = True  # as released by UniMatch and iMAS, inside the decoder and for its logits
    takes_tokens = False
    example = "resnet101"

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int,
        dropout: float = 0.0,
        strides: Sequence[int] = (4, 8, 16, 16),
    ) -> None:
        super().__init__()
        self.aspp = ASPP(in_channels[-1], channels, RATES[strides[-1]])
        self.low = conv(in_channels[0], LOW_CHANNELS)
        self.fuse = nn.Sequential(conv(LOW_CHANNELS + channels, channels, 3), conv(channels, channels, 3))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    @staticmethod
    def unsupported(strides: Sequence[int]) -> str | None:
        """Why maps of these strides cannot be decoded; None if they can."""
        if strides[0] == 4 and strides[-1] in RATES:
            return None
        return "needs a finest map of stride 4 and a deepest map of stride 8 or 16, for which dilations are published"

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        low = self.low(features[0])
        deep = resize(self.aspp(features[-1]), low.shape[-2:], self.align_corners)
        return self.classifier(self.dropout(self.fuse(torch.cat((low, deep), 1))))
