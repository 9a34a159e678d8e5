"""Parts of normalized images set to 0, which is the mean colour. Draws come from torch's generator on their device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CUTOUT = 50 / 513  # half the side of the square, as a share of the crop's. PseudoSeg: 50 px at 513


def hide_patches(image: Tensor, patch_size: int, masked: float) -> Tensor:
    """image (B, 3, H, W) with round(masked n) of its n = ceil(H / b) ceil(W / b) patches at 0, the mean colour.

    Which ones is drawn for each image, every choice alike: random patch sampling.
    """
    batch, _, height, width = image.shape
    rows, columns = math.ceil(height / patch_size), math.ceil(width / patch_size)
    rank = torch.rand(batch, rows * columns, device=image.device).argsort(1)  # a random permutation
    visible = (rank >= round(masked * rows * columns)).view(batch, 1, rows, columns)
    visible = visible.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)  # nearest, to whole patches
    return image * visible[..., :height, :width]


def cut_out(image: Tensor) -> tuple[Tensor, Tensor]:
    """One square of each image set to 0, and where it is (B, H, W). Any pixel is its centre, borders clip it."""
    sides = []
    for size in image.shape[-2:]:
        half = round(CUTOUT * size)
        offset = torch.arange(size, device=image.device) - torch.randint(size, (len(image), 1), device=image.device)
        sides.append((offset >= -half) & (offset < half))  # (B, size)
    hole = sides[0][:, :, None] & sides[1][:, None]
    return image.masked_fill(hole[:, None], 0.0), hole
