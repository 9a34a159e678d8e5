"""The tensors of a training step, and which views of an image a method asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from allspark.data.spec import IMAGENET, Statistics
from allspark.utils.errors import UserError


def normalize(image: Tensor, statistics: Statistics = IMAGENET) -> Tensor:
    """uint8 (..., C, H, W) -> float32 normalized by mean and standard deviation, on the same device."""
    mean, std = (channel_constant(values, image.device) * 255 for values in statistics)
    return image.to(torch.float32, copy=True).sub_(mean).div_(std)


def channel_constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1) float32, filled on the device: a copy from the host would wait for all work queued on a GPU."""
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])


@dataclass(frozen=True)
class Views:
    """Which photometric views of an image a method trains on; names from data.transforms.PHOTOMETRIC.

    All views of an image share its geometry (scale, crop, flip). Unlabeled images always have a weak view, which
    pseudo-labels are computed from.

    Args:
        labeled: view of labeled images.
        strong: views of unlabeled images to train on; may include weak ones, which differ by their CutMix box.
        cutmix: probability that a strong view gets a CutMix box.
        unlabeled: whether the method uses unlabeled images at all; otherwise none is read.
    """

    labeled: str = "weak"
    strong: tuple[str, ...] = ()
    cutmix: float = 0.0
    unlabeled: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.cutmix <= 1:
            raise UserError(f"method.cutmix={self.cutmix} is a probability and must be in 0..1")


@dataclass(frozen=True)
class LabeledBatch:
    """Labeled images with their masks.

    Args:
        image: (B, C, H, W), uint8 from the loader, normalized float32 after `to`.
        mask: (B, H, W) int64.
    """

    image: Tensor
    mask: Tensor

    def to(self, device: torch.device, statistics: Statistics = IMAGENET) -> LabeledBatch:
        """Move to a device and normalize there: uint8 images are a quarter of the bytes."""
        image, mask = (tensor.to(device, non_blocking=True) for tensor in (self.image, self.mask))
        return LabeledBatch(normalize(image, statistics), mask)

    def __getitem__(self, part: slice) -> LabeledBatch:
        return LabeledBatch(self.image[part], self.mask[part])

    def pin_memory(self) -> LabeledBatch:
        return LabeledBatch(self.image.pin_memory(), self.mask.pin_memory())


@dataclass(frozen=True)
class UnlabeledBatch:
    """The views of unlabeled images.

    Args:
        weak: (B, C, H, W), uint8 from the loader, normalized float32 after `to`.
        strong: strong views of the same crops, each like `weak`.
        valid: (B, H, W) bool, False on padding, where the crop extends beyond the image.
        cutmix: for each strong view (B, H, W) bool, True inside the box pasted from the partner image, if any.
    """

    weak: Tensor
    strong: tuple[Tensor, ...]
    valid: Tensor
    cutmix: tuple[Tensor, ...]

    def apply(self, function: Callable[[Tensor], Tensor]) -> UnlabeledBatch:
        """The batch with the function applied to each tensor."""
        strong, cutmix = (tuple(map(function, tensors)) for tensors in (self.strong, self.cutmix))
        return UnlabeledBatch(function(self.weak), strong, function(self.valid), cutmix)

    def to(self, device: torch.device, statistics: Statistics = IMAGENET) -> UnlabeledBatch:
        """As LabeledBatch.to."""
        moved = self.apply(lambda tensor: tensor.to(device, non_blocking=True))
        strong = tuple(normalize(view, statistics) for view in moved.strong)
        return replace(moved, weak=normalize(moved.weak, statistics), strong=strong)

    def pin_memory(self) -> UnlabeledBatch:
        return self.apply(Tensor.pin_memory)

    def __getitem__(self, part: slice) -> UnlabeledBatch:
        return self.apply(lambda tensor: tensor[part])


def split_micro_batches(
    labeled: LabeledBatch, unlabeled: UnlabeledBatch | None, size: int
) -> list[tuple[LabeledBatch, UnlabeledBatch | None]]:
    """Split a step's batch into micro-batches of `size` labeled and `size` unlabeled images."""
    count = len(labeled.image)
    assert unlabeled is None or len(unlabeled.weak) == count, "as many labeled as unlabeled images"
    parts = [slice(first, first + size) for first in range(0, count, size)]
    return [(labeled[part], None if unlabeled is None else unlabeled[part]) for part in parts]
