"""Batch normalization over the images of all processes, without waiting for the device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from allspark.distributed import all_gather, all_reduce_sum


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose batch statistics are those of all processes.

    The same numbers as torch.nn.SyncBatchNorm. That one removes ranks with empty batches by a boolean mask, for which
    the host waits for the device three times per layer and forward pass, and which cannot be captured in a CUDA graph.
    Here no rank is ever empty. Modules inside, the dropout and activation of timm's BatchNormAct2d, follow it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.training and dist.is_initialized():
            self.num_batches_tracked.add_(1)
            x = NormalizeTogether.apply(x, self.weight, self.bias, self.running_mean, self.running_var, self)
        else:
            x = super().forward(x)
        for part in self.children():
            x = part(x)
        return x

    @classmethod
    def convert(cls, module: nn.Module) -> nn.Module:
        """Replace every BatchNorm2d inside a module, in place, with its parameters, buffers and modules."""
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                norm = cls(child.num_features, child.eps, child.momentum)
                norm.weight, norm.bias = child.weight, child.bias
                norm.running_mean, norm.running_var = child.running_mean, child.running_var
                norm.num_batches_tracked, norm.training = child.num_batches_tracked, child.training
                for key, part in child.named_children():
                    norm.add_module(key, part)
                setattr(module, name, norm)
            else:
                cls.convert(child)
        return module


class NormalizeTogether(torch.autograd.Function):
    """Normalize with the statistics of all processes, and exchange two sums per channel in the backward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        norm: SyncBatchNorm,
    ) -> Tensor:
        values = at_least_float(x)
        count = values.new_full((1,), values.numel() // values.shape[1])
        var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
        gathered = all_gather(torch.cat((mean, var, count))[None])  # (P, 2 C + 1)
        means, variances, counts = gathered.split((len(mean), len(mean), 1), 1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        var = ((variances + (means - mean).square()) * counts).sum(0) / total
        running_mean.lerp_(mean, norm.momentum)
        running_var.lerp_(var * (total / (total - 1)), norm.momentum)
        scale = (var + norm.eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, total)
        factor = weight * scale
        return torch.addcmul(on_maps(bias - mean * factor), values, on_maps(factor)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, total = ctx.saved_tensors
        grad, normalized = at_least_float(grad), (at_least_float(x) - on_maps(mean)) * on_maps(scale)
        grad_bias, grad_weight = grad.sum((0, 2, 3)), (grad * normalized).sum((0, 2, 3))
        sums = torch.stack((grad_bias, grad_weight))
        all_reduce_sum(sums)
        mean_grad, mean_product = sums / total
        grad_x = grad - on_maps(mean_grad) - normalized * on_maps(mean_product)
        return (grad_x * on_maps(weight * scale)).to(x.dtype), grad_weight, grad_bias, None, None, None


def on_maps(values: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, 1)."""
    return values.view(1, -1, 1, 1)


def at_least_float(x: Tensor) -> Tensor:
    """Half precision to float32; statistics need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
