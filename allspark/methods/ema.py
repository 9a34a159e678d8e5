"""The EMA teacher: a copy of a network that follows it by an exponential moving average of its weights."""

from __future__ import annotations

import torch
from torch import nn


class EMATeacher(nn.Module):
    """model: the teacher's network, always in evaluation mode and never trained. It starts as what it is given.

    momentum: what the teacher keeps of itself at each step, ramped up from 0 (Mean Teacher, NeurIPS 2017), so that the
    teacher follows the first steps closely: min(1 - 1 / (step + 1), momentum).
    """

    def __init__(self, model: nn.Module, momentum: float) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.momentum = momentum

    def train(self, mode: bool = True) -> EMATeacher:
        """Stays in evaluation mode, whatever the module that holds it is set to."""
        return super().train(False)

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """After optimizer step `step`, counted from 0. Parameters and floating-point buffers follow, counts are copied.

        The teacher's entries decide: what the student has beyond them (its memory) is not looked at.
        """
        keep = min(1 - 1 / (step + 1), self.momentum)
        theirs = dict(student.named_parameters()) | dict(student.named_buffers())
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        floating = [name for name in own if own[name].is_floating_point()]
        torch._foreach_lerp_([own[name] for name in floating], [theirs[name] for name in floating], 1 - keep)
        for name in own.keys() - set(floating):
            own[name].copy_(theirs[name])
