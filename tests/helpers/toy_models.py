"""Models that are small enough to know what inference has to give."""

from types import SimpleNamespace

import torch
from torch import nn

from allspark.evaluation.sliding_window import Inference


class Pointwise(nn.Module):
    """A 1x1 convolution: windows, flips and batches must not change its output."""

    def __init__(self, num_classes=5):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, num_classes, 1)
        self.sizes = []

    def forward(self, image):
        assert not self.training and not torch.is_grad_enabled()
        self.sizes.append(tuple(image.shape))
        return SimpleNamespace(logits=self.conv(image))


class Blurred(Pointwise):
    """A 7x7 convolution with batch norm and dropout: context and mode matter."""

    def __init__(self, num_classes=5):
        super().__init__(num_classes)
        self.conv = nn.Sequential(
            nn.Conv2d(3, 8, 7, padding=3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, num_classes, 1)
        )


def image(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sliding(window, **options):
    return Inference("sliding_window", window, **options)
