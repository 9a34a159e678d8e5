"""What the bench measures with: a clock for several sides in turn, peak memory, and counters of work and traffic."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from allspark.engine.step import set_precision

Run = Callable[[], object]
aten = torch.ops.aten


@dataclass(frozen=True)
class Side:
    """One of those that are measured in turn. baseline: the one that the others of its case are compared with."""

    name: str
    run: Run
    precision: str = "fp32"
    baseline: bool = False


@dataclass
class Row:
    """What was measured of a side. seconds: of each run, which takes `images` images; peak_bytes: what it needs at its
    peak beyond what is there before it; flops, moved_bytes: what its operations compute, and read and write.
    None: not measured. point: where it stands in a sweep.
    """

    case: str
    side: str
    precision: str
    seconds: list[float]
    baseline: bool = False
    images: int | None = None
    peak_bytes: int | None = None
    flops: int | None = None
    moved_bytes: int | None = None
    point: dict[str, Any] = field(default_factory=dict)


def measure(
    case: str,
    sides: Sequence[Side],
    repeats: int,
    device: torch.device,
    *,
    images: int | None = None,
    inside: bool = True,
) -> list[Row]:
    """A Row per side, timed in turn: a round of warm-up, then in every round each side once.

    inside: also peak memory, operations and bytes, for which each side runs twice more.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    with tqdm(total=(repeats + 1) * len(sides), desc=case, unit="run", leave=False, disable=None) as bar:
        for _ in range(repeats + 1):
            for side, runs in zip(sides, seconds, strict=True):
                set_precision(side.precision, device)
                runs.append(timed(side.run, device))
                bar.update()
    rows = []
    for side, runs in zip(sides, seconds, strict=True):
        set_precision(side.precision, device)
        rows.append(Row(case, side.name, side.precision, runs[1:], side.baseline, images))
        if inside:
            rows[-1].peak_bytes = peak_extra(side.run, device)
            rows[-1].flops, rows[-1].moved_bytes = count_work(side.run)
    return rows


def timed(run: Run, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_extra(run: Run, device: torch.device) -> int | None:
    """Bytes that a run needs at its peak beyond what is there before it.

    GPU: of torch's allocator. CPU: resident pages of the process, where Linux counts them; None elsewhere.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else pages that were freed and kept would not count when used again
        Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
        before = status_bytes("VmRSS")
    except (OSError, AttributeError):  # no Linux, no glibc, or not allowed
        return None
    run()
    return status_bytes("VmHWM") - before


def status_bytes(key: str, process: int | str = "self") -> int:
    """A line of /proc/<process>/status, in bytes; OSError where there is none."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{process}/status has no {key}")


class Traffic(TorchDispatchMode):
    """moved: bytes of the tensors that operations take and give, views left out. What a kernel keeps to itself or
    reads twice does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = (leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))
            self.moved += sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
        return result


def convolution_backward_flops(
    grad_shape: Sequence[int],
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Sequence[bool],
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """The gradients of input and weight cost a forward pass each. torch's own formula leaves the groups out of the
    second, so that a depthwise convolution counts as a full one."""
    positions = x_shape if transposed else grad_shape
    return (output_mask[0] + output_mask[1]) * 2 * math.prod(positions) * math.prod(weight_shape[1:])


def count_work(run: Run) -> tuple[int, int]:
    """(floating-point operations of matrix products, convolutions and attention; bytes moved) of a run."""
    traffic = Traffic()
    counter = FlopCounterMode(display=False, custom_mapping={aten.convolution_backward: convolution_backward_flops})
    with counter, traffic:
        run()
    return counter.get_total_flops(), traffic.moved
