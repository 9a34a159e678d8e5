"""The network as a method sees it during one training step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allspark.models.bottleneck import CrossBatch
from allspark.models.eval_mode import eval_mode
from allspark.models.segmentor import Perturb, Segmentor, SegOutput, unwrap
from allspark.pseudo_labels import Pseudo


def predict(model: nn.Module, image: Tensor, share_keys: bool = False) -> Pseudo:
    """Pseudo-labels in evaluation mode, without gradients; no buffer of the model changes.

    Args:
        model: a Segmentor.
        image: (B, C, H, W), normalized.
        share_keys: the images of the batch share the keys of the bottleneck (Released).
    """
    with eval_mode(model):
        return Pseudo.of(model(image, share_keys=share_keys).logits)


@dataclass(frozen=True)
class Student:
    """The network of one training step. Methods call it and need not know whether it has a bottleneck.

    A step with a bottleneck makes exactly one joint pass (`joint` or `joint_output`): it alone writes to the memory.

    Args:
        network: the Segmentor, or its DistributedDataParallel wrapper.
        read_memory: labeled images attend to the memory (after its warm-up) instead of the unlabeled images of the
            batch. Without effect on a network without a bottleneck.
    """

    network: nn.Module
    read_memory: bool = False

    @property
    def model(self) -> Segmentor:
        return unwrap(self.network)

    @property
    def couples_images(self) -> bool:
        """Whether predictions for labeled images depend on the unlabeled images of the joint pass (the bottleneck)."""
        return self.model.bottleneck is not None

    def predict(self, image: Tensor, share_keys: bool = False) -> Pseudo:
        """Pseudo-labels of image (B, C, H, W) in evaluation mode; see `allspark.models.student.predict`."""
        return predict(self.model, image, share_keys)  # not through DDP: there is nothing to synchronize

    def labeled(self, image: Tensor) -> SegOutput:
        """A pass of labeled images (B, C, H, W) alone."""
        return self.network(image)

    def unlabeled(self, image: Tensor, perturb: Perturb | None = None) -> Tensor:
        """Logits (B, K, H, W) of a further pass, of unlabeled images alone; it does not write to the memory.

        Args:
            image: (B, C, H, W).
            perturb: applied to the features before they are decoded.
        """
        cross = CrossBatch(num_labeled=0) if self.couples_images else None
        return self.network(image, cross=cross, perturb=perturb, clean=perturb is None).logits

    def joint(self, labeled: Tensor, unlabeled: Tensor, pseudo: Pseudo | None = None) -> tuple[Tensor, Tensor]:
        """One pass of labeled and unlabeled images.

        Args:
            labeled: (B_x, C, H, W).
            unlabeled: (B_u, C, H, W).
            pseudo: pseudo-labels of `unlabeled`, which decide the classes of what is written to the memory; None: they
                are predicted here if the network needs them.

        Returns:
            Logits (B_x, K, H, W) of the labeled and (B_u, K, H, W) of the unlabeled images.
        """
        logits = self.joint_output(labeled, unlabeled, pseudo).logits
        return logits.split((len(labeled), len(unlabeled)))  # not two slices, whose gradients would be added up

    def joint_output(
        self,
        labeled: Tensor,
        unlabeled: Tensor,
        pseudo: Pseudo | None = None,
        *,
        perturb: Perturb | None = None,
        clean: bool = True,
    ) -> SegOutput:
        """`joint` with features and perturbed logits; in all of them the labeled images come first.

        Args:
            labeled: as for `joint`.
            unlabeled: as for `joint`.
            pseudo: as for `joint`.
            perturb: features -> features, see Segmentor.forward.
            clean: False: decode the perturbed features only.
        """
        cross = None
        if self.couples_images:
            if self.model.bottleneck.context == "labeled":
                pseudo = self.predict(labeled)
            elif pseudo is None:
                pseudo = self.predict(unlabeled)
            cross = CrossBatch(len(labeled), pseudo.logits, self.read_memory)
        return self.network(torch.cat((labeled, unlabeled)), cross=cross, perturb=perturb, clean=clean)
