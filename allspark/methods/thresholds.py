"""A threshold for each class, so that no class is left without pseudo-labels (CBST, ECCV 2018, on running counts)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from allspark import distributed
from allspark.methods.pseudo_labels import Pseudo

BINS = 200  # of a confidence of 0..1


class ClassThresholds(nn.Module):
    """Of the pixels that are predicted as a class as large a share is kept as `threshold` keeps of all pixels.

    Where it keeps half of all pixels, a class gets the median of its own confidences, and none gets more than
    `threshold`. With one threshold for all, a class that is hard to tell has no pixels above it: what is learned of it
    are its pixels with wrong labels, and it dies out.

    histogram (K, BINS): confidences of the pixels predicted as each class, over all processes; a step's pixels count
    `momentum` times as much after each further step. BINS are what a threshold is exact to.
    """

    histogram: Tensor

    def __init__(self, num_classes: int, threshold: float, momentum: float = 0.99) -> None:
        super().__init__()
        self.threshold, self.momentum = threshold, momentum
        self.register_buffer("histogram", torch.zeros(num_classes, BINS))

    @torch.no_grad()
    def update(self, pseudo: Pseudo, valid: Tensor) -> None:
        """Count the pseudo-labels of a pass where valid (B, H, W) bool; not those of a network that has become NaN."""
        bins = (pseudo.confidence.float().nan_to_num(0.0) * BINS).long().clamp(max=BINS - 1)
        cells, counts = pseudo.label * BINS + bins, torch.zeros_like(self.histogram)
        counted = valid & pseudo.confidence.isfinite()
        counts.view(-1).index_add_(0, cells.flatten(), counted.flatten().float())
        self.histogram.add_(distributed.all_reduce_sum(counts))

    @torch.no_grad()
    def after_step(self) -> None:
        """Once per optimizer step, of however many passes: what was counted so far counts less from now on."""
        self.histogram.mul_(self.momentum)

    def forward(self) -> Tensor:
        """The thresholds (K,); of a class that was never predicted the common one."""
        above = self.histogram.flip(1).cumsum(1).flip(1)  # (K, BINS): pixels from each bin on
        total = above[:, :1]
        share = above[:, min(round(self.threshold * BINS), BINS - 1)].sum() / total.sum().clamp(min=1)
        enough = above >= share * total
        edges = torch.arange(BINS, device=above.device) / BINS
        highest = torch.where(enough, edges, 0.0).amax(1)  # that still keeps the share
        return highest.where(total[:, 0] > 0, self.threshold).clamp(max=self.threshold)
