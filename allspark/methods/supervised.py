"""Supervised training: the labeled images alone."""

from __future__ import annotations

from torch import Tensor, nn

from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.methods.base import Criterion, Method, Progress


class Supervised(Method):
    """The lower bound that every other method has to beat on the same labels."""

    takes_bottleneck = False  # the branch of the unlabeled images would never get a gradient

    def __init__(self, criterion: Criterion, *, labeled_view: str = "weak") -> None:
        super().__init__(criterion)
        self.views = Views(labeled=labeled_view, unlabeled=False)

    def losses(
        self, model: nn.Module, labeled: LabeledBatch, unlabeled: UnlabeledBatch | None, progress: Progress
    ) -> dict[str, Tensor]:
        return self.supervised_losses(model, labeled)
