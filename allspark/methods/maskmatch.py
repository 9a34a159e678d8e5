"""MaskMatch (arXiv 2312.08631): a student that sees parts of an image learns what a teacher makes of all of it."""

from __future__ import annotations

from torch import Tensor, nn

from allspark.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.ema import EMATeacher
from allspark.errors import UserError
from allspark.losses import consistency_loss
from allspark.masking import hide_patches
from allspark.methods.base import (
    Criterion,
    Method,
    Progress,
    check_momentum,
    check_threshold,
    joint_forward,
    unlabeled_forward,
)
from allspark.models.segmentor import unwrap
from allspark.pseudo import Pseudo, cutmix, predict_multi_scale


class MaskMatch(Method):
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
        super().__init__(criterion)
        check_threshold(threshold)
        check_momentum(teacher_momentum)
        if not 0 <= masked <= 1:
            raise UserError(f"method.masked={masked} is a share of the patches and must be in 0..1")
        if patch_size < 1:
            raise UserError(f"method.patch_size={patch_size} must be at least 1 pixel")
        if not scales or not all(0 < scale <= 16 for scale in scales):
            raise UserError(f"method.scales={list(scales)}: give one or more factors above 0 and at most 16")
        self.views = Views(labeled="weak", strong=("strong",), cutmix=cutmix)
        self.threshold = threshold
        self.masked, self.patch_size = masked, patch_size
        self.scales = scales
        self.teacher_momentum = teacher_momentum
        self.warmup_epochs = warmup_epochs  # of the memory, where the model has a bottleneck
        self.ignore_padding = ignore_padding

    def attach(self, model: nn.Module) -> None:
        self.teacher = EMATeacher(unwrap(model).inference_copy(), self.teacher_momentum)

    def losses(
        self, model: nn.Module, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: Progress
    ) -> dict[str, Tensor]:
        (strong,), (box,), valid = unlabeled.strong, unlabeled.cutmix, unlabeled.valid
        pseudo = predict_multi_scale(self.teacher.model, unlabeled.weak, self.scales)
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
        loss_s, mask_ratio = self.consistency(logits_s, mixed, cutmix(valid, box))
        loss_lcr, _ = self.consistency(logits_m, pseudo, valid)  # of the entire image, hidden or not
        parts = {"loss_x": loss_x, "loss_u_s": loss_s, "loss_u_lcr": loss_lcr, "mask_ratio": mask_ratio}
        return {"loss": (loss_x + 0.5 * loss_s + 0.5 * loss_lcr) / 2, **parts}

    def consistency(self, logits: Tensor, pseudo: Pseudo, valid: Tensor) -> tuple[Tensor, Tensor]:
        keep = pseudo.confidence >= self.threshold
        return consistency_loss(logits, pseudo.label, keep, valid if self.ignore_padding else None)

    def after_step(self, model: nn.Module, progress: Progress) -> None:
        self.teacher.update(unwrap(model), progress.step)

    def predictor(self, model: nn.Module) -> nn.Module:
        return self.teacher.model
