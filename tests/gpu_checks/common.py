"""A training step of any method on random images, and how checks compare and time."""

from __future__ import annotations

import gc
import hashlib
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from allspark.build import build_method, complete
from allspark.config_io import load_recipe
from allspark.cuda_graph import build_graphs
from allspark.data.batch import LabeledBatch, UnlabeledBatch
from allspark.data.datasets import spec_for
from allspark.engine.optim import build_optimizer
from allspark.engine.position import Position
from allspark.engine.stepper import Stepper, set_deterministic, set_precision
from allspark.models.segmentor import build_model
from allspark.train_step import TrainState, train_step

ROOT = Path(__file__).resolve().parents[2]
METHODS = ["supervised", "selftrain", "fixmatch", "unimatch", "unimatch_v2", "imas", "maskmatch", "pseudoseg"]
METHODS += ["allspark", "allspark_revised", "fixmatch_r50", "unimatch_r50"]
CASES = [
    (method, bottleneck)
    for method, bottleneck in itertools.product(METHODS, ("none", "allspark"))
    if not (method == "supervised" and bottleneck == "allspark")
]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NULL = "NULL_CUDA" in os.environ  # rehearsal with a stub in place of the CUDA libraries: values mean nothing
if NULL:
    os.environ.pop("LD_PRELOAD", None)
    torch.backends.cuda.enable_cudnn_sdp(False)
WAITS = {"imas"}  # methods that wait for the device once a step
DEVICE = "cpu" if NULL else "cuda"  # of the processes that are started
NO_DROPOUT = {"model.drop_path": 0.0, "model.dropout": 0.0, "model.bottleneck.dropout": 0.0}


class Failed(Exception):
    """A check that did not pass; the message says why."""


def require(condition: bool, why: str) -> None:
    """Fail the check. Values are not checked in a rehearsal."""
    if not condition and not NULL:
        raise Failed(why)


class RecordingStepper(Stepper):
    """Remembers the norm of the gradient, and does the rest as always."""

    norm = torch.zeros(())

    def step(self) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        super().step()


class Trainer:
    """A recipe on random images of one size, as train.py would train it."""

    def __init__(
        self,
        method: str,
        bottleneck: str = "none",
        device: torch.device = GPU,
        *,
        precision: str = "fp32",
        images: int = 2,
        crop: int = 0,
        **overrides: Any,
    ) -> None:
        crop = crop or (129 if (method, bottleneck) == ("maskmatch", "allspark") else 65)
        encoder = {} if method.endswith(("_r50", "_r101")) else {"model.encoder": "mit_b0"}
        values = {"precision": precision, "data.crop_size": crop, "batch_size": images, "model.pretrained": "none"}
        values |= {"model.bottleneck.name": bottleneck, "cuda_graph": False, **encoder, **overrides}
        self.recipe = complete(load_recipe("pascal", method, values))
        self.spec, self.device = spec_for(self.recipe.data), device
        set_precision(precision, device)
        set_deterministic(self.recipe.deterministic)
        torch.manual_seed(0)
        with CPU if NULL else device:  # where weights are drawn
            self.model = build_model(self.recipe.model, self.spec.num_classes, crop).to(device).train()
        self.method = build_method(self.recipe, self.spec).to(device)
        self.method.attach(self.model)
        optimizer = build_optimizer(self.recipe.optim, self.model)
        self.stepper = RecordingStepper(self.model, optimizer, precision, self.recipe.optim.clip_norm)
        if self.recipe.compile:
            self.model.compile_parts()
        graphs = build_graphs(self.recipe, self.method, self.stepper)
        self.state = TrainState(self.recipe, self.model, self.method, self.stepper, 1000, graphs)

    def batch(self, seed: int = 0) -> tuple[LabeledBatch, UnlabeledBatch | None]:
        generator = torch.Generator().manual_seed(seed)
        images, crop, views = self.recipe.batch_size, self.recipe.data.crop_size, self.method.views

        def image() -> Tensor:
            coarse = torch.randint(256, (images, 3, 9, 9), generator=generator).float()
            smooth = F.interpolate(coarse, (crop, crop), mode="bilinear")
            return (smooth + torch.randint(-20, 21, smooth.shape, generator=generator)).clamp(0, 255).byte()

        coarse = torch.randint(self.spec.num_classes, (images, 1, 4, 4), generator=generator).float()
        mask = F.interpolate(coarse, (crop, crop))[:, 0].long()
        mask[:, :3] = 255
        labeled = LabeledBatch(image(), mask).to(self.device)
        if not views.unlabeled:
            return labeled, None
        valid = torch.ones(images, crop, crop, dtype=torch.bool)
        valid[:, -5:] = False
        box = torch.zeros_like(valid)
        box[:, crop // 4 : crop // 2, crop // 3 : -crop // 4] = True
        strong = tuple(image() for _ in views.strong)
        return labeled, UnlabeledBatch(image(), strong, valid, tuple(box for _ in strong)).to(self.device)

    def step(self, batch: tuple, number: int = 0) -> dict[str, Tensor]:
        """One step in epoch 50, in which the memory is read."""
        return train_step(self.state, *batch, Position(50, number), self.recipe.optim.lr)

    def steps(self, count: int, first: int = 0) -> list[float]:
        losses = [self.step(self.batch(number), number)["loss"] for number in range(first, first + count)]
        return torch.stack(losses).tolist()

    def content(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "method": self.method.state_dict(), **self.stepper.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.method.load_state_dict(state["method"])
        self.stepper.load_state_dict(state)
        self.stepper.save_buffers()


def moments(trainer: Trainer) -> list[Tensor]:
    """What the optimizer keeps of each weight, but for counts of steps."""
    states = trainer.stepper.optimizer.state.values()
    return [value for state in states for name, value in state.items() if name != "step" and isinstance(value, Tensor)]


def digest(*values: Any) -> str:
    """sha256 of all tensors in nested states, in order."""
    parts: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            parts.append(value.detach().contiguous().view(-1).view(torch.uint8).to(GPU))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            collect(item)

    collect(values)
    return hashlib.sha256(torch.cat(parts).cpu().numpy().tobytes()).hexdigest()


class DrawnOnCPU(TorchFunctionMode):
    """Random numbers are drawn on the CPU whatever the device, so that two devices see the same ones."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.rand, torch.randint, torch.randperm, torch.randn):
            device = kwargs.pop("device", None)
            drawn = func(*args, **kwargs)
            return drawn if device is None else drawn.to(device)
        if func is Tensor.bernoulli_:
            return args[0].copy_(torch.empty(args[0].shape).bernoulli_(*args[1:]))
        if func is F.dropout2d and kwargs.get("training", True):
            x, rate = args[0], args[1] if len(args) > 1 else kwargs["p"]
            keep = torch.empty(x.shape[:2]).bernoulli_(1 - rate).to(x)[..., None, None]
            return x * keep / (1 - rate)
        return func(*args, **kwargs)


def relative(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
    return ((value - reference).norm() / reference.norm().clamp(min=1e-30)).item()


def timed(run: Callable[[], object], warmup: int = 3, repeats: int = 10) -> float:
    """Median milliseconds of a run, by CUDA events."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def profile(run: Callable[[], object], table: Path | None = None) -> dict[str, float]:
    """Kernel launches and GPU-busy milliseconds of one run; the host's own milliseconds, without waiting."""
    torch.cuda.synchronize()
    start, cpu = time.perf_counter(), time.process_time()
    run()
    host, cpu = time.perf_counter() - start, time.process_time() - cpu
    torch.cuda.synchronize()
    if NULL:
        return {"host_ms": host * 1e3}
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        run()
        torch.cuda.synchronize()
    kernels = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.device_time_total for event in kernels) / 1e3
    if table is not None:
        averages = recorded.key_averages()
        text = averages.table(sort_by="self_device_time_total", row_limit=45, max_name_column_width=90)
        table.write_text(text + "\n" + averages.table(sort_by="count", row_limit=30, max_name_column_width=90))
    return {"launches": len(kernels), "gpu_ms": busy, "host_ms": host * 1e3, "host_cpu_ms": cpu * 1e3}
