"""AllSpark (CVPR 2024), and without the bottleneck the plain self-training loop it is compared with (baseline_semi)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.methods.base import Criterion, Progress, TeacherMethod, joint_forward, pseudo_loss
from allspark.methods.pseudo_labels import Pseudo, cutmix, predict_pseudo
from allspark.methods.thresholds import ClassThresholds
from allspark.models.segmentor import unwrap
from allspark.utils.errors import UserError


class AllSpark(TeacherMethod):
    """Labeled features reborn from unlabeled ones: the bottleneck does the work, the loss is plain (section 3).

    The defaults are the released code's numerics (xmed-lab/AllSpark 9da63e2, train_allspark.py).
    warmup_epochs: the memory is read from this epoch on; it is written in every step but those of a supervised start.
    pseudo_context: whose channels the pseudo-label pass sees. Released: those of the whole batch.
    ignore_padding: leave padding out of the unlabeled loss. Released: it counts.
    labeled_view, unlabeled_view: photometric policies. Released: labeled strong, unlabeled weak, no CutMix.
    cutmix: probability of a box in the unlabeled view that is learned from, labels come from the one without.
    threshold: least confidence of a pseudo-label. Released: none.
    class_thresholds: lower ones for classes that are predicted with less confidence. Released: none.
    teacher: who labels, and is evaluated: none = the student itself (Released), ema = its moving average.
    """

    def __init__(
        self,
        criterion: Criterion,
        *,
        warmup_epochs: int = 5,
        pseudo_context: Literal["batch", "image"] = "batch",
        ignore_padding: bool = False,
        labeled_view: str = "strong",
        unlabeled_view: str = "weak",
        cutmix: float = 0.0,
        threshold: float | None = None,
        class_thresholds: bool = False,
        teacher: Literal["none", "ema"] = "none",
        teacher_momentum: float = 0.996,
    ) -> None:
        super().__init__(criterion, teacher_momentum if teacher == "ema" else None, threshold)
        if class_thresholds and not threshold:
            raise UserError("method.class_thresholds=true needs the one that they begin at: set method.threshold=0.95")
        strong = (unlabeled_view,) if cutmix or unlabeled_view != "weak" else ()
        self.views = Views(labeled=labeled_view, strong=strong, cutmix=cutmix)
        self.warmup_epochs = warmup_epochs
        self.share_keys = pseudo_context == "batch"
        self.ignore_padding = ignore_padding
        self.class_wise, self.class_thresholds = class_thresholds, None

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        if self.class_wise:
            classifier = unwrap(model).decoder.classifier
            thresholds = ClassThresholds(classifier.out_channels, self.threshold)
            self.class_thresholds = thresholds.to(classifier.weight.device)

    def losses(
        self, model: nn.Module, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: Progress
    ) -> dict[str, Tensor]:
        image, valid = unlabeled.weak, unlabeled.valid | (not self.ignore_padding)
        pseudo = self.pseudo_labels(model, image, valid)
        if self.class_thresholds is not None:
            self.class_thresholds.update(pseudo, valid)
        if self.views.strong:
            box = unlabeled.cutmix[0]
            image, valid, pseudo = cutmix(unlabeled.strong[0], box), cutmix(valid, box), pseudo.cutmix(box)
        logits_x, logits_u = joint_forward(
            model,
            labeled.image,
            image,
            pseudo_logits=pseudo.logits,
            read_memory=progress.epoch >= self.warmup_epochs,
        )
        loss_x = self.criterion(logits_x, labeled.mask)
        loss_u, mask_ratio = pseudo_loss(logits_u, pseudo, self.thresholds(), valid)
        return {"loss": (loss_x + loss_u) / 2, "loss_x": loss_x, "loss_u": loss_u, "mask_ratio": mask_ratio}

    def after_step(self, model: nn.Module, progress: Progress) -> None:
        super().after_step(model, progress)
        if self.class_thresholds is not None:
            self.class_thresholds.after_step()

    def thresholds(self) -> float | Tensor | None:
        return self.threshold if self.class_thresholds is None else self.class_thresholds()

    def pseudo_labels(self, model: nn.Module, image: Tensor, valid: Tensor) -> Pseudo:
        return predict_pseudo(self.predictor(model), image, self.share_keys)
