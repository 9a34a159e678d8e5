"""Encoders for images with other than three channels, such as gray ones or RGB with near infrared."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def adapt_filters(weight: Tensor, channels: int) -> Tensor:
    """Filters (C_out, 3, kh, kw) of RGB images -> (C_out, channels, kh, kw).

    One or two channels: each gets the mean of the RGB filters, scaled so that an image with equal channels gives the
    same output. More: the first three are RGB and keep their filters, further channels get the mean of them.
    """
    mean = weight.mean(1, keepdim=True)
    if channels < 3:
        return (mean * (3 / channels)).expand(-1, channels, -1, -1).clone()
    return torch.cat([weight, mean.expand(-1, channels - 3, -1, -1)], 1)


def set_input_channels(encoder: nn.Module, channels: int) -> None:
    """Replace the first convolution of an encoder by one for `channels` input channels, see adapt_filters."""
    if channels == 3:
        return
    first = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    first.weight = nn.Parameter(adapt_filters(first.weight.detach(), channels))
    first.in_channels = channels
    for buffer in ("scale", "shift"):  # TimmEncoder's change of normalization, (3, 1, 1)
        if hasattr(encoder, buffer):
            value = getattr(encoder, buffer)
            rest = value.mean().expand(max(channels - 3, 0), 1, 1)
            setattr(encoder, buffer, torch.cat([value, rest]) if channels > 3 else value.mean().repeat(channels, 1, 1))
    if hasattr(encoder, "check_maps"):  # some of timm's networks read the image by several convolutions
        encoder.check_maps(channels)
