"""PseudoSeg (ICLR 2021): the decoder and a refined Grad-CAM of the same network make soft labels together."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.losses import consistency_loss
from allspark.methods.base import Criterion, Method, Progress, check_weight, joint_output
from allspark.methods.masking import cut_out
from allspark.methods.pseudo_labels import Pseudo, fuse, labeling
from allspark.models.cam import ImageClassifier, SelfAttentionCAM, present_classes
from allspark.models.segmentor import unwrap
from allspark.utils.errors import UserError


class PseudoSeg(Method):
    """One network, no teacher, no threshold; an image classifier and SGC (allspark.models.cam) are its heads.

    The consistency loss is at the size of the image, as that of every method here. Released: at stride 4, where it is
    the same up to what bilinear interpolation does at edges; padding and the cut square are exact only here.
    background: class that the image classifier does not predict, None: it predicts all.
    gamma: weight of the decoder's probabilities in the fused label, SGC has the rest. temperature: of its sharpening.
    """

    facts = ("background",)

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
        warmup_epochs: int = 5,
    ) -> None:
        super().__init__(criterion)
        if not 0 <= gamma <= 1:
            raise UserError(f"method.gamma={gamma} is a share and must be in 0..1")
        if not temperature > 0:
            raise UserError(f"method.temperature={temperature} must be above 0; 1 sharpens nothing")
        check_weight(unlabeled_weight)
        self.views = Views(labeled=labeled_view, strong=(unlabeled_view,))
        self.background = background
        self.gamma, self.temperature = gamma, temperature
        self.unlabeled_weight = unlabeled_weight
        self.warmup_epochs = warmup_epochs  # of the memory, where the model has a bottleneck

    def attach(self, model: nn.Module) -> None:
        network = unwrap(model)
        channels, classes = network.encoder.channels[-2:], network.decoder.classifier
        num_classes, has_background = classes.out_channels, self.background is not None
        if num_classes == has_background:
            raise UserError(
                "pseudoseg's image classifier tells which classes an image has, and this data set has the background "
                "alone: set data.custom.background to none, or choose another method"
            )
        network.heads["classifier"] = ImageClassifier(channels[-1], num_classes - has_background)
        network.heads["sgc"] = SelfAttentionCAM(
            channels, num_classes, has_background, multiple=network.multiple, resize=network.decoder.resize
        )
        network.heads.to(classes.weight.device)

    def losses(
        self, model: nn.Module, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: Progress
    ) -> dict[str, Tensor]:
        weak_logits, soft_label = self.soft_labels(model, unlabeled.weak, unlabeled.valid)
        strong, hole = cut_out(unlabeled.strong[0])
        out = joint_output(
            model,
            labeled.image,
            strong,
            pseudo_logits=weak_logits,
            read_memory=progress.epoch >= self.warmup_epochs,
        )
        num_labeled = len(labeled.image)
        features = [feature[:num_labeled] for feature in out.features[-2:]]
        logits_x, logits_u = out.logits.split((num_labeled, len(strong)))
        losses = self.labeled_losses(model, logits_x, features, labeled.mask)
        loss_u, _ = consistency_loss(logits_u, soft_label, None, unlabeled.valid & ~hole)
        return {"loss": sum(losses.values()) + self.unlabeled_weight * loss_u, **losses, "loss_u": loss_u}

    def supervised_losses(self, model: nn.Module, labeled: LabeledBatch) -> dict[str, Tensor]:
        out = model(labeled.image)
        losses = self.labeled_losses(model, out.logits, out.features[-2:], labeled.mask)
        return {"loss": sum(losses.values()), **losses}

    def labeled_losses(
        self, model: nn.Module, logits: Tensor, features: list[Tensor], mask: Tensor
    ) -> dict[str, Tensor]:
        """Of the decoder, of SGC on the true classes of the image, and of the image classifier."""
        heads, num_classes = unwrap(model).heads, logits.shape[1]
        present = present_classes(mask, num_classes, self.background)
        cam = heads["classifier"].grad_cam(features[-1], present)
        sgc_logits = heads["sgc"](features, cam, mask < num_classes)  # padding is ignored, too
        loss_cls = F.binary_cross_entropy_with_logits(heads["classifier"](features[-1]), present)
        loss_x, loss_sgc = self.criterion(logits, mask), self.criterion(sgc_logits, mask)
        return {"loss_x": loss_x, "loss_sgc": loss_sgc, "loss_cls": loss_cls}

    def soft_labels(self, model: nn.Module, weak: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's logits of the weak view, and its soft label (B, K, H, W)."""
        with labeling(model) as network:
            out, heads = network(weak), network.heads
            present = (heads["classifier"](out.features[-1]) >= 0).float()  # sigmoid >= 0.5
            cam = heads["classifier"].grad_cam(out.features[-1], present)
            sgc_logits = heads["sgc"](out.features[-2:], cam, valid)
            return out.logits, fuse(out.logits, sgc_logits, self.gamma, self.temperature)

    def pseudo_labels(self, model: nn.Module, image: Tensor, valid: Tensor) -> Pseudo:
        return Pseudo.of(self.soft_labels(model, image, valid)[1].log())  # their softmax is the soft label
