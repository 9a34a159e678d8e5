"""Where the time of a training step goes: its parts, and the operators of torch that take the most of it."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from allspark.bench.measure import Side, synchronize
from allspark.engine.stepper import set_precision

RUNS = 3
OPERATORS = 5  # that are named
LARGEST = "largest operators"


def describe_parts(side: Side, device: torch.device) -> str:
    """One line: shares of encoder, bottleneck, decoder and optimizer in the time of a step, and its largest operators.

    The shares are those of forward and backward passes together; "other" is augmentation, losses and what is between
    the parts. A device is waited for at every boundary, so a step that waits for its launches looks slower than it is.
    """
    set_precision(side.precision, device)
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in step_parts(side, device).items())
    operators = ", ".join(f"{name} {100 * share:.0f} %" for name, share in largest_operators(side, device).items())
    return f"{side.name}, {side.precision}: {shares}; {LARGEST}: {operators}"


class Stopwatch:
    """Seconds per part; `switch` ends the time of one part and starts that of another."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.part, self.since = device, "other", time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)

    def switch(self, part: str) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self.part] += now - self.since
        self.part, self.since = part, now


def step_parts(side: Side, device: torch.device) -> dict[str, float]:
    """Share of each part in the time of a step, by hooks on its modules; they add up to 1."""
    watch, handles = Stopwatch(device), []
    model, optimizer = side.model, side.optimizer
    for name in ("encoder", "bottleneck", "decoder"):
        if (module := getattr(model, name)) is not None:
            handles += [
                module.register_forward_pre_hook(lambda *_, name=name: watch.switch(name)),
                module.register_forward_hook(lambda *call, name=name: watch_output(watch, name, call[-1])),
            ]
    first = next(parameter for parameter in model.encoder.parameters() if parameter.requires_grad)
    handles += [
        first.register_post_accumulate_grad_hook(lambda _: watch.switch("other")),  # the last gradient of a step
        optimizer.register_step_pre_hook(lambda *_: watch.switch("optimizer")),
        optimizer.register_step_post_hook(lambda *_: watch.switch("other")),
    ]
    try:
        for _ in range(RUNS):
            side.run()
        watch.switch("other")
    finally:
        for handle in handles:
            handle.remove()
    total = sum(watch.seconds.values())
    return {name: watch.seconds[name] / total for name in sorted(watch.seconds, key=watch.seconds.get, reverse=True)}


def watch_output(watch: Stopwatch, name: str, output: Any) -> None:
    """The forward pass of a part ends here; its backward pass starts with the gradient of its output."""
    watch.switch("other")
    tensor: Tensor = output if isinstance(output, Tensor) else output[-1]  # the deepest map has its gradient last
    if tensor.requires_grad:
        tensor.register_hook(lambda _: watch.switch(name))


def largest_operators(side: Side, device: torch.device) -> dict[str, float]:
    """Share of the largest operators in the time of all, without what they call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(RUNS):
            side.run()
        synchronize(device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    seconds = {event.key: getattr(event, key) for event in profile.key_averages()}
    total = sum(seconds.values())
    return {name: seconds[name] / total for name in sorted(seconds, key=seconds.get, reverse=True)[:OPERATORS]}
