"""Weights in the precision of autocast, cast together and once per training pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from allspark.models.mit import LayerNorm

LAYERS = (nn.Linear, nn.Conv2d)  # not their subclasses, which may need float32 weights
GPU_LAYERS = (*LAYERS, LayerNorm)
GROUP = 100  # tensors; in several groups, so that DDP can start to exchange gradients before all are ready


@contextmanager
def cast_weights(encoders: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """In this context, linear layers and convolutions, on a GPU also MiT's norms, have weights and biases of the dtype.

    The forward pass is the same as under autocast, which would cast each weight with its own kernel, and again after
    each pass without gradients (eval_mode clears its cache). The backward pass may come later; it gives the parameters
    their gradients.

    Args:
        encoders: their layers only call F.linear and F.conv2d with these weights.
        dtype: of autocast.
    """
    modules = [module for encoder in encoders for module in encoder.modules()]
    kinds = LAYERS if next(modules[0].parameters()).is_cpu else GPU_LAYERS
    layers = [module for module in modules if type(module) in kinds]
    slots = [(layer._parameters, name) for layer in layers for name in ("weight", "bias") if name in layer._parameters]
    slots = [(parameters, name) for parameters, name in slots if parameters[name] is not None]
    originals = [parameters[name] for parameters, name in slots]
    copies: list[Tensor] = []
    for start in range(0, len(originals), GROUP):
        copies += Cast.apply(dtype, *originals[start : start + GROUP])
    try:
        for (parameters, name), copy in zip(slots, copies, strict=True):
            parameters[name] = copy
        yield
    finally:
        for (parameters, name), original in zip(slots, originals, strict=True):
            parameters[name] = original


class Cast(torch.autograd.Function):
    """Tensors -> tensors of another dtype, and their gradients back, with a few kernels for all of them."""

    @staticmethod
    def forward(ctx: FunctionCtx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # no gradient of an unused layer
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        copies = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
        torch._foreach_copy_(copies, tensors)
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(copy for copy, need in zip(copies, needed, strict=True) if not need))
        return copies

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [grad for grad in grads if grad is not None]
        copies = [torch.empty_like(grad, dtype=torch.float32) for grad in found]
        torch._foreach_copy_(copies, found)
        remaining = iter(copies)
        return None, *(None if grad is None else next(remaining) for grad in grads)
