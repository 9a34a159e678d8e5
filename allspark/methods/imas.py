"""iMAS (CVPR 2023): how far an unlabeled image is perturbed, and what it weighs, follows from how easy it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.methods.base import (
    Criterion,
    Progress,
    TeacherMethod,
    check_weight,
    joint_forward,
    unlabeled_forward,
)
from allspark.methods.hardness import clipped_boxes, easiness, opposite_ranks
from allspark.methods.pseudo_labels import Pseudo, paste, predict_pseudo
from allspark.models.segmentor import unwrap


class IMAS(TeacherMethod):
    """Where student and teacher agree, easiness e is near 1: more of the strong view, more CutMix, more weight.

    CutMix is of weak views, an easy image with a hard one; in an odd batch the middle one stays as it is (Released).
    background: class that says nothing of hardness. Released: class 0, which is the road on Cityscapes.
    ignore_padding: leave padding out of the unlabeled loss. Released: it counts.
    """

    facts = ("background",)
    mixes = True

    def __init__(
        self,
        criterion: Criterion,
        background: int | None = None,
        *,
        threshold: float = 0.95,
        unlabeled_weight: float = 3.0,
        labeled_view: str = "weak",
        unlabeled_view: str = "imas",
        teacher_momentum: float = 0.996,
        warmup_epochs: int = 5,
        ignore_padding: bool = False,
    ) -> None:
        super().__init__(criterion, teacher_momentum, threshold)
        check_weight(unlabeled_weight)
        self.views = Views(labeled=labeled_view, strong=(unlabeled_view,))
        self.background = background
        self.unlabeled_weight = unlabeled_weight
        self.warmup_epochs = warmup_epochs  # of the memory, where the model has a bottleneck
        self.ignore_padding = ignore_padding

    def losses(
        self, model: nn.Module, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: Progress
    ) -> dict[str, Tensor]:
        student = predict_pseudo(model, unlabeled.weak)
        pseudo = predict_pseudo(self.teacher.model, unlabeled.weak)
        easy = easiness(student, pseudo, self.threshold, self.background)
        image, label, sure, valid = self.perturbed(unlabeled, pseudo, easy)
        read_memory = progress.epoch >= self.warmup_epochs
        if unwrap(model).bottleneck is None:  # Released: one pass, in which the weak view counts for batch norm alone
            logits_x, logits_u = joint_forward(model, labeled.image, torch.cat((unlabeled.weak, image)))
            logits_u = logits_u[len(easy) :]
        else:  # labeled images and memory meet each unlabeled image once
            logits_x, _ = joint_forward(
                model, labeled.image, unlabeled.weak, pseudo_logits=pseudo.logits, read_memory=read_memory
            )
            logits_u = unlabeled_forward(model, image)

        loss_x = self.criterion(logits_x, labeled.mask)
        counted = valid | (not self.ignore_padding)
        total = (F.cross_entropy(logits_u, label, reduction="none") * (sure & counted)).sum((1, 2))
        each = total / counted.sum((1, 2)).clamp(min=1)  # of all pixels, not of confident ones
        loss_u = (easy.repeat(len(each) // len(easy)) * each).mean()  # what is pasted weighs as the image below it
        mask_ratio = (sure & counted).sum() / counted.sum().clamp(min=1)
        parts = {"loss_x": loss_x, "loss_u": loss_u, "mask_ratio": mask_ratio, "easiness": easy.mean()}
        return {"loss": loss_x + self.unlabeled_weight * loss_u, **parts}

    def perturbed(self, unlabeled: UnlabeledBatch, pseudo: Pseudo, easy: Tensor) -> tuple[Tensor, ...]:
        """Images of adaptive intensity and, with probability mean(e), as many CutMixed weak ones behind them; of all
        their labels, which pixels are confident, which are valid. A batch of one is never mixed.
        """
        weak, sure = unlabeled.weak, pseudo.confidence >= self.threshold
        targets = pseudo.label, sure, unlabeled.valid
        intensity = torch.lerp(weak, unlabeled.strong[0], easy.view(-1, 1, 1, 1))
        if len(easy) == 1 or torch.rand((), device=easy.device) >= easy.mean():  # the step's one wait for the device
            return intensity, *targets
        partner, box = opposite_ranks(easy), clipped_boxes(weak)
        mixed = (paste(part, box, part[partner]) for part in (weak, *targets))
        return tuple(torch.cat(pair) for pair in zip((intensity, *targets), mixed, strict=True))
