"""What pseudo-labels are worth: measured on unlabeled images whose labels are known, which training never opens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allspark import distributed
from allspark.data.spec import DatasetSpec, Sample
from allspark.evaluation.dataset import SegmentationDataset
from allspark.data.batch import normalize
from allspark.data.worker_pool import TIMEOUT, iterate, make_loader
from allspark.evaluation.dataset import Item, Shard, check_min_size, group_by_size
from allspark.evaluation.metrics import ConfusionMatrix, nan_to_none
from allspark.evaluation.sliding_window import Inference
from allspark.utils.errors import UserError

# normalized images (B, 3, H, W), valid (B, H, W) bool -> pseudo-labels (B, H, W) int64, their confidence (B, H, W)
Labeler = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Show = Callable[[str, Tensor, Tensor, Tensor, Tensor], None]  # name, image, mask, pseudo-label, confidence; on the CPU


@dataclass(frozen=True)
class PseudoLabelQuality:
    """Percentages. coverage: of the pixels with a label, those whose pseudo-label is confident.

    accuracy: of those, the right ones; miou: over the classes of those. None where no pixel is confident.
    """

    accuracy: float | None
    coverage: float
    miou: float | None

    def named(self) -> dict[str, float | None]:
        """The keys of metrics.jsonl."""
        return {f"pseudo_{name}": value for name, value in vars(self).items()}

    def __str__(self) -> str:
        if self.accuracy is None:
            return "no pixel is confident enough for a pseudo-label"
        return f"pseudo-labels {self.accuracy:.1f} % right on {self.coverage:.1f} % of the pixels"


class SegmentationDataset(SegmentationDataset):
    """Image and mask cut to their center, at most crop_size wide and high."""

    def __init__(self, samples: Sequence[Sample], spec: DatasetSpec, crop_size: int) -> None:
        super().__init__(samples, spec)
        self.region = Inference("center_crop", crop_size).region

    def __getitem__(self, index: int) -> Item:
        image, mask, name = super().__getitem__(index)
        check_min_size(image, self.samples[index].image)
        rows, columns = self.region(*mask.shape)
        return image[:, rows, columns], mask[rows, columns], name


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
    """The labeler's quality on the crops, the same on every rank; None where no pixel of them has a label.

    A pseudo-label is confident from `threshold` on, one for all or (K,) one for each class; without one always. What
    cannot be read is left out. `show` is called on the rank that has the image. The labeler keeps no gradient.
    """
    spec = crops.spec
    confusion = ConfusionMatrix(spec.num_classes, spec.ignore_index, device)  # of the confident pixels
    labeled = torch.zeros((), dtype=torch.int64, device=device)
    shard = Shard(crops, distributed.rank(), distributed.world_size())
    workers = min(num_workers, len(shard))
    for items in iterate(make_loader(shard, workers, timeout=timeout, batch_size=batch_size, collate_fn=list)):
        for (image, mask), names in group_by_size(item for item in items if not isinstance(item, UserError)):
            truth, mask = mask, mask.to(device)
            label, confidence = labeler(normalize(image.to(device)), torch.ones_like(mask, dtype=torch.bool))
            labeled += (mask != spec.ignore_index).sum()
            least = threshold[label] if isinstance(threshold, Tensor) else threshold
            unsure = torch.zeros_like(mask, dtype=torch.bool) if least is None else confidence < least
            confusion.update(label, mask.masked_fill(unsure, spec.ignore_index))
            if show is not None:
                for name, *tensors in zip(names, image, truth, label.cpu(), confidence.cpu(), strict=True):
                    show(name, *tensors)
    # collective whatever this rank could read: another one may have read more
    confusion.matrix = distributed.all_reduce_sum(confusion.matrix)
    labeled = distributed.all_reduce_sum(labeled).item()
    if labeled == 0:
        return None
    scores = confusion.scores(len(crops))
    coverage = 100 * confusion.matrix.sum().item() / labeled
    return PseudoLabelQuality(nan_to_none(scores.pixel_accuracy), coverage, nan_to_none(scores.miou))
