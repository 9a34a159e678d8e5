"""A window of a resized image, from that part of the image alone which it shows.

size (width, height) is what the whole image would be resized to; offset (left, top) and extent (width, height) are the
window in that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

Pair = tuple[int, int]

# Elsewhere torch's resize of uint8 takes three times as long as Pillow's, here a fifth
FAST_TORCH = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def bilinear_window(image: np.ndarray, size: Pair, offset: Pair, extent: Pair) -> np.ndarray:
    """(H, W, 3) uint8 -> (height, width, 3): within 2 grey levels of cutting Pillow's resized image, antialiased."""
    return (window_by_torch if FAST_TORCH else window_by_pillow)(image, size, offset, extent)


def nearest_window(mask: np.ndarray, size: Pair, offset: Pair, extent: Pair) -> np.ndarray:
    """(H, W) uint8 -> (height, width): what cutting Pillow's resized mask gives, ties and all."""
    (left, top), (width, height) = offset, extent
    columns, rows = source_pixels(size[0], mask.shape[1]), source_pixels(size[1], mask.shape[0])
    return mask.take(rows[top : top + height], 0).take(columns[left : left + width], 1)


def source_pixels(scaled: int, length: int) -> np.ndarray:
    """The nearest source pixel of each pixel of a side: (scaled,) integers. Pillow adds the steps up in double."""
    steps = np.full(scaled, length / scaled)
    steps[0] /= 2
    return np.add.accumulate(steps).astype(np.intp)


def window_by_pillow(image: np.ndarray, size: Pair, offset: Pair, extent: Pair) -> np.ndarray:
    """A resize with a box, whose corners Pillow rounds to float32: they are given from a whole pixel near them."""
    parts, starts, ends = [], [], []
    for start, count, scaled, length in zip(offset, extent, size, image.shape[1::-1], strict=True):
        support = max(length / scaled, 1.0)  # source pixels that the filter reaches beyond the box
        begin, end = start * length / scaled, (start + count) * length / scaled
        first = max(0, math.floor(begin - support))
        parts.append(slice(first, math.ceil(end + support)))
        starts.append(begin - first)
        ends.append(end - first)
    picture = Image.fromarray(image[parts[1], parts[0]])
    return np.asarray(picture.resize(extent, Image.Resampling.BILINEAR, (*starts, *ends)))


def window_by_torch(image: np.ndarray, size: Pair, offset: Pair, extent: Pair) -> np.ndarray:
    """torch knows no box: a little more is resized, and cut."""
    across, down = (span(*side) for side in zip(offset, extent, size, image.shape[1::-1], strict=True))
    source = np.array(image[down.first : down.last, across.first : across.last])
    scaled = F.interpolate(
        torch.from_numpy(source)[None].permute(0, 3, 1, 2),  # channels last is the layout that is fast
        scale_factor=(down.factor, across.factor),
        mode="bilinear",
        antialias=True,
        recompute_scale_factor=False,
    )
    window = scaled[0].permute(1, 2, 0).numpy()[down.skip :, across.skip :]
    return window[: extent[1], : extent[0]]


@dataclass(frozen=True)
class Span:
    """How one side of a window is made: resize the source pixels first..last by factor, leave out the first `skip`."""

    first: int
    last: int
    factor: float
    skip: int


def span(offset: int, extent: int, scaled: int, length: int) -> Span:
    """The Span of `extent` pixels from `offset` on, of a side of `length` pixels that is resized to `scaled`.

    A resize puts the edge of its first pixel on the edge of the source's first pixel. So it begins where an edge of the
    resized image falls on one of the source, within 1/512 of a pixel (0 always does), and far enough before the offset
    for the filter, which reaches `support` source pixels to both sides.
    """
    step = length / scaled
    support = max(step, 1.0)
    edges = np.arange(max(offset - math.ceil(support / step), 0), -1, -1)
    distance = np.abs(edges * step - np.rint(edges * step))
    start = int(edges[np.argmax(distance <= 1 / 512)])
    first, last = round(start * step), min(length, math.ceil((offset + extent) * step + support) + 1)
    factor = scaled / length
    if last == length or int((last - first) * factor) == last - first:  # torch copies what does not change its size
        last = length
        factor = (scaled - start + 1e-6) / (length - first)  # to the last pixel, which rounding must not cost
    return Span(first, last, factor, offset - start)
