"""How easy an unlabeled image is by what student and teacher make of it, and what is drawn from that (iMAS, CVPR 2023).

The paper's hardness is 1 - easiness. Everything stays on the images' device, nothing waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from allspark.methods.pseudo_labels import Pseudo


def easiness(student: Pseudo, teacher: Pseudo, threshold: float, background: int | None = None) -> Tensor:
    """e (B,) in 0..1: (wIoU(s|t) rho_t + wIoU(t|s) rho_s) / 2 of what both networks predict for the same images.

    wIoU(a|b) = sum_k w_k IoU_k(a, b), w_k the share of class k in b, the background left out; rho the share of the
    pixels whose confidence reaches the threshold.
    """
    num_classes = teacher.logits.shape[1]
    pairs = (student.label * num_classes + teacher.label).flatten(1)  # (B, H * W)
    ones = torch.ones_like(pairs, dtype=torch.float32)  # sums of ones are exact, in any order, up to 2^24
    counts = ones.new_zeros(len(pairs), num_classes**2).scatter_add_(1, pairs, ones)  # bincount would wait
    counts = counts.view(-1, num_classes, num_classes)  # (B, K of the student, K of the teacher)
    in_student, in_teacher, in_both = counts.sum(2), counts.sum(1), counts.diagonal(dim1=1, dim2=2)  # (B, K)
    iou = in_both / (in_student + in_teacher - in_both).clamp(min=1)
    if background is not None:
        in_student[:, background], in_teacher[:, background] = 0, 0
    # Released: without foreground in either map e is 0 / 0 -> 0, and the image is never learned from; here e = rho
    agreed = (in_student + in_teacher).sum(1) == 0

    def weighted(area: Tensor) -> Tensor:
        return torch.where(agreed, 1.0, (area * iou).sum(1) / area.sum(1).clamp(min=1))

    rho_student, rho_teacher = ((p.confidence >= threshold).float().mean((1, 2)) for p in (student, teacher))
    return (weighted(in_teacher) * rho_teacher + weighted(in_student) * rho_student) / 2


def opposite_ranks(easy: Tensor) -> Tensor:
    """(B,) -> (B,) int64, each image's partner: the k-th easiest and the k-th hardest have each other.

    The middle one of an odd batch has itself, as released: pasting changes nothing about it.
    """
    order = easy.argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, order.flip(0))


def clipped_boxes(like: Tensor) -> Tensor:
    """(B, H, W) bool for images like (B, C, H, W), True inside a box: one ratio U(0.1, 0.9) of the sides for all,

    centres of their own, uniform over the pixels from 1/16 of a side on; what reaches beyond the border is cut off.
    """
    ratio = torch.empty((), device=like.device).uniform_(0.1, 0.9)

    def inside(side: int) -> Tensor:  # (B, side)
        centre = torch.randint(side // 16, side, (len(like), 1), device=like.device)
        return (torch.arange(side, device=like.device) - centre).abs() < ratio * side / 2

    rows, columns = (inside(side) for side in like.shape[-2:])
    return rows[:, :, None] & columns[:, None, :]
