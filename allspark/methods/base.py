"""The interface of a training method, and what the methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.losses import consistency_loss
from allspark.methods.ema import EMATeacher
from allspark.models.segmentor import Segmentor
from allspark.models.student import Student
from allspark.pseudo_labels import Pseudo, confident
from allspark.utils.errors import UserError

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Progress:
    """Where training is.

    Args:
        step: optimizer step, from 0.
        epoch: of the step, from 0.
        total_steps: of the whole run.
        burn_in_epochs: supervised epochs at its start.
    """

    step: int
    epoch: int
    total_steps: int
    burn_in_epochs: int = 0


class Method(nn.Module, ABC):
    """Turns a labeled and an unlabeled batch into losses.

    A module, so that its state (teachers, thresholds) is saved in checkpoints and moved between devices. It has no
    access to the loader, the optimizer, the rank, the logs or the checkpoints. The keyword-only arguments of a
    subclass are its options, `method.*` in a recipe.

    Args:
        criterion: labeled loss, (logits (B, K, H, W), mask (B, H, W)) -> scalar.
        threshold: minimum confidence of a pseudo-label; None: all pseudo-labels are used.
    """

    views = Views()
    # Whether steps may be replayed as a CUDA graph: losses() uses no values on the host, no randomness of the host and
    # not `progress`. Each class states it for itself.
    capturable = False
    uses_cutmix_partner = False  # pastes images of the batch into each other without boxes from the loader
    spec_fields: tuple[str, ...] = ()  # fields of DatasetSpec that the constructor takes in addition to its options
    ignore_padding = True  # leave padded pixels out of the unlabeled loss

    def __init__(self, criterion: Criterion, threshold: float | None = None) -> None:
        super().__init__()
        if threshold is not None and not 0 <= threshold <= 1:  # 95 would silently leave no pixel
            raise UserError(f"method.threshold={threshold} is a probability and must be in 0..1")
        self.criterion, self.threshold = criterion, threshold

    def attach(self, model: Segmentor) -> None:
        """Create teachers, and put modules that are trained in addition to the decoder into model.heads.

        Called once, before a checkpoint is loaded, the optimizer is built and DDP wraps the model.
        """

    @abstractmethod
    def losses(
        self, student: Student, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: Progress
    ) -> dict[str, Tensor]:
        """The losses of one forward pass.

        Args:
            student: the network.
            labeled: images (B, C, H, W) with masks.
            unlabeled: views of as many unlabeled images; None if `views.unlabeled` is False.
            progress: where training is.

        Returns:
            Scalars by name: "loss" is minimized, all entries are logged.
        """

    def after_step(self, student: Student, progress: Progress) -> None:
        """Called after each optimizer step, including skipped ones, which left the network unchanged."""

    def predictor(self, model: Segmentor) -> nn.Module:
        """The network that is evaluated and saved as the result."""
        return model

    def pseudo_labels(self, student: Student, image: Tensor, valid: Tensor) -> Pseudo:
        """Pseudo-labels as this method makes them; used to measure their quality. Changes no state.

        Methods that label with a train-mode pass, such as FixMatch, are represented by the evaluation-mode pass: a
        train-mode label depends on the rest of the batch.

        Args:
            student: the network.
            image: (B, C, H, W), the weak view.
            valid: (B, H, W) bool, False on padding.
        """
        return student.predict(image)

    def thresholds(self) -> float | Tensor | None:
        """Minimum confidence of a pseudo-label: one for all classes, (K,) one per class, or None."""
        return self.threshold

    def supervised_losses(self, student: Student, labeled: LabeledBatch) -> dict[str, Tensor]:
        """The labeled loss alone, for supervised training and for the burn-in epochs of every other method."""
        loss = self.criterion(student.labeled(labeled.image).logits, labeled.mask)
        return {"loss": loss, "loss_x": loss}

    def counted(self, unlabeled: UnlabeledBatch) -> Tensor:
        """(B, H, W) bool: pixels that count in the unlabeled loss."""
        return unlabeled.valid | (not self.ignore_padding)


class TeacherMethod(Method):
    """A method whose pseudo-labels come from an EMA teacher, which is also evaluated and saved as the result.

    Args:
        criterion: the labeled loss.
        teacher_momentum: of the moving average; None: no teacher, the student labels for itself.
        threshold: as for Method.
    """

    def __init__(self, criterion: Criterion, teacher_momentum: float | None, threshold: float | None = None) -> None:
        super().__init__(criterion, threshold)
        if teacher_momentum is not None and not 0 <= teacher_momentum < 1:  # at 1 the teacher would never change
            raise UserError(f"method.teacher_momentum={teacher_momentum} must be at least 0 and below 1")
        self.teacher_momentum = teacher_momentum
        self.teacher: EMATeacher | None = None

    def attach(self, model: Segmentor) -> None:
        if self.teacher_momentum is not None:
            self.teacher = EMATeacher(model.inference_copy(), self.teacher_momentum)

    def after_step(self, student: Student, progress: Progress) -> None:
        if self.teacher is not None:
            self.teacher.update(student.model, progress.step)

    def predictor(self, model: Segmentor) -> nn.Module:
        return model if self.teacher is None else self.teacher.model

    def pseudo_labels(self, student: Student, image: Tensor, valid: Tensor) -> Pseudo:
        return (self.teacher or student).predict(image)


def check_unlabeled_weight(weight: float) -> None:
    """UserError for a negative weight of the unlabeled loss, which would train away from the pseudo-labels."""
    if not weight >= 0:  # also refuses nan
        raise UserError(f"method.unlabeled_weight={weight} must be at least 0")


def pseudo_loss(
    logits: Tensor, pseudo: Pseudo, threshold: float | Tensor | None, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy against confident pseudo-labels.

    Args:
        logits: (B, K, H, W).
        pseudo: pseudo-labels of the same images.
        threshold: minimum confidence, one for all classes or (K,) one per class; None: all pixels are used.
        valid: (B, H, W) bool, pixels that count in the denominator.

    Returns:
        The loss and the share of valid pixels that were used (mask_ratio), both scalars.
    """
    return consistency_loss(logits, pseudo.label, confident(pseudo.label, pseudo.confidence, threshold), valid)
