"""What happens between a loss and the next step: precision, backward pass, clipping, skipping, the optimizer's step."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from allspark.config import Recipe
from allspark.utils.errors import UserError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_precision(precision: str, device: torch.device) -> None:
    """fp32 means float32 on a GPU, too: tf32, with 10 bits of mantissa, has to be asked for.

    Raises UserError for a precision that the device does not have.
    """
    if precision in ("tf32", "fp16") and device.type != "cuda":
        what = "is arithmetic of NVIDIA GPUs" if precision == "tf32" else "needs a GPU: float16 is slow on a CPU"
        raise UserError(f"precision={precision} {what}, and this is a {device.type}; choose fp32 or bf16")
    if precision == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise UserError("precision=bf16 needs a GPU of the Ampere generation or younger; choose fp16 or fp32")
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16; a CPU without such instructions only emulates it, and is slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def set_deterministic(deterministic: bool) -> None:
    """Use algorithms that give the same bits each time; an operation that has none raises. On CPUs all do anyway."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Forward passes in here compute in the recipe's precision; weights stay float32."""
    if precision in AUTOCAST:
        return torch.autocast(device.type, AUTOCAST[precision])
    return contextlib.nullcontext()


def pass_size(recipe: Recipe, processes: int) -> int:
    """Labeled images that go through the network at once in each process; UserError where they do not come out even."""
    share = recipe.batch_size // processes
    size = min(recipe.micro_batch or share, share)
    if size and share % size:
        fitting = [number for number in range(1, share + 1) if share % number == 0]
        raise UserError(
            f"micro_batch={recipe.micro_batch}: batch_size={recipe.batch_size} over {processes} process(es) is {share} "
            f"images each; give one of {', '.join(map(str, fitting))}"
        )
    return size


def accumulating(network: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Passes of a step in here: their gradients are exchanged between processes once, with the last of them."""
    return contextlib.nullcontext() if last or not hasattr(network, "no_sync") else network.no_sync()


def mean_losses(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Each loss on average over those passes or steps that had it and a number for it, without its graph; NaN: none."""
    names = dict.fromkeys(name for part in parts for name in part)
    stacked = {name: torch.stack([part[name].detach().float() for part in parts if name in part]) for name in names}
    return {name: torch.where(values.isfinite(), values, math.nan).nanmean() for name, values in stacked.items()}


class Stepper:
    """Takes a step down a loss, after its backward pass or passes. One whose gradient is not finite changes nothing of
    the network and is counted, on the device: nobody waits to hear of it.

    skipped: such steps so far; in_row: how many were the last ones. clip_norm: largest norm of the gradient, None: any.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: str = "fp32",
        clip_norm: float | None = None,
    ) -> None:
        self.optimizer, self.clip_norm = optimizer, clip_norm
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.skipped = torch.zeros((), dtype=torch.long, device=self.device)
        self.in_row = torch.zeros((), dtype=torch.long, device=self.device)
        self.buffers = list(model.buffers())
        self.kept = [buffer.clone() for buffer in self.buffers]  # before the forward pass

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, or of a part of it: they add up until the step."""
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.clip_norm is not None:
            torch._foreach_mul_(gradients, (self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        self.optimize(norm.isfinite())
        self.optimizer.zero_grad()  # here, so that the next forward pass has their memory

    def optimize(self, finite: Tensor) -> None:
        """The fused kernels look at found_inf themselves; without them the weights are asked for, and waited for."""
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # it found the same
            self.scaler.update()
        elif self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = (~finite).float()
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        self.skipped += ~finite
        self.in_row += 1
        self.in_row *= ~finite
        for buffer, kept in zip(self.buffers, self.kept, strict=True):  # statistics, memory: what the batch wrote
            torch.where(finite, buffer, kept, out=kept)
            buffer.copy_(kept)

    def keep(self) -> None:
        """After buffers were changed by something else than a forward pass: a checkpoint, the end of an epoch."""
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            kept.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        counts = {"skipped": int(self.skipped), "in_row": int(self.in_row)}
        return {"optimizer": self.optimizer.state_dict(), "stepper": {"scaler": self.scaler.state_dict(), **counts}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        fused = self.optimizer.defaults.get("fused")  # as this device has it, not the one that the state comes from
        groups = [{**group, "fused": fused} for group in state["optimizer"]["param_groups"]]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if "stepper" in state:  # younger than some checkpoints
            self.scaler.load_state_dict(state["stepper"]["scaler"])
            self.skipped.fill_(state["stepper"]["skipped"])
            self.in_row.fill_(state["stepper"]["in_row"])
