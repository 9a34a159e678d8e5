"""UniMatch (CVPR 2023): FixMatch with two strong views and a stream of perturbed features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.methods.base import Criterion, Method, Progress, pseudo_loss
from allspark.models.student import Student
from allspark.pseudo_labels import Pseudo, cutmix
from allspark.utils.errors import UserError


class UniMatch(Method):
    """Confident pseudo-labels of the weak view supervise two strong, CutMixed views and the weak view's perturbed
    features.

    Pseudo-labels and CutMix are those of FixMatch. The pseudo-labels of the perturbed features are not CutMixed.

    Args:
        criterion: labeled loss.
        threshold: minimum confidence of a pseudo-label.
        cutmix: probability of a CutMix box, for each strong view.
        feature_dropout: probability of a channel to be dropped.
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
        ignore_padding: bool = True,
    ) -> None:
        super().__init__(criterion, threshold)
        self.views = Views(labeled="weak", strong=("strong", "strong"), cutmix=cutmix)
        self.perturb = FeatureDropout(feature_dropout)
        self.ignore_padding = ignore_padding

    def losses(
        self, student: Student, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: Progress
    ) -> dict[str, Tensor]:
        boxes, counted = unlabeled.cutmix, self.counted(unlabeled)
        partner = student.predict(unlabeled.weak)  # evaluation mode, no gradient
        out = student.joint_output(labeled.image, unlabeled.weak, partner, perturb=self.perturb)
        sizes = len(labeled.image), len(unlabeled.weak)
        (logits_x, logits_w), (_, logits_fp) = out.logits.split(sizes), out.perturbed.split(sizes)
        strong = [cutmix(view, box) for view, box in zip(unlabeled.strong, boxes, strict=True)]
        logits_s1, logits_s2 = student.unlabeled(torch.cat(strong)).chunk(2)

        pseudo = Pseudo.of(logits_w)
        loss_x = self.criterion(logits_x, labeled.mask)
        loss_s1, loss_s2 = (
            pseudo_loss(logits, pseudo.cutmix(box, partner), self.threshold, cutmix(counted, box))[0]
            for logits, box in zip((logits_s1, logits_s2), boxes, strict=True)
        )
        loss_fp, mask_ratio = pseudo_loss(logits_fp, pseudo, self.threshold, counted)
        return {
            "loss": (loss_x + 0.25 * loss_s1 + 0.25 * loss_s2 + 0.5 * loss_fp) / 2,
            "loss_x": loss_x,
            "loss_u_s1": loss_s1,
            "loss_u_s2": loss_s2,
            "loss_u_fp": loss_fp,
            "mask_ratio": mask_ratio,
        }


@dataclass(frozen=True)
class FeatureDropout:
    """Channel dropout on the finest and the deepest feature map, the two inputs of UniMatch's decoder.

    Args:
        rate: probability of a channel to be 0 in one image; the remaining channels are divided by 1 - rate.
    """

    rate: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise UserError(f"method.feature_dropout={self.rate} is a rate and must be at least 0 and below 1")

    def __call__(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (B, C_i, h_i, w_i), finest first -> four maps of the same shapes."""
        finest, *others, deepest = features
        return [F.dropout2d(finest, self.rate), *others, F.dropout2d(deepest, self.rate)]
