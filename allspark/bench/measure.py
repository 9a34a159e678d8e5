"""Measuring tools of the benchmark: time of several implementations in turn, peak memory, operations and traffic."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

from allspark.engine.stepper import set_precision
from allspark.memory_estimate import MemoryCounter, allocator_peak

Run = Callable[[], object]
aten = torch.ops.aten


@dataclass(frozen=True)
class Side:
    """One of the implementations that are compared.

    Args:
        name: in the tables.
        run: one run.
        precision: of the run.
        baseline: whether the others of its case are compared with it.
        clear: frees what a run leaves behind and the next run would replace, such as gradients.
        model, optimizer: of a training step whose parts are timed.
    """

    name: str
    run: Run
    precision: str = "fp32"
    baseline: bool = False
    clear: Run | None = None
    model: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None


@dataclass(frozen=True)
class Work:
    """Cost of a run.

    Args:
        flops: of matrix products, convolutions and attention.
        moved_bytes: read and written by its operations.
        peak_bytes: peak memory beyond the tensors that existed before.
    """

    flops: int
    moved_bytes: int
    peak_bytes: int


@dataclass
class Row:
    """Measurements of a side.

    Args:
        case, side, precision, baseline: what was measured.
        seconds: time of each run.
        images: images per run; None: not counted.
        work: cost of a run; None: not measured.
        point: value of the varied parameter in a sweep.
    """

    case: str
    side: str
    precision: str
    seconds: list[float]
    baseline: bool = False
    images: int | None = None
    work: Work | None = None
    point: dict[str, Any] = field(default_factory=dict)


def measure(
    case: str,
    sides: Sequence[Side],
    repeats: int,
    device: torch.device,
    *,
    images: int | None = None,
    work: bool = True,
) -> list[Row]:
    """Time the sides in turn; in every round each side runs twice, and the second run counts.

    As in training, a run then follows one of its kind, and does not find the caches of the processor and of malloc as
    another implementation left them.

    Args:
        case: title of the comparison.
        sides: implementations to compare.
        repeats: rounds.
        device: to wait for.
        images: images per run.
        work: also measure the cost, with one more run of each side (on a GPU two).

    Returns:
        A Row per side.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    with tqdm(total=repeats * len(sides), desc=case, unit="turn", leave=False, disable=None) as bar:
        for _ in range(repeats):
            for side, runs in zip(sides, seconds, strict=True):
                set_precision(side.precision, device)
                side.run()
                runs.append(timed(side.run, device))
                bar.update()
    rows = []
    for side, runs in zip(sides, seconds, strict=True):
        set_precision(side.precision, device)
        rows.append(Row(case, side.name, side.precision, runs, side.baseline, images))
        if work:
            rows[-1].work = count_work(side, device)
    return rows


def timed(run: Run, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    """FLOPs of a convolution's backward pass: the gradients of input and weight cost a forward pass each.

    torch's own formula ignores the groups for the weight, so that a depthwise convolution counts as a full one.
    """
    positions = x_shape if transposed else grad_shape
    return (output_mask[0] + output_mask[1]) * 2 * math.prod(positions) * math.prod(weight_shape[1:])


def attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """FLOPs of fused attention on a CPU, which torch's counter does not know before 2.15."""
    return sdpa_flop_count(q, k, v)


def attention_backward_flops(
    grad: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


FLOPS = {
    aten.convolution_backward: convolution_backward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def count_work(side: Side, device: torch.device) -> Work:
    """Cost of a run; on a GPU the peak is that of torch's allocator, which includes workspaces of kernels."""
    if side.clear is not None:
        side.clear()
    peak = allocator_peak(side.run, device) if device.type == "cuda" else None
    memory = MemoryCounter()
    counter = FlopCounterMode(display=False, custom_mapping=FLOPS)
    with counter, memory:
        side.run()
    return Work(counter.get_total_flops(), memory.moved, memory.peak if peak is None else peak)
