"""Rank, world size, and the collectives that training uses. A process that was started alone has a world of one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Maximum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """Copy the tensor of rank 0 to all processes, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def all_gather(tensor: Tensor) -> Tensor:
    """Concatenate tensors (B, ...) of equal shape from P processes to (P * B, ...), in rank order, without gradient."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def share_batchnorm_statistics(model: nn.Module) -> None:
    """Copy the running statistics of rank 0 to all; without SyncBatchNorm (on CPUs) each rank has its own."""
    if world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


def all_finite(model: nn.Module) -> bool:
    """Whether every parameter is finite on every process; all processes get the same answer."""
    bad = torch.stack([~parameter.isfinite().all() for parameter in model.parameters()]).sum()
    return all_reduce_sum(bad).item() == 0
