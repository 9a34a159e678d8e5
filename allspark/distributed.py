"""Process group: who am I, and the few collectives that are used. Without a launcher everything is one process."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from allspark.errors import UserError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """'auto' is the best device there is: cuda, mps, cpu. A device asked for by name and absent is an error."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name, False):
        usable = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"device={name} is not available on this machine; use one of: auto, {usable}")
    if name != "cuda":
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this node has no GPU: {torch.cuda.device_count()} visible; start fewer processes"
        )
    return torch.device("cuda", local_rank)


def launched_by() -> tuple[int, int, int]:
    """(rank, world size, local rank) as told by torchrun or srun; (0, 1, 0) for plain python.

    SLURM_NTASKS is also set in a batch script that runs plain python: only srun sets the number of tasks of the step.
    """
    env = os.environ
    if "WORLD_SIZE" in env and "RANK" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if "SLURM_STEP_NUM_TASKS" in env:
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", 0))
    return 0, 1, 0


def init(device: str = "auto", port: int | None = None) -> torch.device:
    """The device of this process; joins a process group (NCCL on GPUs, else gloo) if a launcher started several."""
    rank_, world, local_rank = launched_by()
    if world > 1 and not torch.cuda.is_available():
        if device == "mps":
            raise UserError("device=mps takes one process: gloo has no collectives on it; start one, or device=cpu")
        device = "cpu" if device == "auto" else device
    if int(os.environ.get("SLURM_STEP_NUM_NODES", 1)) > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError("srun over several nodes without MASTER_ADDR; start it with sbatch scripts/slurm_train.sh")
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1 and not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(port or 29500))
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank_, world_size=world, timeout=timedelta(minutes=30))
    return chosen


@contextmanager
def process_group(device: str = "auto", port: int | None = None) -> Iterator[torch.device]:
    """init, and its end. One process of several that fails leaves at once, with its message.

    To leave a group in order is collective, too: it would wait for processes that wait for this one. The launcher
    then ends them.
    """
    chosen = init(device, port)
    try:
        yield chosen
    except BaseException as error:
        if world_size() == 1:
            raise
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, UserError) else 1)
    if dist.is_initialized():
        dist.destroy_process_group()


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
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """Every process gets the tensor of `source`, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, source)
    return tensor


def all_gather(tensor: Tensor) -> Tensor:
    """Tensors (B, ...) of equal shape on all processes -> (P * B, ...) in rank order, without gradient."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def share_batchnorm_statistics(model: nn.Module) -> None:
    """Running statistics of process 0 for all: without SyncBatchNorm (CPUs) each has seen its own images only."""
    if world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


def all_finite(model: nn.Module) -> bool:
    """Whether every parameter is a number on every process; the same answer on all of them."""
    bad = torch.stack([~parameter.isfinite().all() for parameter in model.parameters()]).sum()
    return all_reduce_sum(bad).item() == 0
