"""AllSpark (CVPR 2024): self-training of a network with the AllSpark bottleneck."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from allspark.methods.base import Criterion
from allspark.methods.self_training import SelfTraining
from allspark.models.student import Student
from allspark.pseudo_labels import Pseudo


class AllSpark(SelfTraining):
    """Labeled features are reconstructed from unlabeled ones (section 3).

    The bottleneck (allspark.models.bottleneck) does that work; the losses are those of self-training. The defaults are
    the numerics of the released code (xmed-lab/AllSpark 9da63e2, train_allspark.py).

    Args:
        criterion: labeled loss.
        pseudo_context: the channels that an image attends to when its pseudo-labels are made, those of the whole batch
            (Released) or its own.
        **options: options of SelfTraining.
    """

    capturable = True

    def __init__(
        self, criterion: Criterion, *, pseudo_context: Literal["batch", "image"] = "batch", **options: Any
    ) -> None:
        super().__init__(criterion, **options)
        self.share_keys = pseudo_context == "batch"

    def pseudo_labels(self, student: Student, image: Tensor, valid: Tensor) -> Pseudo:
        return (self.teacher or student).predict(image, self.share_keys)
