"""The AllSpark bottleneck (CVPR 2024, section 3): labeled channels rebuilt from unlabeled ones by channel attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from allspark.models.attention import channel_attention, shared_channel_attention
from allspark.models.memory import SemanticMemory, group_channels


@dataclass(frozen=True)
class CrossBatch:
    """What a training batch of labeled images followed by unlabeled ones carries into the bottleneck.

    num_labeled: how many images at the front are labeled; 0: the unlabeled branch alone, nothing is written. All of
    them: nothing is written, and the memory, of which something must be there, is read.
    pseudo_logits (B_u, K, H, W): evaluation logits of the unlabeled images, they decide the class of each channel.
    read_memory: keys and values come from the memory (after warm-up) instead of the unlabeled images of the batch.
    """

    num_labeled: int
    pseudo_logits: Tensor | None = None
    read_memory: bool = False


class ChannelAttention(nn.Module):
    """Projections of one branch. C -> heads * C and back, without bias, Xavier uniform."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v = (nn.Linear(channels, heads * channels, bias=False) for _ in range(3))
        self.out = nn.Linear(heads * channels, channels, bias=False)
        for linear in (self.q, self.k, self.v, self.out):
            nn.init.xavier_uniform_(linear.weight)

    @property
    def rate(self) -> float:
        return self.dropout if self.training else 0.0

    def finish(self, tokens: Tensor) -> Tensor:
        return F.dropout(self.out(tokens), self.rate)


class SelfBranch(ChannelAttention):
    """Unlabeled stream: every image attends to its own channels, head by head."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = (
            rearrange(projection(tokens), "b n (head c) -> b head n c", head=self.heads)
            for projection in (self.q, self.k, self.v)
        )
        attended = channel_attention(q, k, v, self.rate)
        return self.finish(rearrange(attended, "b head n c -> b n (c head)"))  # split head-major, merged channel-major


class CrossBranch(ChannelAttention):
    """Labeled stream: the channels of an image look for themselves among the channels of `context`.

    Released: not multi-head, one map over all heads * C query and M * heads * C key channels.
    """

    def forward(self, tokens: Tensor, context: Tensor | None = None, present: Tensor | None = None) -> Tensor:
        """tokens (B, N, C); context (M, N, C) for all images, None: each image is its own context -> (B, N, C).

        present (M,) bool: which of the M take part.
        """
        if context is None:
            return self.finish(channel_attention(self.q(tokens), self.k(tokens), self.v(tokens), self.rate))
        k, v = (rearrange(projection(context), "m n hc -> (m hc) n") for projection in (self.k, self.v))
        if present is not None:
            present = present.repeat_interleave(self.k.out_features)  # (M,) -> (M * hC,)
        return self.finish(shared_channel_attention(self.q(tokens), k, v, self.rate, present))


def idle(*modules: nn.Module) -> Tensor:
    """0, with a gradient: DDP wants one, if only 0, for every parameter."""
    return 0.0 * sum(weight.sum() for module in modules for weight in module.parameters())


class AllSparkBottleneck(nn.Module):
    """Sits on the deepest feature map: (B, C, h, w) -> (B, C, h, w).

    grouping_input: what decides the class of a channel, logits or probabilities. Released: the logits.
    empty_slots: the noise in slots that were never written takes part (Released). False: such a slot is 0, and a class
    without any written slot is left out of the attention.
    own_channels: every second labeled image of a pass is rebuilt from its own channels, as inference does, which then
    learns from true labels, too. Released: false, inference runs on weights that its pseudo-labels alone hold to the
    truth.
    attention: for ablations. cross: none in the unlabeled branch; none: nor in the labeled one, and none in inference,
    which leaves convolutions and norms. Where there is none, 0 stands for what it gives.
    skip: the map that comes in is added to the one that comes out, and the last convolution starts at 0: at first the
    network is the one without a bottleneck. Released: all of the map goes through the bottleneck, trained from nothing.
    """

    def __init__(
        self,
        channels: int,
        memory: SemanticMemory,
        *,
        num_heads: int = 2,
        dropout: float = 0.1,
        grouping_input: str = "logits",
        empty_slots: bool = True,
        own_channels: bool = False,
        skip: bool = False,
        attention: str = "both",
    ) -> None:
        super().__init__()
        self.map_in = nn.Conv2d(channels, channels, 1)
        self.norm_in = nn.LayerNorm(channels, eps=1e-6)
        self.cross_branch = CrossBranch(channels, num_heads, dropout)
        self.self_branch = SelfBranch(channels, num_heads, dropout)
        self.memory = memory
        self.norm_out = nn.LayerNorm(channels, eps=1e-6)
        self.map_out = nn.Conv2d(channels, channels, 1)
        self.grouping_input = grouping_input
        self.empty_slots = empty_slots
        self.own_channels = own_channels
        self.skip = skip
        if skip:
            nn.init.zeros_(self.map_out.weight)
            nn.init.zeros_(self.map_out.bias)
        self.attention = attention

    def forward(self, feature: Tensor, cross: CrossBatch | None = None, share_keys: bool = False) -> Tensor:
        """cross=None: inference, each image attends to its own channels (share_keys: to those of the whole batch)."""
        height, width = feature.shape[-2:]
        residual = F.gelu(self.map_in(feature)).flatten(2).transpose(1, 2)  # (B, N, C), N = h * w
        tokens = self.norm_in(residual)
        if self.attention == "none":
            attended = idle(self.norm_in, self.cross_branch, self.self_branch)
        elif cross is None:
            attended = self.cross_branch(tokens, tokens if share_keys else None)
            if self.training:  # a supervised start
                attended = attended + idle(self.self_branch)
        else:
            attended = self.attend(tokens, cross, (height, width))
        out = self.norm_out(attended + residual).transpose(1, 2).unflatten(2, (height, width))
        out = F.gelu(self.map_out(out))
        return feature + out if self.skip else out

    def attend(self, tokens: Tensor, cross: CrossBatch, size: tuple[int, int]) -> Tensor:
        """Labeled tokens through the cross branch, unlabeled ones through the self branch; one write, then one read."""
        labeled, unlabeled = tokens[: cross.num_labeled], tokens[cross.num_labeled :]
        both = self.attention == "both"
        attended_u = self.self_branch(unlabeled) if both else torch.zeros_like(unlabeled) + idle(self.self_branch)
        if cross.num_labeled == 0:
            return attended_u
        assert len(unlabeled) or cross.read_memory, "labeled images alone have nothing but the memory to attend to"
        if len(unlabeled):
            self.remember(unlabeled.detach(), cross.pseudo_logits, size)
        context, present = unlabeled, None
        if cross.read_memory:
            context = self.memory.read(self.empty_slots)
            present = None if self.empty_slots else self.memory.filled > 0
        if not (self.own_channels and self.training):
            return torch.cat((self.cross_branch(labeled, context, present), attended_u))
        attended = torch.empty_like(labeled)
        first = int(torch.randint(2, ())) if len(labeled) % 2 else 0  # of an odd number either half: one image is all
        for places, keys in ((slice(first, None, 2), ()), (slice(1 - first, None, 2), (context, present))):
            if len(labeled[places]):
                attended[places] = self.cross_branch(labeled[places], *keys)
        return torch.cat((attended, attended_u))

    @torch.no_grad()
    def remember(self, unlabeled: Tensor, class_maps: Tensor, size: tuple[int, int]) -> None:
        """Put every channel of the unlabeled tokens (B_u, N, C) into the memory of its class."""
        assert size == (self.memory.side,) * 2, f"feature map {size}, memory of side {self.memory.side}"
        if self.grouping_input == "probabilities":  # Released: the raw logits, named probability map
            class_maps = class_maps.softmax(1)
        channels = unlabeled.transpose(1, 2).to(self.memory.queue.dtype)  # (B_u, C, N)
        self.memory.sync()
        self.memory.enqueue(channels, group_channels(channels.unflatten(2, size), class_maps))
