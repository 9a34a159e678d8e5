"""The DPT decoder (arXiv 2103.13413) in the sizes of UniMatch V2 and Depth Anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from allspark.models.resize import resize

# Width of the ViT -> width of the decoder, widths of its four levels (UniMatch V2's large and giant)
SIZES = {1024: (256, (256, 512, 1024, 1024)), 1536: (384, (1536, 1536, 1536, 1536))}


def dpt_sizes(width: int) -> tuple[int, tuple[int, ...]]:
    """Default width of the decoder and widths of its four levels for a ViT of this width."""
    return SIZES.get(width, (max(width // 6, 1), (width // 8, width // 4, width // 2, width)))  # small, base and others


def conv3x3(in_channels: int, channels: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=bias)


class ResidualUnit(nn.Module):
    """(B, C, h, w) -> (B, C, h, w): two times ReLU and a 3x3 convolution, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3x3(channels, channels), conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Adds a level to the map of the deeper levels and resizes the sum to the next finer level.

    Args:
        channels: C.
        deepest: whether this is the deepest level, which is not added to anything.
    """

    def __init__(self, channels: int, deepest: bool) -> None:
        super().__init__()
        self.skip = None if deepest else ResidualUnit(channels)
        self.refine = ResidualUnit(channels)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, level: Tensor, deeper: Tensor | None, size: Sequence[int]) -> Tensor:
        """level, deeper (B, C, h, w) -> (B, C, *size)."""
        if deeper is not None:
            level = deeper + self.skip(level)
        # Released: resized before the 1x1 convolution, which is the same at four times the cost
        return resize(self.out(self.refine(level)), size, align_corners=True)


class DPT(nn.Module):
    """Four layers of a plain ViT, maps (B, C, h, w), shallowest first -> logits (B, K, 8 h, 8 w).

    Args:
        in_channels: C of each layer.
        num_classes: K.
        channels: width of the decoder.
        dropout: before the classifier.
        strides: of the maps, all equal.
    """

    align_corners = True
    takes_tokens = True
    example = "dinov2_small"

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int,
        dropout: float = 0.0,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        widths = dpt_sizes(in_channels[0])[1]
        self.projects = nn.ModuleList(nn.Conv2d(*pair, 1) for pair in zip(in_channels, widths, strict=True))
        self.resizes = nn.ModuleList(  # to 4, 2, 1 and 1/2 times the size
            [
                nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
                nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
                nn.Identity(),
                conv3x3(widths[3], widths[3], stride=2),
            ]
        )
        self.levels = nn.ModuleList(conv3x3(width, channels, bias=False) for width in widths)
        self.fusions = nn.ModuleList(Fusion(channels, deepest=level == 3) for level in range(4))
        self.fuse = nn.Sequential(conv3x3(channels, channels), nn.ReLU())
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    @staticmethod
    def unsupported(strides: Sequence[int]) -> str | None:
        """Why maps of these strides cannot be decoded; None if they can."""
        return None if len(set(strides)) == 1 else "needs four layers of a plain ViT"

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        modules = zip(self.projects, self.resizes, self.levels, strict=True)
        levels = [conv(scale(project(x))) for x, (project, scale, conv) in zip(features, modules, strict=True)]
        height, width = levels[0].shape[-2:]
        sizes = [(2 * height, 2 * width), *(level.shape[-2:] for level in levels[:-1])]  # after each fusion
        fused = None
        for fusion, level, size in zip(reversed(self.fusions), reversed(levels), reversed(sizes), strict=True):
            fused = fusion(level, fused, size)
        return self.classifier(self.dropout(self.fuse(fused)))
