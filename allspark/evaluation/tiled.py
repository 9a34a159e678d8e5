"""Class scores of images too large to keep a score per class and pixel: windows from top to bottom, strip by strip.

Windows, their batches and the order of summation are those of sliding_window.predict_sliding, and so are the scores:
bit-identical without scales, with scales up to rounding in the resize. Memory holds a few strips of the window's height
for each view (scale, flip).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allspark.data.batch import normalize
from allspark.data.spec import IMAGENET, Statistics
from allspark.evaluation.sliding_window import Inference, resize_antialiased, window_batches
from allspark.models.resize import scaled_size

MAX_SCORES = 2 * 10**8  # scores of a batch in memory: 0.8 GB, and two to three times that while they are averaged
ROWS = 64  # per yielded strip

Size = tuple[int, int]  # height, width


def needs_tiling(shape: torch.Size, num_classes: int, inference: Inference) -> bool:
    """Whether images (B, C, H, W) exceed MAX_SCORES. Only sliding windows can be tiled."""
    batch, _, height, width = shape
    return inference.mode == "sliding_window" and batch * num_classes * height * width > MAX_SCORES


def tiled_scores(
    model: nn.Module, image: Tensor, device: torch.device, inference: Inference, statistics: Statistics = IMAGENET
) -> Iterator[tuple[slice, Tensor]]:
    """The result of class_scores from top to bottom.

    Args:
        model: in eval mode.
        image: (B, C, H, W) uint8 on any device; only windows are moved to `device`.
        statistics: for the normalization.

    Yields:
        Rows, and their probabilities (B, K, rows, W) on the device.
    """
    height, width = image.shape[-2:]
    views = [
        View(image, scaled_size((height, width), scale), flipped, device, statistics)
        for scale in inference.scales
        for flipped in ((False, True) if inference.flip else (False,))
    ]
    strips = [resize_strips(iter_strips(model, view, inference), view.size, (height, width)) for view in views]
    readers = [RowReader(each) for each in strips]
    for top in range(0, height, ROWS):
        rows = slice(top, min(top + ROWS, height))
        total = None
        for reader in readers:
            prob = reader.read(rows.start, rows.stop)
            total = prob if total is None else total + prob
        yield rows, total / len(readers)


@dataclass(frozen=True)
class View:
    """Images (B, C, H, W) uint8 resized to `size` and optionally flipped; windows are computed on demand."""

    image: Tensor
    size: Size
    flipped: bool
    device: torch.device
    statistics: Statistics

    def window(self, rows: slice, columns: slice) -> Tensor:
        """(B, 3, rows, columns), normalized, on the device."""
        if not self.flipped:
            return self.resized_window(rows, columns)
        width = self.size[1]
        return self.resized_window(rows, slice(width - columns.stop, width - columns.start)).flip(-1)

    def resized_window(self, rows: slice, columns: slice) -> Tensor:
        height, width = self.image.shape[-2:]
        if self.size == (height, width):
            return normalize(self.image[..., rows, columns].to(self.device), self.statistics)
        top, bottom, down = resize_weights(height, self.size[0], rows.start, rows.stop)
        left, right, across = resize_weights(width, self.size[1], columns.start, columns.stop)
        part = normalize(self.image[..., top:bottom, left:right].to(self.device), self.statistics)
        with torch.autocast(self.device.type, enabled=False):  # float32 like F.interpolate, whatever --precision says
            return down.to(self.device) @ part @ across.to(self.device).T


def iter_strips(model: nn.Module, view: View, inference: Inference) -> Iterator[Tensor]:
    """Probabilities of a view, flipped back, as strips (B, K, rows, w) from top to bottom."""
    batch = len(view.image)
    chunks = window_batches(view.size, inference, batch)
    max_rows = max(chunk[-1][0].stop - chunk[0][0].start for chunk in chunks)
    sums = None
    for chunk in chunks:
        top = chunk[0][0].start  # no later window covers rows above it
        if sums is not None and top > sums.top:
            yield unflip(sums.pop_rows(top), view)
        windows = torch.cat([view.window(rows, columns) for rows, columns in chunk])
        prob = model(windows).logits.softmax(1)
        sums = sums or WindowSums(prob, batch, max_rows, view.size[1])
        for window, part in zip(chunk, prob.split(batch), strict=True):
            sums.add(part, *window)
    yield unflip(sums.pop_rows(view.size[0]), view)


def unflip(prob: Tensor, view: View) -> Tensor:
    return prob.flip(-1) if view.flipped else prob


class WindowSums:
    """Sums of window probabilities and counts of windows, for the `rows` rows starting at `top`."""

    def __init__(self, prob: Tensor, batch: int, rows: int, width: int) -> None:
        self.total = prob.new_zeros(batch, prob.shape[1], rows, width)
        self.count = prob.new_zeros(rows, width)
        self.top = 0

    def add(self, part: Tensor, rows: slice, columns: slice) -> None:
        rows = slice(rows.start - self.top, rows.stop - self.top)
        self.total[..., rows, columns] += part
        self.count[rows, columns] += 1

    def pop_rows(self, end: int) -> Tensor:
        """Remove the rows above `end` and return their means (B, K, rows, width)."""
        number = end - self.top
        mean = self.total[..., :number, :] / self.count[:number]
        for tensor in (self.total, self.count):
            shift_up(tensor, number)
        self.top = end
        return mean


def shift_up(tensor: Tensor, count: int) -> None:
    """Move the rows of (..., rows, width) up by `count` in place and fill with zeros."""
    rest = tensor.shape[-2] - count
    for first in range(0, rest, count):  # source and target of a block do not overlap, so no full copy is needed
        rows = min(count, rest - first)
        tensor[..., first : first + rows, :] = tensor[..., first + count : first + count + rows, :]
    tensor[..., rest:, :] = 0


class RowReader:
    """Random row access, from top to bottom, to a map that arrives in strips; strips are dropped once passed."""

    def __init__(self, strips: Iterator[Tensor]) -> None:
        self.strips, self.end = strips, 0
        self.buffer: deque[tuple[int, Tensor]] = deque()  # first row, strip

    def read(self, first: int, last: int) -> Tensor:
        while self.end < last:
            strip = next(self.strips)
            self.buffer.append((self.end, strip))
            self.end += strip.shape[-2]
        while self.buffer[0][0] + self.buffer[0][1].shape[-2] <= first:
            self.buffer.popleft()
        parts = [strip[..., max(0, first - top) : last - top, :] for top, strip in self.buffer if top < last]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def resize_strips(strips: Iterator[Tensor], size: Size, new_size: Size) -> Iterator[Tensor]:
    """Strips of a map of `size` -> strips of the map resized by resize_antialiased."""
    if size == new_size:
        yield from strips
        return
    # columns first: rows are independent of each other
    source = RowReader(resize_antialiased(strip, (strip.shape[-2], new_size[1])) for strip in strips)
    for first in range(0, new_size[0], ROWS):
        top, bottom, weights = resize_weights(size[0], new_size[0], first, min(first + ROWS, new_size[0]))
        part = source.read(top, bottom)
        with torch.autocast(part.device.type, enabled=False):
            yield weights.to(part.device) @ part


def resize_weights(length: int, new_length: int, first: int, last: int) -> tuple[int, int, Tensor]:
    """Weights of an antialiased bilinear resize along one side, for the new pixels first..last.

    Returns:
        start, stop: range of source pixels.
        weights: (last - first, stop - start), in each row a triangle around the pixel's position, at least 1 wide.
    """
    ratio = length / new_length
    support = max(1.0, ratio)
    centers = (torch.arange(first, last, dtype=torch.float64) + 0.5) * ratio
    start = max(0, math.floor(centers[0].item() - support))
    stop = min(length, math.ceil(centers[-1].item() + support))
    positions = torch.arange(start, stop, dtype=torch.float64) + 0.5
    weights = (1 - ((positions - centers[:, None]) / support).abs()).clamp(min=0)
    return start, stop, (weights / weights.sum(1, keepdim=True)).float()
