"""UniMatch (CVPR 2023): FixMatch with two strong views and a stream of perturbed features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.methods.base import (
    Criterion,
    Method,
    Progress,
    joint_output,
    pseudo_loss,
    unlabeled_forward,
)
from allspark.methods.perturb import FeatureDropout
from allspark.methods.pseudo_labels import Pseudo, cutmix, predict_pseudo


class UniMatch(Method):
    """Confident labels of the weak view supervise two strong, CutMixed views and the weak view with dropped channels.

    Labels come from the train-mode pass over the weak view, the pasted regions' from the evaluation-mode pass, as
    released; the partner is another image of the batch. The labels of the perturbed features are not pasted.
    feature_dropout: rate at which channels are dropped.
    """

    def __init__(
        self,
        criterion: Criterion,
        *,
        threshold: float = 0.95,
        cutmix: float = 0.5,
        feature_dropout: float = 0.5,
        warmup_epochs: int = 5,
        ignore_padding: bool = True,
    ) -> None:
        super().__init__(criterion, threshold)
        self.views = Views(labeled="weak", strong=("strong", "strong"), cutmix=cutmix)
        self.perturb = FeatureDropout(feature_dropout)
        self.warmup_epochs = warmup_epochs  # of the memory, where the model has a bottleneck
        self.ignore_padding = ignore_padding

    def losses(
        self, model: nn.Module, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: Progress
    ) -> dict[str, Tensor]:
        num_labeled, boxes = len(labeled.image), unlabeled.cutmix
        partner = predict_pseudo(model, unlabeled.weak)
        joint = joint_output(
            model,
            labeled.image,
            unlabeled.weak,
            pseudo_logits=partner.logits,
            read_memory=progress.epoch >= self.warmup_epochs,
            perturb=self.perturb,
        )
        strong = [cutmix(view, box) for view, box in zip(unlabeled.strong, boxes, strict=True)]
        logits_s1, logits_s2 = unlabeled_forward(model, torch.cat(strong)).chunk(2)

        pseudo, valid = Pseudo.of(joint.logits[num_labeled:]), unlabeled.valid | (not self.ignore_padding)
        loss_x = self.criterion(joint.logits[:num_labeled], labeled.mask)
        loss_s1, loss_s2 = (
            pseudo_loss(logits, pseudo.cutmix(box, partner), self.threshold, cutmix(valid, box))[0]
            for logits, box in zip((logits_s1, logits_s2), boxes, strict=True)
        )
        loss_fp, mask_ratio = pseudo_loss(joint.perturbed[num_labeled:], pseudo, self.threshold, valid)
        return {
            "loss": (loss_x + 0.25 * loss_s1 + 0.25 * loss_s2 + 0.5 * loss_fp) / 2,
            "loss_x": loss_x,
            "loss_u_s1": loss_s1,
            "loss_u_s2": loss_s2,
            "loss_u_fp": loss_fp,
            "mask_ratio": mask_ratio,
        }
