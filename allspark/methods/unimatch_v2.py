"""UniMatch V2 (arXiv 2410.10777): two strong views, the channels of their features split between them; EMA teacher."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.methods.base import Criterion, Progress, TeacherMethod, joint_output, pseudo_loss
from allspark.methods.perturb import ComplementaryDropout
from allspark.methods.pseudo_labels import Pseudo, cutmix, predict_pseudo
from allspark.models.segmentor import unwrap


class UniMatchV2(TeacherMethod):
    """The teacher's confident labels of the weak view supervise two strong, CutMixed views with complementary channels.

    The partner is another image of the batch. Released: the reversed batch, whose middle image is pasted on itself.
    With a bottleneck both strong views write the memory, in the one pass that has the labeled images, too.
    feature_dropout: share of the images whose features are perturbed.
    """

    def __init__(
        self,
        criterion: Criterion,
        *,
        threshold: float = 0.95,
        cutmix: float = 0.5,
        feature_dropout: float = 0.5,
        teacher_momentum: float = 0.996,
        warmup_epochs: int = 5,
        ignore_padding: bool = True,
    ) -> None:
        super().__init__(criterion, teacher_momentum, threshold)
        self.views = Views(labeled="weak", strong=("strong", "strong"), cutmix=cutmix)
        self.perturb = ComplementaryDropout(feature_dropout)
        self.warmup_epochs = warmup_epochs  # of the memory, where the model has a bottleneck
        self.ignore_padding = ignore_padding

    def losses(
        self, model: nn.Module, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: Progress
    ) -> dict[str, Tensor]:
        boxes, valid = unlabeled.cutmix, unlabeled.valid | (not self.ignore_padding)
        pseudo = predict_pseudo(self.teacher.model, unlabeled.weak)
        mixed = [pseudo.cutmix(box) for box in boxes]
        strong = torch.cat([cutmix(view, box) for view, box in zip(unlabeled.strong, boxes, strict=True)])
        read_memory = progress.epoch >= self.warmup_epochs
        logits_x, logits_s1, logits_s2 = self.student(model, labeled.image, strong, mixed, read_memory)
        loss_x = self.criterion(logits_x, labeled.mask)
        loss_s1, ratio1 = pseudo_loss(logits_s1, mixed[0], self.threshold, cutmix(valid, boxes[0]))
        loss_s2, ratio2 = pseudo_loss(logits_s2, mixed[1], self.threshold, cutmix(valid, boxes[1]))
        return {
            "loss": (loss_x + (loss_s1 + loss_s2) / 2) / 2,
            "loss_x": loss_x,
            "loss_u_s1": loss_s1,
            "loss_u_s2": loss_s2,
            "mask_ratio": (ratio1 + ratio2) / 2,
        }

    def student(
        self, model: nn.Module, labeled: Tensor, strong: Tensor, mixed: list[Pseudo], read_memory: bool
    ) -> tuple[Tensor, ...]:
        """Logits of the labeled images and of the strong views 1 and 2; the views alone are perturbed.

        Without a bottleneck in two passes, as released: batch norm sees labeled and unlabeled images apart.
        """
        if unwrap(model).bottleneck is None:
            return model(labeled).logits, *model(strong, perturb=self.perturb, clean=False).logits.chunk(2)
        logits = joint_output(
            model,
            labeled,
            strong,
            pseudo_logits=torch.cat([pseudo.logits for pseudo in mixed]),
            read_memory=read_memory,
            perturb=partial(self.perturb, num_labeled=len(labeled)),
            clean=False,
        ).logits
        return logits.split((len(labeled), len(strong) // 2, len(strong) // 2))
