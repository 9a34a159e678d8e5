"""The EMA teacher: a copy of a network that follows it by an exponential moving average of its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from allspark.models.student import predict
from allspark.pseudo_labels import Pseudo


class EMATeacher(nn.Module):
    """A network in evaluation mode that follows the student and is never trained itself.

    Args:
        model: the teacher's network, with the weights to start from.
        momentum: share of itself that the teacher keeps per step. It is ramped up from 0, min(1 - 1 / (step + 1),
            momentum), so that the teacher follows the first steps closely (Mean Teacher, NeurIPS 2017).
    """

    def __init__(self, model: nn.Module, momentum: float) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.momentum = momentum

    def train(self, mode: bool = True) -> EMATeacher:
        """Stay in evaluation mode, whatever mode the surrounding module is set to."""
        return super().train(False)

    def predict(self, image: Tensor, share_keys: bool = False) -> Pseudo:
        """Pseudo-labels of image (B, C, H, W); see `allspark.models.student.predict`."""
        return predict(self.model, image, share_keys)

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """Follow the student after optimizer step `step`, counted from 0.

        Parameters and floating-point buffers are averaged, counters are copied. Entries of the student that the teacher
        does not have are ignored.
        """
        keep = min(1 - 1 / (step + 1), self.momentum)
        theirs = dict(student.named_parameters()) | dict(student.named_buffers())
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        floating = [name for name in own if own[name].is_floating_point()]
        torch._foreach_lerp_([own[name] for name in floating], [theirs[name] for name in floating], 1 - keep)
        for name in own.keys() - set(floating):
            own[name].copy_(theirs[name])
