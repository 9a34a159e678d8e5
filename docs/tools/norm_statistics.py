"""What unlabeled images in the statistics of batch norm cost: methods for the rows of camvid_pretrained.sh.

    PYTHONPATH=docs/tools python train.py --dataset camvid --method fixmatch --split 1_16 \
        method.name=norm_statistics:FixMatchFrozen

Supervised training minus FixMatchUnused is the cost of the unlabeled images in the statistics; with frozen statistics
there is none.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from allspark.methods.fixmatch import FixMatch
from allspark.methods.supervised import Supervised
from allspark.models.segmentor import Segmentor


def freeze_statistics(encoder: nn.Module) -> None:
    """Normalize by the running statistics of the pretrained weights also in training; scale and shift are trained."""
    for module in encoder.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(use_running_statistics)


def use_running_statistics(norm: nn.Module, args: tuple[Tensor]) -> None:
    norm.eval()


class SupervisedFrozen(Supervised):
    """Supervised training with frozen statistics in the encoder."""

    def attach(self, model: Segmentor) -> None:
        super().attach(model)
        freeze_statistics(model.encoder)


class FixMatchFrozen(FixMatch):
    """FixMatch with frozen statistics in the encoder."""

    def attach(self, model: Segmentor) -> None:
        super().attach(model)
        freeze_statistics(model.encoder)


class FixMatchUnused(FixMatch):
    """FixMatch's forward passes, trained by the labeled loss alone."""

    def losses(self, *args: Any) -> dict[str, Tensor]:
        losses = super().losses(*args)
        return {**losses, "loss": losses["loss_x"]}
