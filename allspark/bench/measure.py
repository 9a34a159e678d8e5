"""What the bench measures with: a clock for several sides in turn, peak memory, and counters of work and traffic."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from allspark.engine.stepper import set_precision
from allspark.memory_estimate import MemoryCounter, allocator_peak

Run = Callable[[], object]
aten = torch.ops.aten


@dataclass(frozen=True)
class Side:
    """One of those that are measured in turn. baseline: the one that the others of its case are compared with.

    clear: lets go of what a run leaves behind and the next one would replace, such as gradients.
    """

    name: str
    run: Run
    precision: str = "fp32"
    baseline: bool = False
    clear: Run | None = None


@dataclass(frozen=True)
class Work:
    """What a run takes. flops: of matrix products, convolutions and attention; moved_bytes: what its operations read
    and write; peak_bytes: of tensors at their most, beyond those that were there before.
    """

    flops: int
    moved_bytes: int
    peak_bytes: int


@dataclass
class Row:
    """What was measured of a side. seconds: of each run, which takes `images` images. Work, None: not measured.

    point: where it stands in a sweep.
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
    """A Row per side, timed in turn: in every round each side runs twice, and the second counts. In training a step
    follows its like, and does not find the caches of the processor and of malloc as another formulation left them.

    work: also how much it is and how much memory it takes, for which each side runs once more (on a GPU twice).
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
    """Wait until the device has done what it was told."""
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
    """The gradients of input and weight cost a forward pass each. torch's own formula leaves the groups out of the
    second, so that a depthwise convolution counts as a full one."""
    positions = x_shape if transposed else grad_shape
    return (output_mask[0] + output_mask[1]) * 2 * math.prod(positions) * math.prod(weight_shape[1:])


def count_work(side: Side, device: torch.device) -> Work:
    """On a GPU the peak is that of torch's allocator, which sees what kernels take for themselves, too."""
    if side.clear is not None:
        side.clear()
    peak = allocator_peak(side.run, device) if device.type == "cuda" else None
    memory = MemoryCounter()
    counter = FlopCounterMode(display=False, custom_mapping={aten.convolution_backward: convolution_backward_flops})
    with counter, memory:
        side.run()
    return Work(counter.get_total_flops(), memory.moved, memory.peak if peak is None else peak)
