"""FixMatch (NeurIPS 2020) for segmentation, in the strong re-implementation of UniMatch (CVPR 2023)."""

from __future__ import annotations

from torch import Tensor, nn

from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.methods.base import (
    Criterion,
    Method,
    Progress,
    joint_forward,
    pseudo_loss,
    unlabeled_forward,
)
from allspark.methods.pseudo_labels import Pseudo, cutmix, predict_pseudo


class FixMatch(Method):
    """Confident labels of the weak view supervise one strong, CutMixed view.

    Labels come from the train-mode pass over the weak view, the pasted region's from the evaluation-mode pass, as
    released. The partner is another image of the batch. UniMatch: another crop of the same image (its issue 51).
    """

    def __init__(
        self,
        criterion: Criterion,
        *,
        threshold: float = 0.95,
        labeled_view: str = "weak",
        unlabeled_view: str = "strong",
        cutmix: float = 0.5,
        warmup_epochs: int = 5,
        ignore_padding: bool = True,
    ) -> None:
        super().__init__(criterion, threshold)
        self.views = Views(labeled=labeled_view, strong=(unlabeled_view,), cutmix=cutmix)
        self.warmup_epochs = warmup_epochs  # of the memory, where the model has a bottleneck
        self.ignore_padding = ignore_padding

    def losses(
        self, model: nn.Module, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: Progress
    ) -> dict[str, Tensor]:
        box = unlabeled.cutmix[0]
        partner = predict_pseudo(model, unlabeled.weak)
        logits_x, logits_w = joint_forward(
            model,
            labeled.image,
            unlabeled.weak,
            pseudo_logits=partner.logits,
            read_memory=progress.epoch >= self.warmup_epochs,
        )
        logits_s = unlabeled_forward(model, cutmix(unlabeled.strong[0], box))
        pseudo = Pseudo.of(logits_w).cutmix(box, partner)
        loss_x = self.criterion(logits_x, labeled.mask)
        valid = unlabeled.valid | (not self.ignore_padding)
        loss_u, mask_ratio = pseudo_loss(logits_s, pseudo, self.threshold, cutmix(valid, box))
        return {"loss": (loss_x + loss_u) / 2, "loss_x": loss_x, "loss_u": loss_u, "mask_ratio": mask_ratio}
