"""Channel semantic grouping (CSG) of channels into classes, and the semantic memory (S-Mem) that holds them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allspark import distributed
from allspark.config import Size, height_width


def group_channels(features: Tensor, class_maps: Tensor) -> Tensor:
    """Class of each channel (AllSpark, section 3.4): the class map with the largest cosine similarity to the channel.

    Args:
        features: (B, C, h, w).
        class_maps: (B, K, H, W), resized to (h, w).

    Returns:
        (B, C) int64; ties take the lowest class.
    """
    with torch.autocast(features.device.type, enabled=False):  # bf16 would change the class of a fifth of the channels
        maps = F.interpolate(class_maps.to(features.dtype), features.shape[-2:], mode="bilinear", align_corners=False)
        similarity = F.normalize(maps.flatten(2), dim=2) @ F.normalize(features.flatten(2), dim=2).transpose(1, 2)
    return similarity.argmax(1)  # (B, K, C) -> (B, C)


class SemanticMemory(nn.Module):
    """A first-in-first-out ring buffer of channels per class.

    Each class has C slots; a slot holds one channel, flattened to N = height * width values. Slots that were never
    written hold noise (Released).

    Args:
        num_classes: K.
        channels: C, of the feature map and slots per class.
        size: side of the feature map, or its height and width.
        policy: what the memories of several processes hold. "rank0": each write starts from the memory of process 0, so
            the writes of the other processes last one step (Released, by DDP's buffer broadcast). "gather": the
            channels of all processes are written everywhere, in rank order. "local": each process has its own.

    Buffers:
        queue: (K, C, N).
        pointer: (K,), the next slot to write.
        filled: (K,), the number of written slots, which are the first of the ring.
    """

    queue: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, num_classes: int, channels: int, size: Size, policy: str = "rank0") -> None:
        super().__init__()
        self.size = height_width(size)
        self.policy = policy
        self.register_buffer("queue", torch.empty(num_classes, channels, math.prod(self.size)).normal_())
        self.register_buffer("pointer", torch.zeros(num_classes, dtype=torch.long))
        self.register_buffer("filled", torch.zeros(num_classes, dtype=torch.long))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs) -> None:
        """A memory saved without `filled`, as by the released code, counts as full."""
        if f"{prefix}queue" in state_dict:
            state_dict.setdefault(f"{prefix}filled", torch.full_like(self.filled, self.queue.shape[1]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def sync(self) -> None:
        """Synchronize the memories of all processes before a step, as the policy says."""
        if self.policy == "rank0":
            for buffer in self.buffers():
                distributed.broadcast(buffer)

    @torch.no_grad()
    def enqueue(self, features: Tensor, classes: Tensor) -> None:
        """Write channels image by image, in ascending order, overwriting the oldest ones.

        Args:
            features: (B, C, N).
            classes: (B, C) int64, the class of each channel.
        """
        if self.policy == "gather":
            features, classes = distributed.all_gather(features), distributed.all_gather(classes)
        num_classes, slots, _ = self.queue.shape
        classes = classes.flatten()
        order = classes.argsort(stable=True)  # channels of class 0 in order of arrival, then class 1, ...
        count = F.one_hot(classes, num_classes).sum(0)
        first = count.cumsum(0) - count
        # For each slot, the last arrival of its class that writes it; without a loop over classes or a dynamic shape
        arrival = (torch.arange(slots, device=classes.device) - self.pointer[:, None]) % slots  # (K, slots)
        written = arrival < count[:, None]
        last = arrival + (count[:, None] - 1 - arrival).clamp(min=0) // slots * slots
        row = order[(first[:, None] + last).clamp(max=len(order) - 1)]
        self.queue.copy_(torch.where(written[..., None], features.flatten(0, 1)[row], self.queue))
        self.pointer.copy_((self.pointer + count) % slots)
        self.filled.copy_((self.filled + count).clamp(max=slots))

    def fill(self) -> Tensor:
        """Share of the slots of each class that were ever written, in percent: (K,)."""
        return 100 * self.filled / self.queue.shape[1]

    def read(self, empty_slots: bool = True) -> Tensor:
        """The memory as tokens (K, N, C), with the slots of a class in place of the channels of an image.

        A copy, because later writes must not change what the backward pass of this step uses.

        Args:
            empty_slots: True: slots that were never written hold noise; False: they are 0.
        """
        tokens = self.queue.transpose(1, 2)
        if empty_slots:
            return tokens.clone()
        written = torch.arange(tokens.shape[-1], device=tokens.device) < self.filled[:, None]  # (K, C)
        return tokens * written[:, None]
