"""Supervised training on the labeled images alone."""

from __future__ import annotations

from torch import Tensor

from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.methods.base import Criterion, Method, Progress
from allspark.models.student import Student


class Supervised(Method):
    """The baseline that every other method has to beat with the same labels.

    Args:
        criterion: labeled loss.
        labeled_view: photometric policy of the labeled images.
    """

    capturable = True

    def __init__(self, criterion: Criterion, *, labeled_view: str = "weak") -> None:
        super().__init__(criterion)
        self.views = Views(labeled=labeled_view, unlabeled=False)

    def losses(
        self, student: Student, labeled: LabeledBatch, unlabeled: UnlabeledBatch | None, progress: Progress
    ) -> dict[str, Tensor]:
        return self.supervised_losses(student, labeled)
