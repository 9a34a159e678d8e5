"""PseudoSeg (ICLR 2021): soft labels fused from the decoder and a refined Grad-CAM of the same network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.losses import consistency_loss
from allspark.methods.base import Criterion, Method, Progress, check_unlabeled_weight
from allspark.methods.pseudoseg_cam import ImageClassifier, SelfAttentionCAM, present_classes
from allspark.models.eval_mode import eval_mode
from allspark.models.segmentor import Segmentor
from allspark.models.student import Student
from allspark.pseudo_labels import Pseudo
from allspark.utils.errors import UserError

CUTOUT = 50 / 513  # half the side of the cut-out square, as a share of the crop's side. Released: 50 px at 513


class PseudoSeg(Method):
    """One network without teacher and threshold; an image classifier and SGC are trained in addition to the decoder.

    The consistency loss is computed at the size of the image, as in every method here. Released: at stride 4, which
    differs by bilinear interpolation at edges; padding and the cut-out square are exact only here.

    Args:
        criterion: labeled loss.
        background: class that the image classifier does not predict; None: it predicts all classes.
        gamma: weight of the decoder's probabilities in the soft label; SGC has the rest.
        temperature: of the sharpening of the soft label; 1: none.
        unlabeled_weight: weight of the unlabeled loss.
        labeled_view, unlabeled_view: photometric policies of the labeled images and of the strong view.
    """

    capturable = True
    spec_fields = ("background",)

    def __init__(
        self,
        criterion: Criterion,
        background: int | None = None,
        *,
        gamma: float = 0.5,
        temperature: float = 0.5,
        unlabeled_weight: float = 1.0,
        labeled_view: str = "weak",
        unlabeled_view: str = "pseudoseg",
    ) -> None:
        super().__init__(criterion)
        if not 0 <= gamma <= 1:
            raise UserError(f"method.gamma={gamma} is a share and must be in 0..1")
        if not temperature > 0:
            raise UserError(f"method.temperature={temperature} must be above 0; 1 does not sharpen")
        check_unlabeled_weight(unlabeled_weight)
        self.views = Views(labeled=labeled_view, strong=(unlabeled_view,))
        self.background = background
        self.gamma, self.temperature = gamma, temperature
        self.unlabeled_weight = unlabeled_weight

    def attach(self, model: Segmentor) -> None:
        channels, classifier = model.encoder.channels[-2:], model.decoder.classifier
        num_classes, has_background = classifier.out_channels, self.background is not None
        if num_classes == has_background:
            raise UserError(
                "pseudoseg's image classifier predicts which classes an image shows, and this data set has only the "
                "background class; set data.custom.background to none, or choose another method"
            )
        model.heads["classifier"] = ImageClassifier(channels[-1], num_classes - has_background)
        model.heads["sgc"] = SelfAttentionCAM(
            channels, num_classes, has_background, multiple=model.multiple, align_corners=model.decoder.align_corners
        )
        model.heads.to(classifier.weight.device)

    def losses(
        self, student: Student, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: Progress
    ) -> dict[str, Tensor]:
        strong, hole = cut_out(unlabeled.strong[0])
        counted = unlabeled.valid & ~hole
        pseudo, soft_label = self.soft_labels(student, unlabeled.weak, counted)
        logits_x, features, logits_u = self.student_output(student, labeled.image, strong, pseudo)
        losses = self.labeled_losses(student, logits_x, features, labeled.mask)
        loss_u, _ = consistency_loss(logits_u, soft_label, None, counted)
        return {"loss": sum(losses.values()) + self.unlabeled_weight * loss_u, **losses, "loss_u": loss_u}

    def student_output(
        self, student: Student, labeled: Tensor, strong: Tensor, pseudo: Pseudo
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Logits and last two feature maps of the labeled images, and logits of the strong view."""
        if not student.couples_images:  # Released: two passes, batch norm sees labeled and unlabeled images separately
            out = student.labeled(labeled)
            return out.logits, out.features[-2:], student.unlabeled(strong)
        out = student.joint_output(labeled, strong, pseudo)
        logits_x, logits_u = out.logits.split((len(labeled), len(strong)))
        return logits_x, [feature[: len(labeled)] for feature in out.features[-2:]], logits_u

    def supervised_losses(self, student: Student, labeled: LabeledBatch) -> dict[str, Tensor]:
        out = student.labeled(labeled.image)
        losses = self.labeled_losses(student, out.logits, out.features[-2:], labeled.mask)
        return {"loss": sum(losses.values()), **losses}

    def labeled_losses(
        self, student: Student, logits: Tensor, features: list[Tensor], mask: Tensor
    ) -> dict[str, Tensor]:
        """Losses of the decoder, of SGC given the true classes of each image, and of the image classifier.

        Args:
            student: the network, for its heads.
            logits: (B, K, H, W), of the decoder.
            features: the last two feature maps (B, C_i, h_i, w_i).
            mask: (B, H, W) int64, the labels.
        """
        heads, num_classes = student.model.heads, logits.shape[1]
        present = present_classes(mask, num_classes, self.background)
        cam = heads["classifier"].grad_cam(features[-1], present)
        sgc_logits = heads["sgc"](features, cam, mask < num_classes)  # excludes padding, too
        loss_cls = F.binary_cross_entropy_with_logits(heads["classifier"](features[-1]), present)
        loss_x, loss_sgc = self.criterion(logits, mask), self.criterion(sgc_logits, mask)
        return {"loss_x": loss_x, "loss_sgc": loss_sgc, "loss_cls": loss_cls}

    def soft_labels(self, student: Student, weak: Tensor, valid: Tensor) -> tuple[Pseudo, Tensor]:
        """Pseudo-labels of the decoder alone, and the fused soft labels (B, K, H, W).

        Args:
            student: the network.
            weak: (B, C, H, W), the weak view.
            valid: (B, H, W) bool, what self-attention may look at; also without the strong view's square (Released).
        """
        network = student.model
        with eval_mode(network):
            out, heads = network(weak), network.heads
            present = (heads["classifier"](out.features[-1]) >= 0).float()  # sigmoid >= 0.5
            cam = heads["classifier"].grad_cam(out.features[-1], present)
            sgc_logits = heads["sgc"](out.features[-2:], cam, valid)
            return Pseudo.of(out.logits), fuse(out.logits, sgc_logits, self.gamma, self.temperature)

    def pseudo_labels(self, student: Student, image: Tensor, valid: Tensor) -> Pseudo:
        return Pseudo.of(self.soft_labels(student, image, valid)[1].log())  # the softmax of the log is the soft label


def fuse(logits: Tensor, sgc_logits: Tensor, gamma: float, temperature: float) -> Tensor:
    """Calibrated fusion of two logit maps into soft labels.

    Both maps are divided by their common root mean square; their softmaxes are averaged and sharpened. Released: one
    root mean square for the batch; here one per image, so that images do not influence each other.

    Args:
        logits: (B, K, H, W), of the decoder.
        sgc_logits: (B, K, H, W), of SGC.
        gamma: weight of the decoder.
        temperature: T of the sharpening, p ** (1 / T) / sum.

    Returns:
        Probabilities (B, K, H, W).
    """
    mean_square = torch.stack([x.square().mean((1, 2, 3)) for x in (logits, sgc_logits)]).mean(0)
    scale = (mean_square + 1e-8).rsqrt().view(-1, 1, 1, 1)
    prob = torch.lerp((sgc_logits * scale).softmax(1), (logits * scale).softmax(1), gamma)
    return (prob.log() / temperature).softmax(1)  # p ** (1 / T) / sum


def cut_out(image: Tensor) -> tuple[Tensor, Tensor]:
    """Set one square of each image (B, C, H, W) to 0, the mean color; it may be centered anywhere and is clipped.

    Returns:
        The images, and where the squares are, (B, H, W) bool.
    """
    sides = []
    for size in image.shape[-2:]:
        half = round(CUTOUT * size)
        offset = torch.arange(size, device=image.device) - torch.randint(size, (len(image), 1), device=image.device)
        sides.append((offset >= -half) & (offset < half))  # (B, size)
    hole = sides[0][:, :, None] & sides[1][:, None]
    return image.masked_fill(hole[:, None], 0.0), hole
