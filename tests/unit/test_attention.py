"""Attention to shared channels, computed in blocks, against the full attention map."""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from allspark.models import attention
from allspark.models.attention import attend, channel_attention, shared_channel_attention, similarity_variance
from allspark.models.bottleneck import CrossBranch, SelfBranch

B, N, CQ, M = 2, 9, 10, 37
PRESENT = torch.arange(M) % 3 != 1


def tensors(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(shapes))
    return [(torch.randn(shape, generator=generator, dtype=dtype) + 0.3).requires_grad_() for shape in shapes]


def literal(q, k, v, present=None, keep=None):
    """The map of every image: q (B, N, Cq), k and v (M, N); keep (B, Cq, M) factors of the weights."""
    present = torch.ones(len(k), dtype=torch.bool) if present is None else present
    result = []
    for image, one in enumerate(q):
        similarity = torch.stack([torch.stack([(one[:, i] * k[j]).sum() for j in range(len(k))]) for i in range(CQ)])
        seen = similarity[:, present]
        seen = (seen - seen.mean()) / (seen.var(correction=0) + 1e-5).sqrt()
        weights = torch.zeros_like(similarity)
        weights[:, present] = seen.exp() / seen.exp().sum(1, keepdim=True)
        if keep is not None:
            weights = weights * keep[image]
        result.append((weights @ v).t())
    return torch.stack(result)


def same_with_gradients(found, expected, inputs, tolerance):
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=expected.dtype)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    for a, b in zip(*(torch.autograd.grad((out * weights).sum(), inputs) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("present", [None, PRESENT], ids=["all", "some"])
@pytest.mark.parametrize("block", [1 << 22, 3 * M], ids=["one block", "blocks of 3 rows"])
def test_shared_keys_literal(monkeypatch, present, block):
    monkeypatch.setattr(attention, "CPU_BLOCK", block)
    monkeypatch.setattr(attention, "MIN_ROWS", 1)
    q, k, v = tensors((B, N, CQ), (M, N), (M, N))
    if present is not None:  # what was never written is 0
        k, v = ((x.detach() * present[:, None]).requires_grad_() for x in (k, v))
    found = shared_channel_attention(q, k, v, 0.0, present)
    same_with_gradients(found, literal(q, k, v, present), (q, k, v), 1e-10)


class LikeAGPU(TorchFunctionMode):
    """Tensors say that they are not on a CPU, so that the code of a GPU runs here."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return False if func == torch.Tensor.is_cpu.__get__ else func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("rows", [1 << 26, 4 * M], ids=["one block", "blocks of 4 rows"])
def test_gpu_code_path(monkeypatch, dropout, rows):
    monkeypatch.setattr(attention, "GPU_BLOCK", rows)
    monkeypatch.setattr(attention, "MIN_ROWS", 1)
    q, k, v = tensors((CQ, N), (M, N), (M, N))
    with LikeAGPU():
        torch.manual_seed(0)
        found = attend(q, k, v, dropout)
    torch.manual_seed(0)
    keep = torch.empty(CQ, M, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else torch.ones(CQ, M)
    expected = ((q @ k.t()).softmax(1) * keep / (1 - dropout)) @ v
    with LikeAGPU():
        same_with_gradients(found, expected, (q, k, v), 1e-10)


def test_float16_does_not_overflow():
    """Sums of q^T k beyond 65504 in channel attention."""
    q = torch.randn(1, 289, 16, generator=torch.Generator().manual_seed(0)) * 40
    found = channel_attention(q.half(), q.half(), q.half(), 0.0)
    assert found.isfinite().all()
    torch.testing.assert_close(found.float(), channel_attention(q, q, q, 0.0), atol=0.5, rtol=1e-2)


def test_variance_without_map():
    q, k = tensors((B, CQ, N), (M, N))
    similarity = q @ k.t()
    torch.testing.assert_close(similarity_variance(q, k), similarity.var((1, 2), correction=0))
    k = k * PRESENT[:, None]
    expected = (q @ k.t())[..., PRESENT].var((1, 2), correction=0)
    torch.testing.assert_close(similarity_variance(q, k, PRESENT), expected)


def test_dropout_shares_one_mask(monkeypatch):
    """The weights that the forward pass dropped are those that the backward pass drops; the rest is scaled up."""
    monkeypatch.setattr(attention, "CPU_BLOCK", 4 * M)
    monkeypatch.setattr(attention, "MIN_ROWS", 1)
    rate, seed = 0.25, 77
    q, k, v = tensors((CQ, N), (M, N), (M, N))
    found = attention.BlockAttention.apply(q, k, v, rate, seed)
    generator = np.random.Generator(np.random.SFC64(seed))
    keep = [attention.dropout_mask(generator, q.new_empty(min(4, CQ - i), M), rate) for i in range(0, CQ, 4)]
    expected = ((q @ k.t()).softmax(1) * torch.cat(keep) / (1 - rate)) @ v
    same_with_gradients(found, expected, (q, k, v), 1e-10)


def test_dropout_seed_and_rate():
    q, k, v = tensors((64, N), (1000, N), (1000, N), dtype=torch.float32)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(attend(q, k, v, 0.1))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    keep = attention.dropout_mask(np.random.Generator(np.random.SFC64(0)), torch.empty(1000, 1001), 0.1)
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert abs(keep.mean().item() - 0.9) < 5 * (0.09 / keep.numel()) ** 0.5
    assert abs(keep.mean(0).std().item() - (0.09 / 1000) ** 0.5) < 1e-3  # no column is special
    assert attention.dropout_mask(np.random.Generator(np.random.SFC64(0)), torch.empty(99, 99), 1e-6).mean() > 0.99


def test_own_keys_equal_shared_keys_of_one_image():
    q, k, v = tensors((1, N, CQ), (1, N, M), (1, N, M))
    own = channel_attention(q, k, v, 0.0)
    shared = shared_channel_attention(q, k[0].t(), v[0].t(), 0.0)
    same_with_gradients(shared, own, (q, k, v), 1e-10)


def test_map_is_never_materialized():
    """Twice the keys, the same peak of what the forward and backward pass hold beside their inputs and results."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.most = max(getattr(self, "most", 0), out.untyped_storage().nbytes())
            return out

    rows, keys = 1024, 33_000
    q, k, v = tensors((rows, 4), (keys, 4), (keys, 4), dtype=torch.float32)
    with Largest() as largest:
        attend(q, k, v, 0.1).sum().backward()
    block = max(attention.CPU_BLOCK, attention.MIN_ROWS * keys)
    assert largest.most <= 1.1 * 4 * block < 4 * rows * keys / 5


@pytest.mark.parametrize("kind", [SelfBranch, CrossBranch])
@pytest.mark.parametrize("memory", [False, True])
def test_dropout_of_a_branch(kind, memory):
    """Of the attention weights and of the output."""
    torch.manual_seed(0)
    branch, tokens = kind(8, 2, 0.25), torch.randn(2, 9, 8)
    context = (torch.randn(3, 9, 8),) if memory and kind is CrossBranch else ()
    wide = torch.randn(50, 40, 16)
    out, plain = branch.project_out(wide), branch.out(wide)
    kept = out != 0
    assert abs(kept.float().mean() - 0.75) < 0.02
    torch.testing.assert_close(out[kept], plain[kept] / 0.75)
    draws = torch.stack([branch(tokens, *context) for _ in range(50)])
    expected = branch.eval()(tokens, *context)
    assert not ((draws == 0) | (draws - expected / 0.75).abs().lt(1e-5)).all()  # weights are dropped, too
