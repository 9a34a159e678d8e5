"""Semantic Memory (S-Mem) and channel semantic grouping (CSG): the class of a channel map, and where it is kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allspark import distributed


def group_channels(features: Tensor, class_maps: Tensor) -> Tensor:
    """Class of every channel (AllSpark, section 3.4): the class map with the largest cosine to the channel's map.

    features (B, C, h, w), class_maps (B, K, H, W) resized to (h, w) -> (B, C) int64; ties take the lowest class.
    """
    with torch.autocast(features.device.type, enabled=False):  # in bf16 a fifth of the channels changes its class
        maps = F.interpolate(class_maps.to(features.dtype), features.shape[-2:], mode="bilinear", align_corners=False)
        similarity = F.normalize(maps.flatten(2), dim=2) @ F.normalize(features.flatten(2), dim=2).transpose(1, 2)
    return similarity.argmax(1)  # (B, K, C) -> (B, C)


class SemanticMemory(nn.Module):
    """A first-in-first-out ring of channel maps per class: queue (K, C, N), the next slot to write: pointer (K,).

    C slots per class, one slot is one channel's flattened spatial map of N = side * side values. Before anything is
    written they hold noise (Released); filled (K,) counts the written ones, which are the first of the ring.
    policy, what several processes hold: rank0 = each write starts from the memory of process 0, the others' own writes
    last one step (Released: DDP's buffer broadcast does so); gather = the channels of all processes are written
    everywhere, in rank order; local = each process keeps its own.
    """

    queue: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, num_classes: int, channels: int, side: int, policy: str = "rank0") -> None:
        super().__init__()
        self.side = side
        self.policy = policy
        self.register_buffer("queue", torch.randn(num_classes, channels, side * side))
        self.register_buffer("pointer", torch.zeros(num_classes, dtype=torch.long))
        self.register_buffer("filled", torch.zeros(num_classes, dtype=torch.long))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs) -> None:
        """The released code does not count what it writes: a memory from there counts as written all over."""
        if f"{prefix}queue" in state_dict:
            state_dict.setdefault(f"{prefix}filled", torch.full_like(self.filled, self.queue.shape[1]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def sync(self) -> None:
        """Make the memories of the processes what the policy says, before a write."""
        if self.policy == "rank0":
            for buffer in self.buffers():
                distributed.broadcast(buffer)

    @torch.no_grad()
    def enqueue(self, features: Tensor, classes: Tensor) -> None:
        """Write features (B, C, N) of classes (B, C), image by image, channels ascending, wrapping modulo C."""
        if self.policy == "gather":
            features, classes = distributed.all_gather(features), distributed.all_gather(classes)
        num_classes, slots, _ = self.queue.shape
        classes = classes.flatten()
        order = classes.argsort(stable=True)  # rows of class 0 in order of arrival, then class 1, ...
        count = F.one_hot(classes, num_classes).sum(0)
        first = count.cumsum(0) - count
        # For each slot: which arrival of its class wrote it last? No loop over classes, no size that depends on data.
        arrival = (torch.arange(slots, device=classes.device) - self.pointer[:, None]) % slots  # (K, slots)
        written = arrival < count[:, None]
        last = arrival + (count[:, None] - 1 - arrival).clamp(min=0) // slots * slots
        row = order[(first[:, None] + last).clamp(max=len(order) - 1)]
        self.queue.copy_(torch.where(written[..., None], features.flatten(0, 1)[row], self.queue))
        self.pointer.copy_((self.pointer + count) % slots)
        self.filled.copy_((self.filled + count).clamp(max=slots))

    def read(self, empty_slots: bool = True) -> Tensor:
        """The memory as tokens (K, N, C): the slots of a class stand where an image has its channels.

        A copy, since later writes must not change what the backward pass of this step sees. empty_slots=False: what was
        never written is 0.
        """
        tokens = self.queue.transpose(1, 2)
        if empty_slots:
            return tokens.clone()
        written = torch.arange(tokens.shape[-1], device=tokens.device) < self.filled[:, None]  # (K, C)
        return tokens * written[:, None]
