"""FixMatch (NeurIPS 2020) for segmentation, in the strong re-implementation of UniMatch (CVPR 2023)."""

from __future__ import annotations

from torch import Tensor

from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.methods.base import Criterion, Method, Progress, pseudo_loss
from allspark.models.student import Student
from allspark.pseudo_labels import Pseudo, cutmix


class FixMatch(Method):
    """Confident pseudo-labels of the weak view supervise one strong, CutMixed view.

    The pseudo-labels come from the train-mode pass over the weak view, those of the pasted region from the
    evaluation-mode pass, as released. The pasted region is from another image of the batch; UniMatch pastes from
    another crop of the same image (its issue 51).

    Args:
        criterion: labeled loss.
        threshold: minimum confidence of a pseudo-label.
        labeled_view, unlabeled_view: photometric policies of the labeled images and of the strong view.
        cutmix: probability of a CutMix box.
        ignore_padding: leave padded pixels out of the unlabeled loss.
    """

    capturable = True

    def __init__(
        self,
        criterion: Criterion,
        *,
        threshold: float = 0.95,
        labeled_view: str = "weak",
        unlabeled_view: str = "strong",
        cutmix: float = 0.5,
        ignore_padding: bool = True,
    ) -> None:
        super().__init__(criterion, threshold)
        self.views = Views(labeled=labeled_view, strong=(unlabeled_view,), cutmix=cutmix)
        self.ignore_padding = ignore_padding

    def losses(
        self, student: Student, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: Progress
    ) -> dict[str, Tensor]:
        (strong,), (box,) = unlabeled.strong, unlabeled.cutmix
        partner = student.predict(unlabeled.weak)  # evaluation mode, no gradient
        logits_x, logits_w = student.joint(labeled.image, unlabeled.weak, partner)
        logits_s = student.unlabeled(cutmix(strong, box))
        pseudo = Pseudo.of(logits_w).cutmix(box, partner)
        loss_x = self.criterion(logits_x, labeled.mask)
        loss_u, mask_ratio = pseudo_loss(logits_s, pseudo, self.threshold, cutmix(self.counted(unlabeled), box))
        return {"loss": (loss_x + loss_u) / 2, "loss_x": loss_x, "loss_u": loss_u, "mask_ratio": mask_ratio}
