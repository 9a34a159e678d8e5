"""MaskMatch (arXiv 2312.08631): a student that sees parts of an image learns the teacher's labels of all of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.methods.base import Criterion, Progress, TeacherMethod, pseudo_loss
from allspark.methods.ema import EMATeacher
from allspark.models.resize import check_scales, resize, scaled_size
from allspark.models.student import Student
from allspark.pseudo_labels import Pseudo, cutmix
from allspark.utils.errors import UserError


class MaskMatch(TeacherMethod):
    """The teacher's multi-scale labels of the weak view supervise a strong view and a masked strong view (LCR).

    No code is public, and the abstract gives no number but "only 30 %" of an image visible: all other values are ours.

    Args:
        criterion: labeled loss.
        threshold: minimum confidence of a pseudo-label.
        masked: share of the patches that are hidden.
        patch_size: side of a patch, in pixels.
        scales: scales of the weak view whose predictions are averaged to the pseudo-label.
        cutmix: probability of a CutMix box in the strong view that is not masked.
        teacher_momentum: of the moving average.
        ignore_padding: leave padded pixels out of the unlabeled loss.
    """

    capturable = True

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
        ignore_padding: bool = True,
    ) -> None:
        super().__init__(criterion, teacher_momentum, threshold)
        if not 0 <= masked <= 1:
            raise UserError(f"method.masked={masked} is a share of the patches and must be in 0..1")
        if patch_size < 1:
            raise UserError(f"method.patch_size={patch_size} must be at least 1 pixel")
        check_scales(scales, "method.scales")
        self.views = Views(labeled="weak", strong=("strong",), cutmix=cutmix)
        self.masked, self.patch_size = masked, patch_size
        self.scales = scales
        self.ignore_padding = ignore_padding

    def losses(
        self, student: Student, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: Progress
    ) -> dict[str, Tensor]:
        (strong,), (box,), counted = unlabeled.strong, unlabeled.cutmix, self.counted(unlabeled)
        pseudo = self.pseudo_labels(student, unlabeled.weak, counted)
        mixed = pseudo.cutmix(box)
        logits_x, logits_s = student.joint(labeled.image, cutmix(strong, box), mixed)
        logits_m = student.unlabeled(hide_patches(strong, self.patch_size, self.masked))
        loss_x = self.criterion(logits_x, labeled.mask)
        loss_s, mask_ratio = pseudo_loss(logits_s, mixed, self.threshold, cutmix(counted, box))
        loss_lcr, _ = pseudo_loss(logits_m, pseudo, self.threshold, counted)  # of the whole image, visible or not
        parts = {"loss_x": loss_x, "loss_u_s": loss_s, "loss_u_lcr": loss_lcr, "mask_ratio": mask_ratio}
        return {"loss": (loss_x + 0.5 * loss_s + 0.5 * loss_lcr) / 2, **parts}

    def pseudo_labels(self, student: Student, image: Tensor, valid: Tensor) -> Pseudo:
        return predict_multi_scale(self.teacher, image, self.scales)


def predict_multi_scale(teacher: EMATeacher | Student, image: Tensor, scales: tuple[float, ...]) -> Pseudo:
    """Pseudo-labels from the mean of the probabilities at several scales.

    Args:
        teacher: network that predicts.
        image: (B, C, H, W).
        scales: factors of the sides of the image; no side gets smaller than MIN_SIDE.

    Returns:
        Pseudo-labels whose logits are the logarithms of the mean, so that their softmax is the mean.
    """
    total, size = 0.0, image.shape[-2:]
    for scale in scales:
        prob = teacher.predict(resize(image, scaled_size(size, scale))).logits.softmax(1)
        total = total + resize(prob, size)
    prob = total / len(scales)
    return Pseudo.of(prob.clamp(min=torch.finfo(prob.dtype).tiny).log())


def hide_patches(image: Tensor, patch_size: int, masked: float) -> Tensor:
    """Random patch sampling: set patches of each image to 0, which is the mean color of normalized images.

    Args:
        image: (B, C, H, W), normalized.
        patch_size: b, the largest side of a patch in pixels.
        masked: round(masked n) of the n = ceil(H / b) ceil(W / b) patches are hidden, chosen uniformly per image. They
            are of equal size, up to a pixel.
    """
    batch, _, height, width = image.shape
    rows, columns = math.ceil(height / patch_size), math.ceil(width / patch_size)
    rank = torch.rand(batch, rows * columns, device=image.device).argsort(1)  # a random permutation
    visible = (rank >= round(masked * rows * columns)).view(batch, 1, rows, columns)
    down = torch.arange(height, device=image.device) * rows // height
    across = torch.arange(width, device=image.device) * columns // width
    return image * visible[:, :, down[:, None], across]
