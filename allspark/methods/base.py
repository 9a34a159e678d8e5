"""The interface of a method, and the one way of training with the AllSpark bottleneck."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.losses import consistency_loss
from allspark.methods.ema import EMATeacher
from allspark.methods.pseudo_labels import Pseudo, predict_pseudo
from allspark.models.bottleneck import CrossBatch
from allspark.models.segmentor import Perturb, SegOutput, unwrap
from allspark.utils.errors import UserError

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Progress:
    """Where the run stands: optimizer step and epoch, both counted from 0, and the number of steps of the whole run."""

    step: int
    epoch: int
    total_steps: int


class Method(nn.Module, ABC):
    """Batches -> losses. A module, so that its state (teachers, thresholds) is checkpointed and moved like any other.

    The keyword-only arguments of a subclass are its options, `method.*` in a recipe. `criterion(logits, mask)` is the
    labeled loss of the recipe, `threshold` the least confidence of a pseudo-label that is learned from. A method sees
    no loader, optimizer, writer, rank or checkpoint.
    """

    views = Views()
    mixes = False  # whether it pastes images into each other where the loader has no box for them
    takes_bottleneck = True  # False: a model with one is refused
    facts: tuple[str, ...] = ()  # fields of DatasetSpec that the constructor takes beside its options

    def __init__(self, criterion: Criterion, threshold: float | None = None) -> None:
        super().__init__()
        if threshold is not None and not 0 <= threshold <= 1:  # 95 would keep no pixel, and say nothing
            raise UserError(f"method.threshold={threshold} is a probability and must be in 0..1")
        self.criterion, self.threshold = criterion, threshold

    def attach(self, model: nn.Module) -> None:
        """Once, before a checkpoint is loaded, the optimizer is built and DDP wraps the model (a Segmentor).

        Teachers are born here, and modules that the method trains beside the decoder are put into model.heads.
        """

    @abstractmethod
    def losses(
        self, model: nn.Module, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: Progress
    ) -> dict[str, Tensor]:
        """One training step: "loss" to descend on, and its parts to log."""

    def after_step(self, model: nn.Module, progress: Progress) -> None:
        """Once per optimizer step, also after one that was skipped, which left the network as it was."""

    def predictor(self, model: nn.Module) -> nn.Module:
        """The network that is evaluated and saved as the result."""
        return unwrap(model)

    def pseudo_labels(self, model: nn.Module, image: Tensor, valid: Tensor) -> Pseudo:
        """What the method would teach on images (B, 3, H, W), valid (B, H, W) as in UnlabeledBatch; changes nothing.

        Training measures it on unlabeled images whose labels are known to others. Labels of a train-mode pass, as
        FixMatch's, depend on the rest of the batch: for them this is the evaluation-mode pass.
        """
        return predict_pseudo(self.predictor(model), image)

    def thresholds(self) -> float | Tensor | None:
        """Least confidence of a pseudo-label that is learned from: for all classes, or (K,) for each; None: none."""
        return self.threshold

    def supervised_losses(self, model: nn.Module, labeled: LabeledBatch) -> dict[str, Tensor]:
        """The labeled loss alone: supervised training, and the supervised start of every other method."""
        loss = self.criterion(model(labeled.image).logits, labeled.mask)
        return {"loss": loss, "loss_x": loss}


class TeacherMethod(Method):
    """A method with an EMA teacher, which makes its labels, is evaluated and is saved as the result.

    It owns no memory of the bottleneck: what it sees of an image are the image's own channels (AllSpark's
    pseudo_context=batch: with those of its batch mates). With teacher_momentum=None the student stands for it.
    """

    def __init__(self, criterion: Criterion, teacher_momentum: float | None, threshold: float | None = None) -> None:
        super().__init__(criterion, threshold)
        if teacher_momentum is not None and not 0 <= teacher_momentum < 1:  # one that keeps all of itself never learns
            raise UserError(f"method.teacher_momentum={teacher_momentum} must be at least 0 and below 1")
        self.teacher_momentum = teacher_momentum
        self.teacher: EMATeacher | None = None

    def attach(self, model: nn.Module) -> None:
        if self.teacher_momentum is not None:
            self.teacher = EMATeacher(unwrap(model).inference_copy(), self.teacher_momentum)

    def after_step(self, model: nn.Module, progress: Progress) -> None:
        if self.teacher is not None:
            self.teacher.update(unwrap(model), progress.step)

    def predictor(self, model: nn.Module) -> nn.Module:
        return unwrap(model) if self.teacher is None else self.teacher.model


def check_weight(unlabeled_weight: float) -> None:
    """Of the unlabeled loss: a negative one would train away from the labels, and say nothing."""
    if not unlabeled_weight >= 0:  # nan, too
        raise UserError(f"method.unlabeled_weight={unlabeled_weight} must be at least 0")


def pseudo_loss(
    logits: Tensor, pseudo: Pseudo, threshold: float | Tensor | None, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """consistency_loss on the pixels whose pseudo-label has a probability of at least threshold (None: on all).

    threshold: one for all, or (K,) one for each class.
    """
    least = threshold[pseudo.label] if isinstance(threshold, Tensor) else threshold
    keep = None if least is None else pseudo.confidence >= least
    return consistency_loss(logits, pseudo.label, keep, valid)


def joint_forward(
    model: nn.Module,
    labeled: Tensor,
    unlabeled: Tensor,
    *,
    pseudo_logits: Tensor | None = None,
    read_memory: bool = False,
) -> tuple[Tensor, Tensor]:
    """Labeled and unlabeled images in one pass -> their logits. With a bottleneck this is the step's one enqueue.

    pseudo_logits: evaluation logits of `unlabeled`, from the method's own pseudo pass; without one it is made here.
    """
    logits = joint_output(model, labeled, unlabeled, pseudo_logits=pseudo_logits, read_memory=read_memory).logits
    return logits.split((len(labeled), len(unlabeled)))  # not two slices, whose gradients would be added up


def joint_output(
    model: nn.Module,
    labeled: Tensor,
    unlabeled: Tensor,
    *,
    pseudo_logits: Tensor | None = None,
    read_memory: bool = False,
    perturb: Perturb | None = None,
    clean: bool = True,
) -> SegOutput:
    """joint_forward for who needs more than logits: all that the pass gives, labeled images first."""
    cross = None
    if unwrap(model).bottleneck is not None:
        if pseudo_logits is None:
            pseudo_logits = predict_pseudo(model, unlabeled).logits
        cross = CrossBatch(len(labeled), pseudo_logits, read_memory)
    return model(torch.cat((labeled, unlabeled)), cross=cross, perturb=perturb, clean=clean)


def unlabeled_forward(model: nn.Module, image: Tensor) -> Tensor:
    """Logits of a later pass of the step, without labeled images; of a bottleneck its unlabeled branch, no write."""
    cross = None if unwrap(model).bottleneck is None else CrossBatch(num_labeled=0)
    return model(image, cross=cross).logits
