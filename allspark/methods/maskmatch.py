"""MaskMatch (arXiv 2312.08631): a student that sees parts of an image learns what a teacher makes of all of it."""

from __future__ import annotations

from torch import Tensor, nn

from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.methods.base import (
    Criterion,
    Progress,
    TeacherMethod,
    joint_forward,
    pseudo_loss,
    unlabeled_forward,
)
from allspark.methods.masking import hide_patches
from allspark.methods.pseudo_labels import Pseudo, cutmix, predict_multi_scale
from allspark.utils.errors import UserError


class MaskMatch(TeacherMethod):
    """The teacher labels the weak view at several scales (MS); strong view and masked strong view (LCR) learn from it.

    No code is public, and the abstract has no numbers but "only 30 %" of an image visible: all others are ours.
    masked: share of the patches that LCR hides. patch_size: their side in pixels.
    scales: of the weak view, whose predictions are averaged to the pseudo-label.
    """

    def __init__(
        self,
        criterion: Criterion,
        *,
        threshold: float = 0.95,
        masked: float = 0.7,
        patch_size: int = 32,
        scales: tuple[float, ...] = (0.5, 1.0, 1.5),
        cutmix: float = 0.5,
        teacher_momentum: float = 0.996,
        warmup_epochs: int = 5,
        ignore_padding: bool = True,
    ) -> None:
        super().__init__(criterion, teacher_momentum, threshold)
        if not 0 <= masked <= 1:
            raise UserError(f"method.masked={masked} is a share of the patches and must be in 0..1")
        if patch_size < 1:
            raise UserError(f"method.patch_size={patch_size} must be at least 1 pixel")
        if not scales or not all(0 < scale <= 16 for scale in scales):
            raise UserError(f"method.scales={list(scales)}: give one or more factors above 0 and at most 16")
        self.views = Views(labeled="weak", strong=("strong",), cutmix=cutmix)
        self.masked, self.patch_size = masked, patch_size
        self.scales = scales
        self.warmup_epochs = warmup_epochs  # of the memory, where the model has a bottleneck
        self.ignore_padding = ignore_padding

    def losses(
        self, model: nn.Module, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: Progress
    ) -> dict[str, Tensor]:
        (strong,), (box,), valid = unlabeled.strong, unlabeled.cutmix, unlabeled.valid | (not self.ignore_padding)
        pseudo = self.pseudo_labels(model, unlabeled.weak, valid)
        mixed = pseudo.cutmix(box)
        logits_x, logits_s = joint_forward(
            model,
            labeled.image,
            cutmix(strong, box),
            pseudo_logits=mixed.logits,
            read_memory=progress.epoch >= self.warmup_epochs,
        )
        logits_m = unlabeled_forward(model, hide_patches(strong, self.patch_size, self.masked))
        loss_x = self.criterion(logits_x, labeled.mask)
        loss_s, mask_ratio = pseudo_loss(logits_s, mixed, self.threshold, cutmix(valid, box))
        loss_lcr, _ = pseudo_loss(logits_m, pseudo, self.threshold, valid)  # of the entire image, hidden or not
        parts = {"loss_x": loss_x, "loss_u_s": loss_s, "loss_u_lcr": loss_lcr, "mask_ratio": mask_ratio}
        return {"loss": (loss_x + 0.5 * loss_s + 0.5 * loss_lcr) / 2, **parts}

    def pseudo_labels(self, model: nn.Module, image: Tensor, valid: Tensor) -> Pseudo:
        return predict_multi_scale(self.predictor(model), image, self.scales)
