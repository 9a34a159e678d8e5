"""The processor of this machine: what decides the speed of a run and the last digits of its numbers."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # those that torch's products differ by


def cpu_info(key: str) -> str:
    """A value of the first processor of /proc/cpuinfo, such as 'model name'; empty where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key), "")


def cpu_name() -> str:
    return cpu_info("model name") or platform.processor() or platform.machine()


def is_amd() -> bool:
    return cpu_info("vendor_id") == "AuthenticAMD"


def describe_processor(device: torch.device) -> str:
    """'AMD EPYC (avx2, avx512f)', or the name of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    flags = cpu_info("flags").split()
    found = [name for name in INSTRUCTIONS if name in flags]
    return cpu_name() + (f" ({', '.join(found)})" if found else "")
