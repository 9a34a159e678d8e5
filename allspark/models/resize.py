"""Resizing of feature maps and logits, and padding to a multiple of the encoder's stride."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from allspark.config import MIN_SIDE
from allspark.utils.errors import UserError


def resize(x: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Bilinear resizing of x (B, C, h, w) to (B, C, *size); x itself if it has that size."""
    size = tuple(size)
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def resize_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Bilinear resizing of image (B, C, H, W) so that each side is the nearest multiple of `multiple`."""
    return resize(image, [nearest_multiple(side, multiple) for side in image.shape[-2:]], align_corners=True)


def nearest_multiple(side: int, multiple: int) -> int:
    """The multiple nearest to `side`, at least `multiple`; ties round up."""
    return max((2 * side + multiple) // (2 * multiple), 1) * multiple


def scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    """Height and width at `scale`, at least MIN_SIDE; unchanged at scale 1."""
    if scale == 1:
        return size[0], size[1]
    height, width = (max(MIN_SIDE, round(side * scale)) for side in size)
    return height, width


def check_scales(scales: Sequence[float], name: str) -> None:
    """UserError unless there are scales, all above 0 and at most 16."""
    if not scales or not all(0 < scale <= 16 for scale in scales):
        raise UserError(f"{name}={list(scales)}: give one or more factors above 0 and at most 16")


def pad_to_multiple(maps: Tensor, multiple: int, mode: str = "constant") -> Tensor:
    """Pad maps (B, C, H, W) at the bottom and on the right until both sides are multiples of `multiple`."""
    rows, columns = (-side % multiple for side in maps.shape[-2:])
    return F.pad(maps, (0, columns, 0, rows), mode) if rows or columns else maps


def resize_to_image(logits: Tensor, size: Sequence[int], multiple: int, align_corners: bool = False) -> Tensor:
    """Resize the logits of a padded image to its padded size and cut off the padding: (B, K, h, w) -> (B, K, *size).

    Args:
        logits: (B, K, h, w), which cover the image padded by `pad_to_multiple`.
        size: height and width of the image itself.
        multiple: as in `pad_to_multiple`; 1: the image was not padded.
        align_corners: as the decoder resizes its maps.
    """
    padded = [side + -side % multiple for side in size]
    return resize(logits, padded, align_corners)[..., : size[0], : size[1]]
