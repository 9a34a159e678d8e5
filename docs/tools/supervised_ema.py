"""Supervised training evaluated as methods with an EMA teacher are: the moving average of its weights.

    PYTHONPATH=docs/tools python train.py --dataset camvid --method supervised --split 1_16 \
        method.name=supervised_ema:SupervisedEMA

The momentum is that of the teachers on CamVid. What this gains over `--method supervised` is no gain of a method.
"""

from __future__ import annotations

from allspark.data.batch import Views
from allspark.methods.base import Criterion, TeacherMethod
from allspark.methods.supervised import Supervised


class SupervisedEMA(TeacherMethod):
    """Supervised training; the teacher follows the network and is evaluated and saved."""

    capturable = True
    losses = Supervised.losses

    def __init__(self, criterion: Criterion, *, labeled_view: str = "weak", teacher_momentum: float = 0.99) -> None:
        super().__init__(criterion, teacher_momentum)
        self.views = Views(labeled=labeled_view, unlabeled=False)
