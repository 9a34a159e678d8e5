"""The machine of a benchmark: its description, and the two rates that bound every step on it."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from allspark.bench.measure import Run, timed
from allspark.engine.stepper import AUTOCAST, has_bf16, set_precision
from allspark.memory_estimate import main_memory
from allspark.utils.parallel import usable_cores
from allspark.utils.processor import cpu_name

# Environment variables with these prefixes affect the speed
ALLOCATOR = ("MALLOC_", "LD_PRELOAD", "PYTORCH_", "OMP_", "GOMP_", "MKL_", "KMP_")
LEAST_SECONDS = 0.3  # minimum time for which a rate is measured


def describe(device: torch.device) -> dict[str, Any]:
    """CPU, cores, threads, memory, versions, and environment variables that affect the speed."""
    found = {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "ram_gb": round(main_memory() / 1e9, 1),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": has_bf16(device),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(ALLOCATOR)},
        "device": device.type,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpu_memory_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
    return found


def floor(device: torch.device, precisions: list[str]) -> dict[str, float]:
    """FLOP/s of a large matrix product by precision, and bytes/s of a copy ("copy"), each the best of several runs."""
    rates = {precision: matrix_rate(device, precision) for precision in dict.fromkeys(precisions)}
    return {**rates, "copy": copy_rate(device)}


def matrix_rate(device: torch.device, precision: str) -> float:
    set_precision(precision, device)
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(AUTOCAST.get(precision, torch.float32)) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: a @ b, device)


def copy_rate(device: torch.device) -> float:
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / best_seconds(lambda: target.copy_(source), device)


def best_seconds(run: Run, device: torch.device) -> float:
    timed(run, device)
    seconds: list[float] = []
    while sum(seconds) < LEAST_SECONDS:
        seconds.append(timed(run, device))
    return min(seconds)
