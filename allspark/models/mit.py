"""Mix Transformer encoders MiT-B0..B5, written from the SegFormer paper (arXiv 2105.15203, section 3.1 and table 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class MiTSize:
    """What differs between B0 and B5, including the default width of the decoder (table 6)."""

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    decoder_channels: int
    strides: tuple[int, int, int, int] = (4, 8, 16, 32)


HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)
MLP_RATIO = 4
CPU_MAP = 1 << 24  # largest attention map that is stored on a CPU: 32 MiB in bf16
SIZES = {
    "mit_b0": MiTSize((32, 64, 160, 256), (2, 2, 2, 2), 256),
    "mit_b1": MiTSize((64, 128, 320, 512), (2, 2, 2, 2), 256),
    "mit_b2": MiTSize((64, 128, 320, 512), (3, 4, 6, 3), 768),
    "mit_b3": MiTSize((64, 128, 320, 512), (3, 4, 18, 3), 768),
    "mit_b4": MiTSize((64, 128, 320, 512), (3, 8, 27, 3), 768),
    "mit_b5": MiTSize((64, 128, 320, 512), (3, 6, 40, 3), 768),
}


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the precision of its input; its sums are float32 inside the kernel.

    On a GPU autocast would make input and output float32, and with them the sums of a block: twice the memory traffic,
    and casts before and after each norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu:  # its kernel takes maps in bf16 with float32 weights
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class OverlapPatchEmbed(nn.Module):
    """Overlapping patches, (B, C_in, H, W) -> map (B, H', W', C): convolution, then LayerNorm (eps 1e-5)."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2)
        self.norm = LayerNorm(channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class EfficientSelfAttention(nn.Module):
    """Self-attention with keys and values from a map that is reduced `reduction` times in each direction (eq. 2)."""

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, reduction)
            self.norm = LayerNorm(channels, eps=1e-5)
        self.reduction = reduction

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        q = self.q(x).view(batch, height * width, self.heads, -1).transpose(1, 2)  # (B, heads, N, d)
        if self.reduction > 1:  # a (B, H, W, C) map seen as NCHW is channels-last: no copy
            x = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        kv = self.kv(x).view(batch, -1, 2, self.heads, channels // self.heads)  # (B, M, 2, heads, d), k first
        k, v = (each.transpose(1, 2) for each in kv.unbind(2))  # each (B, heads, M, d); their gradients need no copy
        out = attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, height, width, channels))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v; q (B, heads, N, d), k and v (B, heads, M, d) -> (B, heads, N, d)."""
    pairs = q[..., 0].numel() * k.shape[2]
    if q.is_cpu and q.dtype == torch.bfloat16 and pairs <= CPU_MAP:  # torch's fused kernel is half as fast there
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class MixFFN(nn.Module):
    """Feed-forward network with a depthwise 3x3 convolution instead of positional encodings (eq. 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = MLP_RATIO * channels
        self.fc1 = nn.Linear(channels, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(x))


class Block(nn.Module):
    """Pre-norm attention and Mix-FFN on a (B, H, W, C) map, each with a residual connection."""

    def __init__(self, channels: int, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels, eps=1e-6)
        self.attn = EfficientSelfAttention(channels, heads, reduction)
        self.norm2 = LayerNorm(channels, eps=1e-6)
        self.ffn = MixFFN(channels)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(x, self.attn(self.norm1(x)))
        return self.add(x, self.ffn(self.norm2(x)))

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """x + branch; in training some images go without the branch (stochastic depth), for the others it is scaled."""
        if not (self.training and self.drop_path):
            return x + branch
        keep = 1 - self.drop_path
        kept = branch.new_empty(len(branch), 1, 1, 1).bernoulli_(keep)
        return torch.addcmul(x, branch, kept, value=1 / keep)


class Stage(nn.Module):
    """Patch embedding, blocks, LayerNorm; (B, C_in, H, W) -> (B, C, H/stride, W/stride), rounded up."""

    def __init__(self, in_channels: int, channels: int, index: int, drop_paths: list[float]) -> None:
        super().__init__()
        kernel, stride = (7, 4) if index == 0 else (3, 2)
        self.patch_embed = OverlapPatchEmbed(in_channels, channels, kernel, stride)
        self.blocks = nn.Sequential(*(Block(channels, HEADS[index], REDUCTIONS[index], rate) for rate in drop_paths))
        self.norm = LayerNorm(channels, eps=1e-6)
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.norm(x).permute(0, 3, 1, 2)


class MiT(nn.Module):
    """image (B, C, H, W) -> four maps (B, C_i, H_i, W_i) of strides 4, 8, 16, 32; drop path grows with depth."""

    def __init__(self, size: MiTSize, drop_path: float = 0.1) -> None:
        super().__init__()
        self.channels, self.strides = size.channels, size.strides
        self.decoder_channels = size.decoder_channels
        rates = torch.linspace(0, drop_path, sum(size.depths), device="cpu").split(size.depths)
        inputs = (3, *size.channels[:-1])
        self.stages = nn.ModuleList(
            Stage(inputs[i], size.channels[i], i, rates[i].tolist()) for i in range(len(size.channels))
        )
        self.apply(init_weights)

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.stages for block in stage.blocks]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the blocks in the backward pass (the name is timm's)."""
        for stage in self.stages:
            stage.checkpointing = enable

    def forward(self, image: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            image = stage(image)
            features.append(image)
        return features


def init_weights(module: nn.Module) -> None:
    """Linear: truncated normal of 0.02; convolution: normal of sqrt(2 / fan-out); biases 0; norms 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
