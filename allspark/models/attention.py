"""Channel attention: channels look for themselves among channels, and the map of all pairs need never exist."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

EPS = 1e-5  # of the variance that a similarity map is divided by
BLOCK = 1 << 22  # pairs of channels that are looked at together on a CPU: 16 MB in float32, what its cache holds
ROWS = 128  # channels that are looked at together, at least: products of fewer rows are slow


def channel_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(psi(q^T k)) v^T over channels; q (..., N, Cq), k and v (..., N, Ck) -> (..., N, Cq).

    psi normalizes the similarity map of one image (and head) to mean 0 and variance 1, in place of a 1 / sqrt(d). For
    keys of an image's own: the map is small, and it is made.
    """
    similarity = (q.transpose(-2, -1) @ k).float()  # (..., Cq, Ck)
    weights = F.layer_norm(similarity, similarity.shape[-2:], eps=EPS).softmax(-1).to(v.dtype)
    return (F.dropout(weights, dropout) @ v.transpose(-2, -1)).transpose(-2, -1)


def shared_channel_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, present: Tensor | None = None) -> Tensor:
    """The same for keys that all images share, those of a memory: q (B, N, Cq), k and v (M, N) -> (B, N, Cq).

    The map would have B * Cq * M entries, 85 million of each image at 81 classes and 512 channels. Softmax does not see
    the mean, so of psi only the division by the standard deviation is left, which goes into q: an ordinary attention of
    B * Cq rows, in blocks (CPU) or in one kernel (GPU).
    present (M,) bool: the other keys are 0 and take no part, neither in the mean and variance nor in the softmax.
    """
    rows = q.transpose(1, 2)  # (B, Cq, N)
    with torch.autocast(q.device.type, enabled=False):
        variance = similarity_variance(rows.float(), k.float(), present)
        rows = (rows * (variance + EPS).rsqrt().view(-1, 1, 1)).to(k.dtype)
    rows = rows.flatten(0, 1)
    if present is not None:  # as one more coordinate: a mask would be a map again; exp(-1e4) is 0 in any precision
        rows = torch.cat((rows, rows.new_ones(len(rows), 1)), 1)
        k = torch.cat((k, k.new_full((len(k), 1), -1e4).masked_fill(present[:, None], 0)), 1)
    width = -(-rows.shape[1] // 8) * 8  # kernels want it, and on a CPU products of such matrices are faster, too
    rows, k, v = (F.pad(x, (0, width - x.shape[1])) for x in (rows, k, v))
    attend = attend_in_blocks if q.is_cpu else attend_in_kernel
    return attend(rows, k, v, dropout)[:, : q.shape[1]].unflatten(0, (len(q), -1)).transpose(1, 2)


def similarity_variance(q: Tensor, k: Tensor, present: Tensor | None = None) -> Tensor:
    """Variance of the numbers q_i . k_j of each image, without them: q (B, R, N), k (M, N) -> (B,).

    With means q' and k' and covariances Q and K it is k' Q k' + q' K q' + tr(Q K), no term of which is negative.
    """
    weight = k.new_full(k.shape[:1], 1 / len(k)) if present is None else present.to(k) / present.sum()  # (M,)
    mean_q, mean_k = q.mean(1), weight @ k  # (B, N), (N,)
    centered_q, centered_k = q - mean_q[:, None], k - mean_k
    cov_q = centered_q.transpose(1, 2) @ centered_q / q.shape[1]  # (B, N, N)
    cov_k = (centered_k * weight[:, None]).t() @ centered_k  # (N, N)
    return (cov_q @ mean_k) @ mean_k + ((mean_q @ cov_k) * mean_q).sum(1) + (cov_q * cov_k).sum((1, 2))


def attend_in_kernel(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(q k^T) v by torch's fused kernels: q (R, N), k and v (M, N), N a multiple of 8."""
    q, k, v = (x[None, None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=1.0)[0, 0]


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(q k^T) v, some rows at a time. Their weights are made again in the backward pass."""
    seed = int(torch.randint(2**62, ())) if dropout else 0
    return BlockAttention.apply(q, k, v, dropout, seed)


class BlockAttention(torch.autograd.Function):
    """attend_in_blocks, with the seed of its dropout."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, dropout: float, seed: int) -> Tensor:
        ctx.dropout, ctx.seed = dropout, seed
        out = torch.empty_like(q)
        for rows, weights, keep in BlockAttention.blocks(ctx, q, k):
            torch.mm(weights if keep is None else weights.mul_(keep), v, out=out[rows])
        out.div_(1 - dropout)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        mean = (grad * out).sum(1, keepdim=True)  # of a row's gradients, weighted: softmax takes it off
        grad = grad / (1 - ctx.dropout)
        for rows, weights, keep in BlockAttention.blocks(ctx, q, k):
            kept = weights if keep is None else keep.mul_(weights)
            grad_v.addmm_(kept.t(), grad[rows])
            grad_s = (grad[rows] @ v.t()).mul_(kept).addcmul_(weights, mean[rows], value=-1)
            torch.mm(grad_s, k, out=grad_q[rows])
            grad_k.addmm_(grad_s.t(), q[rows])
        return grad_q, grad_k, grad_v, None, None

    @staticmethod
    def blocks(ctx: FunctionCtx, q: Tensor, k: Tensor):
        """Slices of rows, their softmax weights, and where dropout keeps one (1 or 0, None: everywhere)."""
        generator = np.random.Generator(np.random.SFC64(ctx.seed))
        size = max(BLOCK // len(k), ROWS)
        for first in range(0, len(q), size):
            rows = slice(first, first + size)
            scores = q[rows] @ k.t()
            weights = torch.softmax(scores, -1, out=scores)
            yield rows, weights, keep_mask(generator, weights, ctx.dropout) if ctx.dropout else None


def keep_mask(generator: np.random.Generator, like: Tensor, dropout: float) -> Tensor:
    """1 with probability 1 - dropout (to 1 / 65536), else 0. On a CPU torch draws one by one, five times slower."""
    draws = generator.bit_generator.random_raw(-(-like.numel() // 4)).view(np.int16)[: like.numel()]  # four of 64 bits
    last = max(round(dropout * 65536) - 32769, -32768)  # the largest of -32768.. that is dropped
    keep = torch.from_numpy(draws).clamp_(last, last + 1).sub_(last)  # four times faster than to compare and to convert
    return keep.view(like.shape).to(like.dtype)
