"""Resize and crop in one step: only the source pixels that the crop shows are read.

In all functions `size` (width, height) is that of the whole resized image, `offset` (left, top) and `extent`
(width, height) are the crop in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

Pair = tuple[int, int]

# With these instructions torch's resize of uint8 takes a fifth of Pillow's time, elsewhere three times as long
FAST_TORCH = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def resize_crop_bilinear(image: np.ndarray, size: Pair, offset: Pair, extent: Pair) -> np.ndarray:
    """(H, W, C) uint8 -> (height, width, C), antialiased; within 2 gray levels of a crop of Pillow's resized image."""
    return (resize_crop_torch if FAST_TORCH else resize_crop_pillow)(image, size, offset, extent)


def resize_crop_nearest(mask: np.ndarray, size: Pair, offset: Pair, extent: Pair) -> np.ndarray:
    """(H, W) uint8 -> (height, width); identical to a crop of Pillow's resized mask."""
    (left, top), (width, height) = offset, extent
    columns, rows = source_pixels(size[0], mask.shape[1]), source_pixels(size[1], mask.shape[0])
    return mask.take(rows[top : top + height], 0).take(columns[left : left + width], 1)


def source_pixels(scaled: int, length: int) -> np.ndarray:
    """(scaled,) index of the nearest source pixel; the steps are summed in double precision, as in Pillow."""
    steps = np.full(scaled, length / scaled)
    steps[0] /= 2
    return np.add.accumulate(steps).astype(np.intp)


def resize_crop_pillow(image: np.ndarray, size: Pair, offset: Pair, extent: Pair) -> np.ndarray:
    """With Pillow's `box`. Pillow rounds its corners to float32, so they are given relative to a nearby whole pixel."""
    parts, starts, ends = [], [], []
    for start, count, scaled, length in zip(offset, extent, size, image.shape[1::-1], strict=True):
        support = max(length / scaled, 1.0)  # source pixels that the filter reads beyond the box
        begin, end = start * length / scaled, (start + count) * length / scaled
        first = max(0, math.floor(begin - support))
        parts.append(slice(first, math.ceil(end + support)))
        starts.append(begin - first)
        ends.append(end - first)
    source = image[parts[1], parts[0]]
    box, resample = (*starts, *ends), Image.Resampling.BILINEAR
    if source.shape[2] == 3:
        return np.asarray(Image.fromarray(source).resize(extent, resample, box))
    planes = [Image.fromarray(source[..., index]) for index in range(source.shape[2])]
    return np.stack([np.asarray(plane.resize(extent, resample, box)) for plane in planes], 2)


def resize_crop_torch(image: np.ndarray, size: Pair, offset: Pair, extent: Pair) -> np.ndarray:
    """torch has no `box`: resize a little more than the crop, then cut."""
    across, down = (plan_side(*side) for side in zip(offset, extent, size, image.shape[1::-1], strict=True))
    source = np.array(image[down.first : down.last, across.first : across.last], order="C")
    scaled = F.interpolate(
        torch.from_numpy(source)[None].permute(0, 3, 1, 2),  # (1, C, h, w) in channels-last memory, the fast layout
        scale_factor=(down.factor, across.factor),
        mode="bilinear",
        antialias=True,
        recompute_scale_factor=False,
    )
    crop = scaled[0].permute(1, 2, 0).numpy()[down.skip :, across.skip :]
    return crop[: extent[1], : extent[0]]


@dataclass(frozen=True)
class Side:
    """How to produce one side of a crop: resize source pixels first..last by `factor`, then drop the first `skip`."""

    first: int
    last: int
    factor: float
    skip: int


def plan_side(offset: int, extent: int, scaled: int, length: int) -> Side:
    """Plan the crop of `extent` pixels from `offset` on, of a side of `length` pixels that is resized to `scaled`.

    A resize aligns the outer edges of source and result. So the part must start where a pixel edge of the resized image
    coincides with one of the source, up to 1/512 of a pixel (always true at 0), and so far before the offset that the
    filter, which reads `support` source pixels on both sides, has all its input.
    """
    step = length / scaled
    support = max(step, 1.0)
    edges = np.arange(max(offset - math.ceil(support / step), 0), -1, -1)
    distance = np.abs(edges * step - np.rint(edges * step))
    start = int(edges[np.argmax(distance <= 1 / 512)])
    first, last = round(start * step), min(length, math.ceil((offset + extent) * step + support) + 1)
    factor = scaled / length
    if last == length or int((last - first) * factor) == last - first:  # torch copies if the size does not change
        last = length
        factor = (scaled - start + 1e-6) / (length - first)  # rounding must not lose the last pixel
    return Side(first, last, factor, offset - start)
