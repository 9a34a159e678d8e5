"""Channel attention: each channel attends to channels, without storing the map of all pairs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

EPS = 1e-5  # added to the variance of a similarity map
CPU_BLOCK = 1 << 22  # pairs of channels per block on a CPU: 16 MB in float32, which fits its cache
GPU_BLOCK = 1 << 26  # on a GPU: 134 MB in bf16
MIN_ROWS = 128  # rows per block, at least: matrix products with fewer rows are slow
FP16_SCALE = 2.0**-6  # keeps the sums of q^T k below the largest float16, 65504


def channel_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Channel attention within each image, softmax(psi(q^T k)) v^T; stores the attention map.

    psi normalizes the similarity map of each image and head to mean 0 and variance 1; there is no 1 / sqrt(d).

    Args:
        q: queries (..., N, Cq); N is the number of positions.
        k: keys (..., N, Ck).
        v: values (..., N, Ck).
        dropout: rate at which attention weights are dropped.

    Returns:
        (..., N, Cq)
    """
    eps = EPS
    if q.dtype == torch.float16:  # a power of two changes no mantissa, and psi removes it again
        q, eps = q * FP16_SCALE, EPS * FP16_SCALE**2
    similarity = q.transpose(-2, -1) @ k  # (..., Cq, Ck)
    similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    weights = F.layer_norm(similarity, similarity.shape[-2:], eps=eps).softmax(-1).to(v.dtype)
    return (F.dropout(weights, dropout) @ v.transpose(-2, -1)).transpose(-2, -1)


def shared_channel_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, present: Tensor | None = None) -> Tensor:
    """Attention over channels that all images share, such as those of the memory.

    The map has B * Cq * M entries: 85 million per image at 81 classes and 512 channels. Softmax is shift-invariant, so
    psi reduces to a division by the standard deviation. It is applied to q, and what remains is ordinary
    attention with B * Cq rows, computed block by block.

    Args:
        q: queries (B, N, Cq).
        k: keys (M, N).
        v: values (M, N).
        dropout: rate at which attention weights are dropped.
        present: (M,) bool. Keys and values are 0 where it is False; these are left out of mean, variance and softmax.

    Returns:
        (B, N, Cq)
    """
    rows = q.transpose(1, 2)  # (B, Cq, N)
    with torch.autocast(q.device.type, enabled=False):
        precise = torch.promote_types(rows.dtype, torch.float32)  # half precision is not enough for a variance
        variance = similarity_variance(rows.to(precise), k.to(precise), present)
        rows = (rows * (variance + EPS).rsqrt().view(-1, 1, 1)).to(k.dtype)
    rows = rows.flatten(0, 1)
    if present is not None:  # as one more coordinate: a mask would be a map again; exp(-1e4) is 0 in any precision
        rows = torch.cat((rows, rows.new_ones(len(rows), 1)), 1)
        k = torch.cat((k, k.new_full((len(k), 1), -1e4).masked_fill(present[:, None], 0)), 1)
    width = -(-rows.shape[1] // 8) * 8  # matrix products are faster when the width is a multiple of 8
    rows, k, v = (F.pad(x, (0, width - x.shape[1])) for x in (rows, k, v))
    return attend(rows, k, v, dropout)[:, : q.shape[1]].unflatten(0, (len(q), -1)).transpose(1, 2)


def similarity_variance(q: Tensor, k: Tensor, present: Tensor | None = None) -> Tensor:
    """Variance of all products q_i . k_j of each image, computed without the products.

    With means q', k' and covariances Q, K it is k' Q k' + q' K q' + tr(Q K); no term is negative.

    Args:
        q: (B, R, N)
        k: (M, N)
        present: (M,) bool, the keys that count; None: all of them.

    Returns:
        (B,)
    """
    weight = k.new_full(k.shape[:1], 1 / len(k)) if present is None else present.to(k) / present.sum()  # (M,)
    mean_q, mean_k = q.mean(1), weight @ k  # (B, N), (N,)
    centered_q, centered_k = q - mean_q[:, None], k - mean_k
    cov_q = centered_q.transpose(1, 2) @ centered_q / q.shape[1]  # (B, N, N)
    cov_k = (centered_k * weight[:, None]).t() @ centered_k  # (N, N)
    return (cov_q @ mean_k) @ mean_k + ((mean_q @ cov_k) * mean_q).sum(1) + (cov_q * cov_k).sum((1, 2))


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(q k^T) v, block by block; q (R, N), k and v (M, N) -> (R, N)."""
    seed = int(torch.randint(2**62, ())) if dropout and q.is_cpu else 0
    with torch.autocast(q.device.type, enabled=False):  # on a GPU autocast would make the weights float32
        return BlockAttention.apply(q, k, v, dropout, seed)


class BlockAttention(torch.autograd.Function):
    """softmax(q k^T) v for some rows at a time; the backward pass computes their weights again.

    On an H100 this is faster than torch's fused attention, which has no tiles for a head of this width and so few rows
    (docs/benchmarks.md). Dropout masks are generated again from a seed on a CPU, and kept, one byte each, on a GPU.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, dropout: float, seed: int) -> Tensor:
        ctx.dropout, ctx.seed = dropout, seed
        ctx.rows = max((CPU_BLOCK if q.is_cpu else GPU_BLOCK) // len(k), MIN_ROWS)
        out = torch.empty_like(q)
        ctx.masks = None if q.is_cpu or not dropout else q.new_empty(len(q), len(k), dtype=torch.bool)
        if ctx.masks is not None:
            ctx.masks.bernoulli_(1 - dropout)
        for rows, weights, keep in BlockAttention.blocks(ctx, q, k):
            torch.mm(weights if keep is None else weights.mul_(keep), v, out=out[rows])
        out.div_(1 - dropout)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        mean = (grad * out).sum(1, keepdim=True)  # the softmax gradient subtracts each row's weighted mean
        grad = grad / (1 - ctx.dropout)
        for rows, weights, keep in BlockAttention.blocks(ctx, q, k):
            dropped = weights if keep is None else keep.mul_(weights)
            grad_v.addmm_(dropped.t(), grad[rows])
            grad_s = (grad[rows] @ v.t()).mul_(dropped).addcmul_(weights, mean[rows], value=-1)
            torch.mm(grad_s, k, out=grad_q[rows])
            grad_k.addmm_(grad_s.t(), q[rows])
        return grad_q, grad_k, grad_v, None, None

    @staticmethod
    def blocks(ctx: FunctionCtx, q: Tensor, k: Tensor) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yields a slice of rows, their softmax weights, and the dropout mask (1 or 0; None without dropout)."""
        generator = np.random.Generator(np.random.SFC64(ctx.seed))
        for first in range(0, len(q), ctx.rows):
            rows = slice(first, first + ctx.rows)
            scores = q[rows] @ k.t()
            weights = torch.softmax(scores, -1, scores.dtype, out=scores if q.is_cpu else None)
            if not ctx.dropout:
                yield rows, weights, None
            elif ctx.masks is None:
                yield rows, weights, dropout_mask(generator, weights, ctx.dropout)
            else:
                yield rows, weights, ctx.masks[rows].to(weights.dtype)


def dropout_mask(generator: np.random.Generator, like: Tensor, dropout: float) -> Tensor:
    """1 with probability 1 - dropout (to 1 / 65536), else 0; five times faster than torch's own on a CPU."""
    draws = generator.bit_generator.random_raw(-(-like.numel() // 4)).view(np.int16)[: like.numel()]  # 4 per 64 bits
    last = max(round(dropout * 65536) - 32769, -32768)  # the largest of -32768.. that is dropped
    keep = torch.from_numpy(draws).clamp_(last, last + 1).sub_(last)  # four times faster than a comparison
    return keep.view(like.shape).to(like.dtype)
