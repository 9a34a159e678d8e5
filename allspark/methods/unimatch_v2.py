"""UniMatch V2 (arXiv 2410.10777): two strong views with complementary channel dropout, labeled by an EMA teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.methods.base import Criterion, Progress, TeacherMethod, pseudo_loss
from allspark.models.student import Student
from allspark.pseudo_labels import Pseudo, cutmix
from allspark.utils.errors import UserError


class UniMatchV2(TeacherMethod):
    """The teacher's confident pseudo-labels of the weak view supervise two strong, CutMixed views.

    CutMix pastes from another image of the batch. Released: from the reversed batch, whose middle image is pasted on
    itself.

    Args:
        criterion: labeled loss.
        threshold: minimum confidence of a pseudo-label.
        cutmix: probability of a CutMix box, for each strong view.
        feature_dropout: share of the images whose features are perturbed.
        teacher_momentum: of the moving average.
        ignore_padding: leave padded pixels out of the unlabeled loss.
    """

    capturable = True

    def __init__(
        self,
        criterion: Criterion,
        *,
        threshold: float = 0.95,
        cutmix: float = 0.5,
        feature_dropout: float = 0.5,
        teacher_momentum: float = 0.996,
        ignore_padding: bool = True,
    ) -> None:
        super().__init__(criterion, teacher_momentum, threshold)
        self.views = Views(labeled="weak", strong=("strong", "strong"), cutmix=cutmix)
        self.perturb = ComplementaryDropout(feature_dropout)
        self.ignore_padding = ignore_padding

    def losses(
        self, student: Student, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: Progress
    ) -> dict[str, Tensor]:
        boxes, counted = unlabeled.cutmix, self.counted(unlabeled)
        pseudo = self.teacher.predict(unlabeled.weak)
        mixed = [pseudo.cutmix(box) for box in boxes]
        strong = torch.cat([cutmix(view, box) for view, box in zip(unlabeled.strong, boxes, strict=True)])
        logits_x, logits_s1, logits_s2 = self.student_logits(student, labeled.image, strong, Pseudo.cat(mixed))
        loss_x = self.criterion(logits_x, labeled.mask)
        loss_s1, ratio1 = pseudo_loss(logits_s1, mixed[0], self.threshold, cutmix(counted, boxes[0]))
        loss_s2, ratio2 = pseudo_loss(logits_s2, mixed[1], self.threshold, cutmix(counted, boxes[1]))
        return {
            "loss": (loss_x + (loss_s1 + loss_s2) / 2) / 2,
            "loss_x": loss_x,
            "loss_u_s1": loss_s1,
            "loss_u_s2": loss_s2,
            "mask_ratio": (ratio1 + ratio2) / 2,
        }

    def student_logits(self, student: Student, labeled: Tensor, strong: Tensor, pseudo: Pseudo) -> tuple[Tensor, ...]:
        """Logits of the labeled images and of the two strong views; only the features of the views are perturbed."""
        if not student.couples_images:  # Released: two passes, batch norm sees labeled and unlabeled images separately
            return student.labeled(labeled).logits, *student.unlabeled(strong, self.perturb).chunk(2)
        perturb = partial(self.perturb, num_labeled=len(labeled))
        logits = student.joint_output(labeled, strong, pseudo, perturb=perturb, clean=False).logits
        return logits.split((len(labeled), len(strong) // 2, len(strong) // 2))


@dataclass(frozen=True)
class ComplementaryDropout:
    """Of each image, one view keeps a random half of the channels and the other view the other half.

    m1 ~ 2 * Bernoulli(0.5) per image and channel, m2 = 2 - m1. The layers of a plain ViT share one mask, as released
    (dpt.py:149-165); the maps of a pyramid, of different widths, have their own.

    Args:
        share: share of the images that are perturbed, rounded up. The others, chosen at random, are left unchanged in
            both views and all maps.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UserError(f"method.feature_dropout={self.share} is a share of the images and must be in 0..1")

    def __call__(self, features: Sequence[Tensor], num_labeled: int = 0) -> list[Tensor]:
        """Perturb the two views in each feature map.

        Args:
            features: four maps (num_labeled + 2 B, C_i, h_i, w_i): labeled images, view 1 and view 2 of B images.
            num_labeled: number of labeled images, which are left unchanged.
        """
        batch = (len(features[0]) - num_labeled) // 2
        perturbed = torch.randperm(batch, device=features[0].device) < math.ceil(batch * self.share)
        if len({feature.shape for feature in features}) == 1:
            mask = self.draw_mask(features[0], perturbed, num_labeled)
            return [feature * mask for feature in features]
        return [feature * self.draw_mask(feature, perturbed, num_labeled) for feature in features]

    def draw_mask(self, feature: Tensor, perturbed: Tensor, num_labeled: int) -> Tensor:
        """(num_labeled + 2 B, C, 1, 1), for the feature map (num_labeled + 2 B, C, h, w); perturbed: (B,) bool."""
        mask = 2 * feature.new_empty(len(perturbed), feature.shape[1]).bernoulli_(0.5)
        mask = torch.where(perturbed[:, None], mask, 1)
        labeled = mask.new_ones(num_labeled, feature.shape[1])
        return torch.cat((labeled, mask, 2 - mask))[..., None, None]
