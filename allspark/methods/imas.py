"""iMAS (CVPR 2023): the perturbation and the weight of an unlabeled image depend on how easy it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.methods.base import Criterion, Progress, TeacherMethod, check_unlabeled_weight
from allspark.models.student import Student
from allspark.pseudo_labels import Pseudo, paste


class IMAS(TeacherMethod):
    """The more student and teacher agree on an image (easiness e near 1), the stronger it is perturbed, the more often
    it is CutMixed and the more it counts.

    CutMix pairs the weak views of an easy and a hard image. In an odd batch the middle image stays as it is (Released).

    Args:
        criterion: labeled loss.
        background: class that is left out of the easiness, None: no class. Released: class 0, which is the road on
            Cityscapes.
        threshold: minimum confidence of a pseudo-label.
        unlabeled_weight: weight of the unlabeled loss.
        labeled_view, unlabeled_view: photometric policies of the labeled images and of the strong view.
        teacher_momentum: of the moving average.
        ignore_padding: leave padded pixels out of the unlabeled loss and the easiness. Released: they count.
    """

    spec_fields = ("background",)
    uses_cutmix_partner = True

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
        ignore_padding: bool = False,
    ) -> None:
        super().__init__(criterion, teacher_momentum, threshold)
        check_unlabeled_weight(unlabeled_weight)
        self.views = Views(labeled=labeled_view, strong=(unlabeled_view,))
        self.background = background
        self.unlabeled_weight = unlabeled_weight
        self.ignore_padding = ignore_padding

    def losses(
        self, student: Student, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: Progress
    ) -> dict[str, Tensor]:
        pseudo_student = student.predict(unlabeled.weak)
        pseudo = self.teacher.predict(unlabeled.weak)
        easy = easiness(pseudo_student, pseudo, self.threshold, self.background, self.counted(unlabeled))
        image, label, confident, valid = self.perturbed(unlabeled, pseudo, easy)
        if student.couples_images:  # the joint pass has each unlabeled image once
            logits_x, _ = student.joint(labeled.image, unlabeled.weak, pseudo)
            logits_u = student.unlabeled(image)
        else:  # Released: one pass, in which the weak view only contributes to batch norm
            logits_x, logits_u = student.joint(labeled.image, torch.cat((unlabeled.weak, image)))
            logits_u = logits_u[len(easy) :]

        loss_x = self.criterion(logits_x, labeled.mask)
        counted = valid | (not self.ignore_padding)
        total = (F.cross_entropy(logits_u, label, reduction="none") * (confident & counted)).sum((1, 2))
        loss_per_image = total / counted.sum((1, 2)).clamp(min=1)  # divided by all pixels, not by the confident ones
        # A CutMixed image has the weight of the image that it was pasted into
        loss_u = (easy.repeat(len(loss_per_image) // len(easy)) * loss_per_image).mean()
        mask_ratio = (confident & counted).sum() / counted.sum().clamp(min=1)
        parts = {"loss_x": loss_x, "loss_u": loss_u, "mask_ratio": mask_ratio, "easiness": easy.mean()}
        return {"loss": loss_x + self.unlabeled_weight * loss_u, **parts}

    def after_step(self, student: Student, progress: Progress) -> None:
        """Released: through the first epoch with unlabeled images the teacher is a copy of the student."""
        copied = progress.epoch <= progress.burn_in_epochs
        self.teacher.update(student.model, 0 if copied else progress.step)

    def perturbed(self, unlabeled: UnlabeledBatch, pseudo: Pseudo, easy: Tensor) -> tuple[Tensor, ...]:
        """Images with an intensity according to their easiness, and with probability mean(e) CutMixed ones as well.

        Args:
            unlabeled: B images with one strong view. A batch of one image is never CutMixed.
            pseudo: the teacher's pseudo-labels of the weak view.
            easy: (B,), easiness of each image.

        Returns:
            Images (B or 2 B, C, H, W), their labels, which pixels are confident and which are valid (B or 2 B, H, W).
        """
        weak, confident = unlabeled.weak, pseudo.confidence >= self.threshold
        targets = pseudo.label, confident, unlabeled.valid
        intensity = torch.lerp(weak, unlabeled.strong[0], easy.view(-1, 1, 1, 1))
        if len(easy) == 1 or torch.rand((), device=easy.device) >= easy.mean():  # the only host sync of the step
            return intensity, *targets
        partner, box = opposite_ranks(easy), clipped_boxes(weak)
        mixed = (paste(part, box, part[partner]) for part in (weak, *targets))
        return tuple(torch.cat(pair) for pair in zip((intensity, *targets), mixed, strict=True))


def easiness(
    student: Pseudo,
    teacher: Pseudo,
    threshold: float,
    background: int | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Easiness of each image, 1 - hardness of the paper; computed on the device, without a host sync.

    e = (wIoU(s|t) rho_t + wIoU(t|s) rho_s) / 2 with wIoU(a|b) = sum_k w_k IoU_k(a, b), where w_k is the share of class
    k in b, without the background, and rho the share of the pixels whose confidence reaches the threshold.

    Args:
        student, teacher: predictions of both networks for the same B images.
        threshold: minimum confidence.
        background: class to leave out; None: no class.
        counted: (B, H, W) bool, the pixels that count; None: all.

    Returns:
        (B,) in 0..1.
    """
    num_classes = teacher.logits.shape[1]
    counted = torch.ones_like(teacher.label, dtype=torch.bool) if counted is None else counted
    pairs = (student.label * num_classes + teacher.label).flatten(1)  # (B, H * W)
    ones = counted.flatten(1).float()  # sums of ones are exact, in any order, up to 2^24
    counts = ones.new_zeros(len(pairs), num_classes**2).scatter_add_(1, pairs, ones)  # bincount would sync
    counts = counts.view(-1, num_classes, num_classes)  # (B, K of the student, K of the teacher)
    in_student, in_teacher, in_both = counts.sum(2), counts.sum(1), counts.diagonal(dim1=1, dim2=2)  # (B, K)
    iou = in_both / (in_student + in_teacher - in_both).clamp(min=1)
    if background is not None:
        in_student[:, background], in_teacher[:, background] = 0, 0
    # Released: without foreground in either map e is 0 / 0 -> 0 and the image is never learned from; here e = rho
    no_foreground = (in_student + in_teacher).sum(1) == 0

    def weighted_iou(area: Tensor) -> Tensor:
        return torch.where(no_foreground, 1.0, (area * iou).sum(1) / area.sum(1).clamp(min=1))

    total = ones.sum(1).clamp(min=1)
    rho_student, rho_teacher = (((p.confidence >= threshold) & counted).sum((1, 2)) / total for p in (student, teacher))
    return (weighted_iou(in_teacher) * rho_teacher + weighted_iou(in_student) * rho_student) / 2


def opposite_ranks(easy: Tensor) -> Tensor:
    """CutMix partner of each image, (B,) -> (B,) int64: the k-th easiest and the k-th hardest image are partners.

    The middle image of an odd batch is its own partner, as released: pasting does not change it.
    """
    order = easy.argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, order.flip(0))


def clipped_boxes(images: Tensor) -> Tensor:
    """One box per image (B, C, H, W): (B, H, W) bool, True inside.

    All boxes have the same ratio U(0.1, 0.9) to the sides. Centers are uniform from 1/16 of each side; boxes are
    clipped at the border.
    """
    ratio = torch.empty((), device=images.device).uniform_(0.1, 0.9)

    def inside(side: int) -> Tensor:  # (B, side)
        center = torch.randint(side // 16, side, (len(images), 1), device=images.device)
        return (torch.arange(side, device=images.device) - center).abs() < ratio * side / 2

    rows, columns = (inside(side) for side in images.shape[-2:])
    return rows[:, :, None] & columns[:, None, :]
