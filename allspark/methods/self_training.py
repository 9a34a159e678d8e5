"""Self-training: the network learns from its own pseudo-labels of unlabeled images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from allspark import distributed
from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.methods.base import Criterion, Progress, TeacherMethod, pseudo_loss
from allspark.models.segmentor import Segmentor
from allspark.models.student import Student
from allspark.pseudo_labels import Pseudo, cutmix
from allspark.utils.errors import UserError

BINS = 200  # of a histogram of confidences in 0..1


class SelfTraining(TeacherMethod):
    """Pseudo-labels of the weak view supervise the unlabeled images.

    The defaults are the numerics of the released baseline_semi (xmed-lab/AllSpark 9da63e2).

    Args:
        criterion: labeled loss.
        ignore_padding: leave padded pixels out of the unlabeled loss. The released code trains on them, too.
        labeled_view: photometric policy of the labeled images.
        unlabeled_view: photometric policy of the view that is learned from. Released: the weak view itself.
        cutmix: probability of a CutMix box in that view. Released: none.
        threshold: minimum confidence of a pseudo-label. Released: none.
        class_thresholds: lower thresholds for classes that are predicted with less confidence. Released: none.
        teacher: none: the student labels for itself and is evaluated (Released); ema: its moving average.
        teacher_momentum: of the moving average.
    """

    capturable = True

    def __init__(
        self,
        criterion: Criterion,
        *,
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
            raise UserError("method.class_thresholds=true needs a threshold to start from: set method.threshold=0.95")
        strong = (unlabeled_view,) if cutmix or unlabeled_view != "weak" else ()
        self.views = Views(labeled=labeled_view, strong=strong, cutmix=cutmix)
        self.ignore_padding = ignore_padding
        self.use_class_thresholds, self.class_thresholds = class_thresholds, None

    def attach(self, model: Segmentor) -> None:
        super().attach(model)
        if self.use_class_thresholds:
            classifier = model.decoder.classifier
            thresholds = ClassThresholds(classifier.out_channels, self.threshold)
            self.class_thresholds = thresholds.to(classifier.weight.device)

    def losses(
        self, student: Student, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: Progress
    ) -> dict[str, Tensor]:
        image, counted = unlabeled.weak, self.counted(unlabeled)
        pseudo = self.pseudo_labels(student, image, counted)
        if self.class_thresholds is not None:
            self.class_thresholds.update(pseudo, counted)
        if self.views.strong:
            (strong,), (box,) = unlabeled.strong, unlabeled.cutmix
            image, counted, pseudo = cutmix(strong, box), cutmix(counted, box), pseudo.cutmix(box)
        logits_x, logits_u = student.joint(labeled.image, image, pseudo)
        loss_x = self.criterion(logits_x, labeled.mask)
        loss_u, mask_ratio = pseudo_loss(logits_u, pseudo, self.thresholds(), counted)
        return {"loss": (loss_x + loss_u) / 2, "loss_x": loss_x, "loss_u": loss_u, "mask_ratio": mask_ratio}

    def after_step(self, student: Student, progress: Progress) -> None:
        super().after_step(student, progress)
        if self.class_thresholds is not None:
            self.class_thresholds.after_step()

    def thresholds(self) -> float | Tensor | None:
        return self.threshold if self.class_thresholds is None else self.class_thresholds()


class ClassThresholds(nn.Module):
    """A threshold per class, so that no class is left without pseudo-labels (CBST, ECCV 2018, on running counts).

    Each class keeps the same share of its pixels that `threshold` keeps of all pixels: where `threshold` keeps half of
    all pixels, a class gets the median of its own confidences. No class gets more than `threshold`. With one threshold
    for all classes, a difficult class has no confident pixels: the network learns only the wrong labels of its pixels,
    and the class disappears.

    Args:
        num_classes: K.
        threshold: threshold for all classes together.
        momentum: weight of the counts of the previous steps.

    Buffers:
        histogram: (K, BINS), confidences of the pixels predicted as each class, over all processes. BINS is the
            resolution of the thresholds.
    """

    histogram: Tensor

    def __init__(self, num_classes: int, threshold: float, momentum: float = 0.99) -> None:
        super().__init__()
        self.threshold, self.momentum = threshold, momentum
        self.register_buffer("histogram", torch.zeros(num_classes, BINS))

    @torch.no_grad()
    def update(self, pseudo: Pseudo, valid: Tensor) -> None:
        """Count the pseudo-labels of one pass where valid (B, H, W) is True; NaN confidences are not counted."""
        bins = (pseudo.confidence.float().nan_to_num(0.0) * BINS).long().clamp(max=BINS - 1)
        cells, counts = pseudo.label * BINS + bins, torch.zeros_like(self.histogram)
        counted = valid & pseudo.confidence.isfinite()
        counts.view(-1).index_add_(0, cells.flatten(), counted.flatten().float())
        self.histogram.add_(distributed.all_reduce_sum(counts))

    @torch.no_grad()
    def after_step(self) -> None:
        """Decay the counts, once per optimizer step however many passes it has."""
        self.histogram.mul_(self.momentum)

    def forward(self) -> Tensor:
        """The thresholds (K,); `threshold` for a class that was never predicted."""
        above = self.histogram.flip(1).cumsum(1).flip(1)  # (K, BINS): pixels in each bin and above
        total = above[:, :1]
        share = above[:, min(round(self.threshold * BINS), BINS - 1)].sum() / total.sum().clamp(min=1)
        enough = above >= share * total
        edges = torch.arange(BINS, device=above.device) / BINS
        highest = torch.where(enough, edges, 0.0).amax(1)  # the highest edge above which the share is reached
        return highest.where(total[:, 0] > 0, self.threshold).clamp(max=self.threshold)
