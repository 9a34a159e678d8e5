"""The AllSpark bottleneck (CVPR 2024, section 3): labeled channels reconstructed from unlabeled ones by attention."""

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
    """Describes a training batch of labeled images followed by unlabeled ones.

    Args:
        num_labeled: number of labeled images, which come first. With 0 only the unlabeled branch runs and nothing is
            written to the memory. If all images are labeled, nothing is written either, and read_memory is required.
        pseudo_logits: (B_u, K, H, W), evaluation-mode logits of the unlabeled images, or with context="labeled" of the
            labeled ones; they decide the class of each channel that is written.
        read_memory: keys and values come from the memory (after its warm-up) instead of the unlabeled images of the
            batch.
    """

    num_labeled: int
    pseudo_logits: Tensor | None = None
    read_memory: bool = False


class ChannelAttention(nn.Module):
    """Projections of one branch, C -> heads * C and back, without bias, Xavier uniform."""

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

    def project_out(self, tokens: Tensor) -> Tensor:
        return F.dropout(self.out(tokens), self.rate)


class SelfBranch(ChannelAttention):
    """Unlabeled branch: multi-head attention of each image to its own channels."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = (
            rearrange(projection(tokens), "b n (head c) -> b head n c", head=self.heads)
            for projection in (self.q, self.k, self.v)
        )
        attended = channel_attention(q, k, v, self.rate)
        # Released: split head-major, merged channel-major
        return self.project_out(rearrange(attended, "b head n c -> b n (c head)"))


class CrossBranch(ChannelAttention):
    """Labeled branch: the channels of an image attend to the channels of `context`.

    Released: not multi-head, one attention map of all heads * C query and M * heads * C key channels.
    """

    def forward(self, tokens: Tensor, context: Tensor | None = None, present: Tensor | None = None) -> Tensor:
        """Channel attention.

        Args:
            tokens: (B, N, C).
            context: (M, N, C), shared by all images; None: each image attends to its own channels.
            present: (M,) bool, which of the M are attended to; None: all.

        Returns:
            (B, N, C).
        """
        if context is None:
            return self.project_out(channel_attention(self.q(tokens), self.k(tokens), self.v(tokens), self.rate))
        k, v = (rearrange(projection(context), "m n hc -> (m hc) n") for projection in (self.k, self.v))
        if present is not None:
            present = present.repeat_interleave(self.k.out_features)  # (M,) -> (M * hC,)
        return self.project_out(shared_channel_attention(self.q(tokens), k, v, self.rate, present))


def zero_grad_anchor(*modules: nn.Module) -> Tensor:
    """0, but with a (zero) gradient for each parameter of unused modules: DDP needs a gradient for every parameter."""
    return 0.0 * sum(weight.sum() for module in modules for weight in module.parameters())


class AllSparkBottleneck(nn.Module):
    """Applied to the deepest feature map: (B, C, h, w) -> (B, C, h, w).

    Args:
        channels: C.
        memory: holds channels of unlabeled images by class.
        num_heads: of the attention in both branches.
        dropout: of the attention weights and of the output projection.
        grouping_input: what decides the class of a channel, "logits" (Released) or "probabilities"; for ablations
            "random": the classes that the logits give are exchanged among the channels.
        context: "unlabeled" (Released); for ablations "labeled": labeled images attend to those of earlier steps, which
            the memory holds in place of unlabeled ones: it is read before it is written. Until it is read, they attend
            to the batch, themselves included.
        empty_slots: attend to slots that were never written, which hold noise (Released). False: such a slot is 0, and
            a class without a written slot is left out.
        own_channels: every second labeled image of a pass attends to its own channels, as in inference, so that the
            inference path is trained on true labels, too. Released: False, it is trained by pseudo-labels only.
        skip: add the input to the output, and start with an output of 0, so that the network starts as the one without
            a bottleneck. Released: False.
        attention: for ablations: "both" branches, "cross" (labeled branch and inference only), or "none", which leaves
            convolutions and norms. A missing attention contributes 0.
    """

    def __init__(
        self,
        channels: int,
        memory: SemanticMemory,
        *,
        num_heads: int = 2,
        dropout: float = 0.1,
        grouping_input: str = "logits",
        context: str = "unlabeled",
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
        self.context = context
        self.empty_slots = empty_slots
        self.own_channels = own_channels
        self.skip = skip
        if skip:
            nn.init.zeros_(self.map_out.weight)
            nn.init.zeros_(self.map_out.bias)
        self.attention = attention

    def forward(self, feature: Tensor, cross: CrossBatch | None = None, share_keys: bool = False) -> Tensor:
        """Reconstruct the feature map.

        Args:
            feature: (B, C, h, w).
            cross: describes a training batch; None: inference, each image attends to its own channels.
            share_keys: in inference, each image attends to the channels of the whole batch.
        """
        height, width = feature.shape[-2:]
        residual = F.gelu(self.map_in(feature)).flatten(2).transpose(1, 2)  # (B, N, C), N = h * w
        tokens = self.norm_in(residual)
        if self.attention == "none":
            attended = zero_grad_anchor(self.norm_in, self.cross_branch, self.self_branch)
        elif cross is None:
            attended = self.cross_branch(tokens, tokens if share_keys else None)
            if self.training:  # burn-in epochs: labeled images alone
                attended = attended + zero_grad_anchor(self.self_branch)
        else:
            attended = self.attend(tokens, cross, (height, width))
        out = self.norm_out(attended + residual).transpose(1, 2).unflatten(2, (height, width))
        out = F.gelu(self.map_out(out))
        return feature + out if self.skip else out

    def attend(self, tokens: Tensor, cross: CrossBatch, size: tuple[int, int]) -> Tensor:
        """Attention of a training batch: write unlabeled channels to the memory, then read it for labeled images.

        Args:
            tokens: (B, N, C), labeled images first.
            cross: describes the batch.
            size: height and width of the feature map, N = height * width.

        Returns:
            (B, N, C).
        """
        labeled, unlabeled = tokens[: cross.num_labeled], tokens[cross.num_labeled :]
        both = self.attention == "both"
        if both:
            attended_u = self.self_branch(unlabeled)
        else:
            attended_u = torch.zeros_like(unlabeled) + zero_grad_anchor(self.self_branch)
        if cross.num_labeled == 0:
            return attended_u
        assert len(unlabeled) or cross.read_memory, "labeled images alone can only attend to the memory"
        if len(unlabeled):
            self.memory.sync()  # before it is read or written
        if len(unlabeled) and self.context == "unlabeled":
            self.write_memory(unlabeled.detach(), cross.pseudo_logits, size)
        context, present = unlabeled if self.context == "unlabeled" else labeled, None
        if cross.read_memory:
            context = self.memory.read(self.empty_slots)
            present = None if self.empty_slots else self.memory.filled > 0
        if len(unlabeled) and self.context == "labeled":
            self.write_memory(labeled.detach(), cross.pseudo_logits, size)
        if not (self.own_channels and self.training):
            return torch.cat((self.cross_branch(labeled, context, present), attended_u))
        attended = torch.empty_like(labeled)
        first = int(torch.randint(2, ())) if len(labeled) % 2 else 0  # of an odd number, either half may be larger
        for half, keys in ((slice(first, None, 2), ()), (slice(1 - first, None, 2), (context, present))):
            if len(labeled[half]):
                attended[half] = self.cross_branch(labeled[half], *keys)
        return torch.cat((attended, attended_u))

    @torch.no_grad()
    def write_memory(self, tokens: Tensor, class_maps: Tensor, size: tuple[int, int]) -> None:
        """Write each channel of some images to the memory of its class.

        Args:
            tokens: (B, N, C).
            class_maps: (B, K, H, W), logits.
            size: height and width of the feature map.
        """
        assert tuple(size) == self.memory.size, (
            f"feature map {size} does not match the memory's size {self.memory.size}"
        )
        if self.grouping_input == "probabilities":  # Released: raw logits, called pseudo_prob_map
            # Each class's probabilities up to a factor, which a cosine does not see: very small ones would underflow
            log = class_maps.float().log_softmax(1)
            class_maps = (log - log.amax((2, 3), keepdim=True)).exp()
        channels = tokens.transpose(1, 2).to(self.memory.queue.dtype)  # (B, C, N)
        classes = group_channels(channels.unflatten(2, size), class_maps)
        if self.grouping_input == "random":
            order = torch.rand(classes.numel(), device=classes.device).argsort()
            classes = classes.flatten()[order].view_as(classes)
        self.memory.enqueue(channels, classes)
