"""From the loss to the weights: precision, backward pass, clipping, skipped steps, and the optimizer step."""

from __future__ import annotations

import contextlib
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from allspark.config import Recipe
from allspark.engine.async_read import DELAY, start_read
from allspark.engine.onednn import use_onednn
from allspark.utils.errors import UserError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_precision(precision: str, device: torch.device) -> None:
    """Set how float32 matrix products are computed; tf32, with 10 bits of mantissa, is used only on request.

    Raises:
        UserError: the device does not support the precision.
    """
    if precision in ("tf32", "fp16") and device.type != "cuda":
        what = "is only available on NVIDIA GPUs" if precision == "tf32" else "needs a GPU: float16 is slow on a CPU"
        raise UserError(f"precision={precision} {what}, and this device is {device.type}; choose fp32 or bf16")
    if precision == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise UserError("precision=bf16 needs a GPU of the Ampere generation or newer; choose fp16 or fp32")
    use_onednn(device.type == "cpu" and precision == "fp32")  # in bf16 torch does so itself
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16; a CPU without bf16 instructions only emulates it, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def set_deterministic(deterministic: bool) -> None:
    """Use deterministic algorithms; an operation that has none raises an error. CPUs are deterministic anyway."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Context for forward passes in the recipe's precision; weights stay float32."""
    if precision in AUTOCAST:
        return torch.autocast(device.type, AUTOCAST[precision])
    return contextlib.nullcontext()


def micro_batch_size(recipe: Recipe, world_size: int) -> int:
    """Labeled images in one forward pass of each process.

    Raises:
        UserError: the images of a process cannot be divided evenly.
    """
    share = recipe.batch_size // world_size
    size = min(recipe.micro_batch or share, share)
    if size and share % size:
        divisors = [number for number in range(1, share + 1) if share % number == 0]
        raise UserError(
            f"micro_batch={recipe.micro_batch}: batch_size={recipe.batch_size} over {world_size} process(es) is "
            f"{share} images each; give one of {', '.join(map(str, divisors))}"
        )
    return size


def sync_gradients(network: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
    """Context for a micro-batch: whether DDP exchanges gradients. Only the last micro-batch of a step needs to."""
    return contextlib.nullcontext() if enabled or not hasattr(network, "no_sync") else network.no_sync()


def mean_losses(losses: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each loss over the micro-batches or steps that have it and where it is finite; NaN if there is none."""
    names = dict.fromkeys(name for part in losses for name in part)
    stacked = {name: torch.stack([part[name].detach().float() for part in losses if name in part]) for name in names}
    return {name: torch.where(values.isfinite(), values, math.nan).nanmean() for name, values in stacked.items()}


class Stepper:
    """Optimizer step with loss scaling and clipping.

    A step with a non-finite gradient leaves the parameters and buffers of the model unchanged. It is counted on the
    device, without a host sync.

    Args:
        model: network whose buffers (statistics, memory) are restored after a skipped step.
        optimizer: of its parameters.
        precision: "fp16" scales the loss.
        clip_norm: maximum norm of the gradient; None: not clipped.

    Attributes:
        skipped: number of skipped steps so far, on the device.
        consecutive_skipped: number of consecutive skipped steps up to now, on the device.
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
        self.consecutive_skipped = torch.zeros((), dtype=torch.long, device=self.device)
        self.pending: deque[Callable[[], int]] = deque()  # reads of consecutive_skipped that have been started
        self.buffers = list(model.buffers())
        self.saved_buffers = [buffer.clone() for buffer in self.buffers]  # as before the forward pass

    def backward(self, loss: Tensor) -> None:
        """Backward pass; the gradients of several losses add up until the step."""
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        """Update the weights, or skip the step if a gradient is not finite."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.clip_norm is not None:
            torch._foreach_mul_(gradients, (self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        finite = norm.isfinite()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # skips the step if a gradient is not finite
            self.scaler.update()
        elif self.optimizer.defaults.get("fused"):  # fused kernels check found_inf on the device
            self.optimizer.found_inf = (~finite).float()
            self.optimizer.step()
        elif finite:  # a host sync
            self.optimizer.step()
        self.skipped += ~finite
        self.consecutive_skipped += 1
        self.consecutive_skipped *= ~finite
        for buffer, saved in zip(self.buffers, self.saved_buffers, strict=True):
            torch.where(finite, buffer, saved, out=saved)
            buffer.copy_(saved)
        self.optimizer.zero_grad()  # here, so that the next forward pass can use their memory

    def poll_skipped(self) -> int:
        """Call after a step: `consecutive_skipped` without a host sync; on a GPU, that of DELAY steps ago."""
        self.pending.append(start_read(self.consecutive_skipped))
        if len(self.pending) <= (DELAY if self.device.type == "cuda" else 0):
            return 0
        return self.pending.popleft()()

    def save_buffers(self) -> None:
        """Call after the buffers were changed by anything but a forward pass: loading, the end of an epoch."""
        for buffer, saved in zip(self.buffers, self.saved_buffers, strict=True):
            saved.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        counts = {"skipped": int(self.skipped), "in_row": int(self.consecutive_skipped)}
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])  # a tensor with CUDA graphs
        return {"optimizer": optimizer, "stepper": {"scaler": self.scaler.state_dict(), **counts}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # Keep this device's flags and type of lr, a float or with CUDA graphs a tensor; lr is set before every step
        own = [{k: each[k] for k in ("fused", "lr", "capturable") if k in each} for each in self.optimizer.param_groups]
        saved = state["optimizer"]["param_groups"]
        groups = [{**group, **flags} for group, flags in zip(saved, own, strict=True)]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if "stepper" in state:  # missing in older checkpoints
            self.scaler.load_state_dict(state["stepper"]["scaler"])
            self.skipped.fill_(state["stepper"]["skipped"])
            self.consecutive_skipped.fill_(state["stepper"]["in_row"])
