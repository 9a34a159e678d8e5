"""Class scores of images too large to hold them for every pixel: windows from top to bottom, a strip at a time.

Windows, their batches and the order of their sums are those of inference.predict_sliding, and so are the scores:
without scales bit for bit, with scales up to the rounding of a resize. What is held are some strips as high as a window
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
from allspark.evaluation.sliding_window import Inference, resize_antialiased, scaled_size, window_corners

MAX_SCORES = 2 * 10**8  # of a batch, held at once: 0.8 GB, and two or three times that while they are averaged
ROWS = 64  # that are given away at a time

Size = tuple[int, int]  # height, width


def needs_tiling(shape: torch.Size, num_classes: int, inference: Inference) -> bool:
    """Whether images (B, 3, H, W) are for strips. An image that goes through the model as a whole cannot be cut."""
    batch, _, height, width = shape
    return inference.mode == "sliding_window" and batch * num_classes * height * width > MAX_SCORES


def tiled_scores(
    model: nn.Module, image: Tensor, inference: Inference, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """What class_scores gives, from top to bottom: rows, and mean probabilities (B, K, rows, W) on the device.

    image: (B, 3, H, W) uint8, wherever it is: windows alone are moved. The caller has the model in eval mode.
    """
    height, width = image.shape[-2:]
    views = [
        View(image, scaled_size((height, width), scale), flipped, device)
        for scale in inference.scales
        for flipped in ((False, True) if inference.flip else (False,))
    ]
    readers = [RowReader(resize_strips(iter_strips(model, view, inference), view.size, (height, width))) for view in views]
    for top in range(0, height, ROWS):
        rows = slice(top, min(top + ROWS, height))
        total = None
        for reader in readers:
            prob = reader.read(rows.start, rows.stop)
            total = prob if total is None else total + prob
        yield rows, total / len(readers)


@dataclass(frozen=True)
class View:
    """Images (B, 3, H, W) uint8 at another size, mirrored or not, of which a window is made when it is asked for."""

    image: Tensor
    size: Size
    flipped: bool
    device: torch.device

    def window(self, y: int, x: int, rows: int, columns: int) -> Tensor:
        """(B, 3, rows, columns), normalized, on the device."""
        left = self.size[1] - x - columns if self.flipped else x
        window = self.scaled(y, left, rows, columns)
        return window.flip(-1) if self.flipped else window

    def scaled(self, y: int, x: int, rows: int, columns: int) -> Tensor:
        height, width = self.image.shape[-2:]
        if self.size == (height, width):
            return normalize(self.image[..., y : y + rows, x : x + columns].to(self.device))
        top, bottom, down = resize_weights(height, self.size[0], y, y + rows)
        left, right, across = resize_weights(width, self.size[1], x, x + columns)
        part = normalize(self.image[..., top:bottom, left:right].to(self.device))
        with torch.autocast(self.device.type, enabled=False):  # as interpolation is not what --precision speaks of
            return down.to(self.device) @ part @ across.to(self.device).T


def iter_strips(model: nn.Module, view: View, inference: Inference) -> Iterator[Tensor]:
    """Mean probabilities of a view, turned back where it is mirrored: (B, K, rows, w), one strip below the other."""
    batch = len(view.image)
    rows, columns, corners = window_corners(view.size, inference.window)
    per_pass = max(1, inference.window_batch // batch)
    chunks = [corners[first : first + per_pass] for first in range(0, len(corners), per_pass)]
    most = max(chunk[-1][0] + rows - chunk[0][0] for chunk in chunks)
    sums = None
    for chunk in chunks:
        top = chunk[0][0]  # no later window reaches above
        if sums is not None and top > sums.top:
            yield unflip(sums.finished(top), view)
        windows = torch.cat([view.window(y, x, rows, columns) for y, x in chunk])
        prob = model(windows).logits.softmax(1)
        sums = sums or WindowSums(prob, batch, most, view.size[1])
        for (y, x), part in zip(chunk, prob.split(batch), strict=True):
            sums.add(part, y, x)
    yield unflip(sums.finished(view.size[0]), view)


def unflip(prob: Tensor, view: View) -> Tensor:
    return prob.flip(-1) if view.flipped else prob


class WindowSums:
    """Summed probabilities and the count of windows, of `rows` rows from `top` on."""

    def __init__(self, prob: Tensor, batch: int, rows: int, width: int) -> None:
        self.total = prob.new_zeros(batch, prob.shape[1], rows, width)
        self.seen = prob.new_zeros(rows, width)
        self.top = 0

    def add(self, part: Tensor, y: int, x: int) -> None:
        rows, columns = part.shape[-2:]
        first = y - self.top
        self.total[..., first : first + rows, x : x + columns] += part
        self.seen[first : first + rows, x : x + columns] += 1

    def finished(self, end: int) -> Tensor:
        """The means of the rows above `end`, which are forgotten: (B, K, rows, width)."""
        count = end - self.top
        mean = self.total[..., :count, :] / self.seen[:count]
        for tensor in (self.total, self.seen):
            shift_up(tensor, count)
        self.top = end
        return mean


def shift_up(tensor: Tensor, count: int) -> None:
    """The rows (..., rows, width) move up by `count` in place, zeros follow."""
    rest = tensor.shape[-2] - count
    for first in range(0, rest, count):  # blocks that do not overlap where they came from: no copy of all of it
        rows = min(count, rest - first)
        tensor[..., first : first + rows, :] = tensor[..., first + count : first + count + rows, :]
    tensor[..., rest:, :] = 0


class RowReader:
    """The rows of a map that comes in strips; read from top to bottom, those above the last read are forgotten."""

    def __init__(self, strips: Iterator[Tensor]) -> None:
        self.strips, self.end = strips, 0
        self.kept: deque[tuple[int, Tensor]] = deque()  # first row, strip

    def read(self, first: int, last: int) -> Tensor:
        while self.end < last:
            strip = next(self.strips)
            self.kept.append((self.end, strip))
            self.end += strip.shape[-2]
        while self.kept[0][0] + self.kept[0][1].shape[-2] <= first:
            self.kept.popleft()
        parts = [strip[..., max(0, first - top) : last - top, :] for top, strip in self.kept if top < last]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def resize_strips(strips: Iterator[Tensor], size: Size, to: Size) -> Iterator[Tensor]:
    """Strips of a map of `size` -> strips of what inference.resize makes of the whole map."""
    if size == to:
        yield from strips
        return
    source = RowReader(resize_antialiased(strip, (strip.shape[-2], to[1])) for strip in strips)  # across, rows do not know each other
    for first in range(0, to[0], ROWS):
        top, bottom, weights = resize_weights(size[0], to[0], first, min(first + ROWS, to[0]))
        part = source.read(top, bottom)
        with torch.autocast(part.device.type, enabled=False):
            yield weights.to(part.device) @ part


def resize_weights(length: int, to: int, first: int, last: int) -> tuple[int, int, Tensor]:
    """Of a bilinear, antialiased resize of `length` pixels to `to`: what its pixels first..last are made of.

    -> start, stop, weights (last - first, stop - start): each a triangle around the pixel's place, at least 1 wide.
    """
    ratio = length / to
    support = max(1.0, ratio)
    centers = (torch.arange(first, last, dtype=torch.float64) + 0.5) * ratio
    start = max(0, math.floor(centers[0].item() - support))
    stop = min(length, math.ceil(centers[-1].item() + support))
    places = torch.arange(start, stop, dtype=torch.float64) + 0.5
    weights = (1 - ((places - centers[:, None]) / support).abs()).clamp(min=0)
    return start, stop, (weights / weights.sum(1, keepdim=True)).float()
