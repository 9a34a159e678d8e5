"""Choosing the device of a process, and explaining why CUDA cannot be used."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from allspark.utils.errors import UserError

# Environment variables that indicate allocated GPUs, and their values that mean none
ALLOCATIONS = {
    "SLURM_STEP_GPUS": ("",),
    "SLURM_JOB_GPUS": ("",),
    "SLURM_GPUS_ON_NODE": ("", "0"),
    "CUDA_VISIBLE_DEVICES": ("", "-1", "NoDevFiles"),
}
USE_CPU = "device=cpu for train.py, --device cpu for other commands"


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device of this process.

    Args:
        name: cuda, mps or cpu; auto takes the first of these that is available.
        local_rank: number of this process on its node. Processes take the visible GPUs in turn.

    Raises:
        UserError: the device is not available, or auto would fall back to the CPU although GPUs were allocated.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        if not available["cuda"] and (variable := gpus_allocated()):
            raise UserError(
                f"{variable}={os.environ[variable]} gives this process a GPU, but CUDA cannot be used: "
                f"{why_no_cuda(torch.version.cuda, driver_cuda())}; or use the CPU: {USE_CPU}"
            )
        name = next(kind for kind, is_available in available.items() if is_available)
    if not available.get(name, False):
        reason = f": {why_no_cuda(torch.version.cuda, driver_cuda())}" if name == "cuda" else ""
        usable = ", ".join(kind for kind, is_available in available.items() if is_available)
        raise UserError(f"device={name} is not available on this machine{reason}; choose one of auto, {usable}")
    if name != "cuda":
        return torch.device(name)
    device = torch.device("cuda", local_rank % torch.cuda.device_count())  # each task may see only its own GPU
    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    check_architecture(name, capability, torch.cuda.get_arch_list(), driver_cuda())
    return device


def gpus_allocated() -> str | None:
    """The environment variable that indicates an allocated GPU, or None."""
    return next((name for name, none in ALLOCATIONS.items() if os.environ.get(name, "") not in none), None)


def why_no_cuda(built_for: str | None, supported: tuple[int, int] | None) -> str:
    """Why torch.cuda.is_available() is False, in one sentence with the command that helps.

    Args:
        built_for: torch.version.cuda, such as 13.0; None for a torch without CUDA.
        supported: what `driver_cuda` returns.
    """
    if built_for is None:
        return f"torch {torch.__version__} was built without CUDA; {reinstall(supported)}"
    if supported is None:
        return "no NVIDIA driver was found; start the job on a node with a GPU, or install the driver"
    if supported[0] < int(built_for.partition(".")[0]):
        return (
            f"driver {driver_version()} supports CUDA {supported[0]}.{supported[1]}, torch {torch.__version__} needs "
            f"CUDA {built_for}; {reinstall(supported)}, or update the driver"
        )
    return "the driver reports no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"


def reinstall(cuda: tuple[int, int] | None, capability: tuple[int, int] | None = None) -> str:
    """The pip command for the newest torch that driver and GPU can run; as scripts/setup.sh chooses it.

    Args:
        cuda: the newest CUDA version that the driver supports; None: unknown.
        capability: compute capability of the GPU; None: unknown.
    """
    major, index = 13 if cuda is None else cuda[0], ""
    if major < 12:
        index = "cu118"
    elif major == 12:
        index = "cu128" if cuda >= (12, 8) and capability is not None and capability >= (10, 0) else "cu126"
    elif capability is not None and capability < (7, 5):
        index = "cu126"
    options = f" --index-url https://download.pytorch.org/whl/{index}" if index else ""
    return f"install a torch that fits: pip install --force-reinstall torch torchvision{options}"


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the NVIDIA driver supports; None without a driver."""
    number = ctypes.c_int()
    try:  # torch does not tell it
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return (number.value // 1000, number.value % 1000 // 10) if number.value else None


def driver_version() -> str:
    """The version of the NVIDIA driver, such as 535.183.01."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        words = []
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "of an unknown version")


def check_architecture(
    name: str, capability: tuple[int, int], compiled: Sequence[str], cuda: tuple[int, int] | None = None
) -> None:
    """Raise UserError unless torch has kernels for this GPU.

    Args:
        name: of the GPU.
        capability: its compute capability, such as (7, 0).
        compiled: torch.cuda.get_arch_list(). sm_XY runs on X.Y and later minor versions, compute_XY on all later ones.
            Other names (gfx90a, of ROCm) are ignored; without any sm_ or compute_ name nothing is checked.
        cuda: what `driver_cuda` returns.
    """
    found = [match for each in compiled if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", each))]
    versions = [(match[1], (int(match[2]), int(match[3]))) for match in found]
    if not versions:
        return
    for kind, version in versions:
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return
    remedy = reinstall(cuda, capability)
    if capability >= (10, 0) and cuda is not None and cuda < (12, 8):
        remedy = f"update the driver, whose CUDA {cuda[0]}.{cuda[1]} does not know this GPU; then {reinstall(None)}"
    raise UserError(
        f"{name} has compute capability {capability[0]}.{capability[1]}, torch {torch.__version__} has kernels for "
        f"{', '.join(compiled)}; {remedy}, or use the CPU: {USE_CPU}"
    )
