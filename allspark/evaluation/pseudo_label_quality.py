"""How good pseudo-labels are, measured on unlabeled images whose labels are known but never used for training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from allspark import distributed
from allspark.data.batch import normalize
from allspark.data.worker_pool import TIMEOUT, iterate, make_loader
from allspark.evaluation.dataset import SegmentationDataset, Shard, group_by_size
from allspark.evaluation.metrics import ConfusionMatrix, nan_to_none
from allspark.pseudo_labels import confident
from allspark.utils.errors import UserError

# normalized images (B, 3, H, W), valid (B, H, W) bool -> pseudo-labels (B, H, W) int64, their confidence (B, H, W)
Labeler = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Show = Callable[[str, Tensor, Tensor, Tensor, Tensor], None]  # name, image, mask, pseudo-label, confidence; on the CPU


@dataclass(frozen=True)
class PseudoLabelQuality:
    """Percentages; None if no pixel is confident.

    Args:
        accuracy: correct pixels among those with a confident pseudo-label.
        coverage: confident pixels among those with a label.
        miou: mean IoU over the confident pixels.
    """

    accuracy: float | None
    coverage: float
    miou: float | None

    def metrics(self) -> dict[str, float | None]:
        """By key of metrics.jsonl."""
        return {f"pseudo_{name}": value for name, value in vars(self).items()}

    def __str__(self) -> str:
        if self.accuracy is None:
            return "no pixel is confident enough for a pseudo-label"
        return f"pseudo-labels {self.accuracy:.1f} % correct on {self.coverage:.1f} % of the pixels"


def measure_pseudo_labels(
    labeler: Labeler,
    crops: SegmentationDataset,
    device: torch.device,
    *,
    threshold: float | Tensor | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    timeout: float = TIMEOUT,
    show: Show | None = None,
) -> PseudoLabelQuality | None:
    """Measure the labeler on the crops; unreadable crops are left out, and all ranks get the same result.

    Args:
        labeler: must not track gradients.
        threshold: minimum confidence of a pseudo-label, one value or one per class (K,); None: all are confident.
        timeout: seconds without a batch after which a loader worker counts as hung.
        show: called with each image on the rank that has it.

    Returns:
        The quality; None if no pixel of the crops has a label.
    """
    spec = crops.spec
    confusion = ConfusionMatrix(spec.num_classes, spec.ignore_index, device)  # of the confident pixels
    labeled = torch.zeros((), dtype=torch.int64, device=device)
    shard = Shard(crops, distributed.rank(), distributed.world_size())
    workers = min(num_workers, len(shard))
    for items in iterate(make_loader(shard, workers, timeout=timeout, batch_size=batch_size, collate_fn=list)):
        for (image, truth), names in group_by_size(item for item in items if not isinstance(item, UserError)):
            mask = truth.to(device)
            normalized = normalize(image.to(device), spec.statistics)
            label, confidence = labeler(normalized, torch.ones_like(mask, dtype=torch.bool))
            labeled += (mask != spec.ignore_index).sum()
            used = confident(label, confidence, threshold)
            confusion.update(label, mask if used is None else mask.masked_fill(~used, spec.ignore_index))
            if show is not None:
                for name, *tensors in zip(names, image, truth, label.cpu(), confidence.cpu(), strict=True):
                    show(name, *tensors)
    # reduce even if this rank could read nothing: other ranks wait for it
    confusion.matrix = distributed.all_reduce_sum(confusion.matrix)
    labeled = distributed.all_reduce_sum(labeled).item()
    if labeled == 0:
        return None
    result = confusion.result(len(crops))
    coverage = 100 * confusion.matrix.sum().item() / labeled
    return PseudoLabelQuality(nan_to_none(result.pixel_accuracy), coverage, nan_to_none(result.miou))
