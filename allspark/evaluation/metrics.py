"""Confusion matrix and the metrics computed from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EvalResult:
    """Metrics in percent.

    Args:
        miou: mean of `iou` over the classes that are not nan.
        iou: per class in index order; nan for a class absent from prediction and label.
        pixel_accuracy: share of the labeled pixels with the right class.
        num_images: evaluated.
        confusion: pixel counts (K, K), rows = label, columns = prediction.
    """

    miou: float
    iou: tuple[float, ...]
    pixel_accuracy: float
    num_images: int
    confusion: tuple[tuple[int, ...], ...]

    def per_class(self) -> dict[str, tuple[float, ...]]:
        """IoU, Dice (F1), precision and recall of each class; nan in all or in none, a quotient 0 / 0 then being 0."""
        matrix = torch.tensor(self.confusion, dtype=torch.float64)
        hit, labeled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        more = {"dice": 2 * hit / (labeled + predicted), "precision": hit / predicted, "recall": hit / labeled}
        counted = [not math.isnan(value) for value in self.iou]
        more = {
            name: (100 * values).nan_to_num(0).where(torch.tensor(counted), math.nan) for name, values in more.items()
        }
        return {"iou": self.iou, **{name: tuple(values.tolist()) for name, values in more.items()}}

    def by_class(self, classes: Sequence[str], metric: str = "iou") -> dict[str, float | None]:
        """Class name -> value of a metric of per_class; None instead of nan, for JSON."""
        return {name: nan_to_none(value) for name, value in zip(classes, self.per_class()[metric], strict=True)}


class ConfusionMatrix:
    """Pixel counts `matrix` (K, K) int64, rows = label, columns = prediction; ignored pixels are not counted."""

    def __init__(self, num_classes: int, ignore_index: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        """Count prediction and mask of equal shape, uint8 or int64, on the matrix's device."""
        cells = self.num_classes**2
        # int32 halves the bytes bincount reads; ignored pixels get their own row instead of being selected
        cell = mask.int().mul_(self.num_classes).add_(prediction)
        counts = torch.bincount(cell.flatten(), minlength=cells)
        ignored = counts[self.ignore_index * self.num_classes :][: self.num_classes]
        known = counts[:cells].sum() + ignored.sum()
        assert known == cell.numel(), "a mask value is neither a class nor the ignore index"
        self.matrix += counts[:cells].view_as(self.matrix)

    def result(self, num_images: int, *, absent_as_zero: bool = False) -> EvalResult:
        """Metrics over everything counted so far; absent classes are left out of the mean IoU or count as 0."""
        matrix = self.matrix.cpu().double()
        hit = matrix.diagonal()
        union = matrix.sum(0) + matrix.sum(1) - hit
        iou = 100 * hit / union  # 0 / 0 = nan
        if absent_as_zero:  # Released: a class absent from prediction and label counts as IoU 0 in the mean
            iou = iou.nan_to_num(0.0)
        accuracy = 100 * hit.sum() / matrix.sum()
        confusion = tuple(map(tuple, self.matrix.tolist()))
        return EvalResult(iou.nanmean().item(), tuple(iou.tolist()), accuracy.item(), num_images, confusion)


def nan_to_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def format_table(result: EvalResult, classes: Sequence[str]) -> str:
    """The per-class table as plain text, with the means over the classes and the pixel accuracy below."""
    columns = result.per_class()
    present = sum(not math.isnan(value) for value in result.iou)
    mean, accuracy = f"mean of {present} classes", "pixel accuracy"
    width = max(map(len, (*classes, mean, accuracy)))

    def line(name: str, values: Sequence[float]) -> str:
        return f"{name:{width}}" + "".join(f"{'-' if math.isnan(v) else format(v, '.2f'):>11}" for v in values)

    head = f"{'class':{width}}" + "".join(f"{title:>11}" for title in ("IoU %", "Dice %", "precision", "recall"))
    rule = "-" * len(head)
    lines = [line(name, values) for name, *values in zip(classes, *columns.values(), strict=True)]
    means = [torch.tensor(values).nanmean().item() for values in columns.values()]
    means[0] = result.miou
    return "\n".join((head, rule, *lines, rule, line(mean, means), line(accuracy, [result.pixel_accuracy])))
