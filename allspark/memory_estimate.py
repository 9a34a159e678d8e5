"""Memory of a training step: predicted with fake tensors, which have sizes but no data, or measured by real steps."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from allspark.config import Recipe, height_width
from allspark.data.batch import LabeledBatch, UnlabeledBatch
from allspark.data.spec import DatasetSpec
from allspark.engine.optim import build_optimizer
from allspark.engine.position import Position
from allspark.engine.stepper import AUTOCAST, Stepper, micro_batch_size
from allspark.methods import Method
from allspark.models.segmentor import Segmentor, build_model
from allspark.train_step import TrainState, train_step

GB = 1e9
STEPS = 2  # to measure: all steps from the second on take the same memory


@dataclass(frozen=True)
class StepMemory:
    """Memory of a training step, in bytes.

    Args:
        peak: maximum of all tensors together.
        persistent: what remains between two steps, by name.
    """

    peak: int
    persistent: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in self.persistent.items() if size)
        rest = self.peak - sum(self.persistent.values())
        return f"{self.peak / GB:.2f} GB at its peak ({parts}, activations and the rest {rest / GB:.2f})"


class TrainingStep:
    """Steps of a recipe in its last epoch, as train.py makes them, on random images.

    Args:
        recipe: see `recipe_per_process`.
        spec: data set.
        method: attached to the model.
        model: on the device.
    """

    def __init__(self, recipe: Recipe, spec: DatasetSpec, method: Method, model: Segmentor) -> None:
        model.train()
        stepper = Stepper(model, build_optimizer(recipe.optim, model), recipe.precision, recipe.optim.clip_norm)
        self.state = TrainState(recipe, model, method, stepper, total_steps=STEPS, graphs=None)
        self.size = (recipe.batch_size, *height_width(recipe.data.crop_size))
        self.spec = spec

    def batches(self) -> tuple[LabeledBatch, UnlabeledBatch | None]:
        views, device = self.state.method.views, self.state.device

        def image() -> Tensor:
            batch, height, width = self.size
            return torch.randint(256, (batch, self.spec.channels, height, width), dtype=torch.uint8, device=device)

        mask = torch.randint(self.spec.num_classes, self.size, device=device)
        labeled = LabeledBatch(image(), mask).to(device, self.spec.statistics)
        if not views.unlabeled:
            return labeled, None
        box = torch.zeros(self.size, dtype=torch.bool, device=device)
        strong, boxes = tuple(image() for _ in views.strong), tuple(box.clone() for _ in views.strong)
        return labeled, UnlabeledBatch(image(), strong, ~box, boxes).to(device, self.spec.statistics)

    def init_optimizer(self) -> None:
        """Create the optimizer's state, as the first step does."""
        for weight in self.state.stepper.parameters:
            weight.grad = torch.empty_like(weight)
        self.state.stepper.optimizer.step()
        self.state.stepper.optimizer.zero_grad()

    def run(self, step: int) -> None:
        recipe = self.state.recipe
        train_step(self.state, *self.batches(), Position(recipe.epochs - 1, step), recipe.optim.lr)

    def persistent(self) -> dict[str, int]:
        stepper, model = self.state.stepper, self.state.model
        optimizer = [value for values in stepper.optimizer.state.values() for value in values.values()]
        return {
            "weights": total_bytes(model.parameters()),
            "optimizer": total_bytes(value for value in optimizer if isinstance(value, Tensor)),
            "buffers and their copies": total_bytes(model.buffers()) + total_bytes(stepper.saved_buffers),
            "teacher": total_bytes(self.state.method.state_dict().values()),
        }


def recipe_per_process(recipe: Recipe, world_size: int) -> Recipe:
    """The recipe with the share of one process as its batch; of equal micro-batches two are enough to see the peak."""
    size = micro_batch_size(recipe, world_size)
    count = recipe.batch_size // world_size // size
    return replace(recipe, batch_size=size * min(count, 2), micro_batch=size)


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def predict_step(
    recipe: Recipe, spec: DatasetSpec, method: Method, device_type: str = "cpu", world_size: int = 1
) -> StepMemory:
    """Predict the memory of a step in one process; takes seconds on any machine.

    Args:
        recipe: complete.
        spec: data set.
        method: not attached yet.
        device_type: "cuda": with the kernels of a GPU. Their workspaces, the CUDA context and the gaps of the allocator
            are not included.
        world_size: number of processes that share the batch.
    """
    model = build_model(recipe.model, spec.num_classes, recipe.data.crop_size, spec.channels)
    method.attach(model)
    counter = FakeMemoryCounter()
    gpu = GPUKernels(recipe.precision in AUTOCAST) if device_type == "cuda" else contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), counter, gpu:
        for module in (model, method):
            module.to_empty(device="cpu")
        step = TrainingStep(recipe_per_process(recipe, world_size), spec, method, model)
        weights = step.state.stepper.parameters if world_size > 1 else []
        buckets = [torch.empty_like(weight) for weight in weights]  # of DDP
        step.init_optimizer()
        step.run(1)
        persistent = step.persistent() | {"DDP's buckets": total_bytes(buckets)}
    return StepMemory(counter.peak, persistent)


class MemoryCounter(TorchDispatchMode):
    """Counts the memory of tensors; workspaces inside of kernels are not seen.

    Attributes:
        moved: bytes of the inputs and outputs of all operations, without views.
        peak: maximum of the bytes of all storages that were created in this context and exist at the same time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.peak = self.alive = 0
        self.storages: dict[int, int] = {}  # address of the object (a fake tensor has no data) -> bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not func.is_view:
            self.moved += sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in inputs + outputs)
        for storage in (tensor.untyped_storage() for tensor in outputs):
            if storage._cdata not in known:
                self.add(storage)
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self.storages:  # two outputs share it
            return
        self.storages[address] = size
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.remove, address)

    def remove(self, address: int) -> None:
        self.alive -= self.storages.pop(address)


class FakeMemoryCounter(MemoryCounter):
    """MemoryCounter for fake tensors, where reading a number gives 0 and a condition False."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False
        return super().__torch_dispatch__(func, types, args, kwargs)


class GPUKernels(TorchFunctionMode):
    """Emulates on CPU tensors what differs on a GPU: fused attention, which stores no attention map, and float32 in
    LayerNorm and softmax under autocast.
    """

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.mixed = mixed

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.is_cpu.__get__:
            return False
        if func is F.scaled_dot_product_attention:
            dtype = torch.get_autocast_dtype("cpu") if self.mixed else args[0].dtype
            return KernelAttention.apply(*(each.to(dtype) for each in args[:3]))
        if torch.is_autocast_enabled("cpu") and func in (F.layer_norm, F.softmax, Tensor.softmax, torch.softmax):
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)


class KernelAttention(torch.autograd.Function):
    """Allocates the tensors of a fused attention: the output, the logsumexp of the rows, and three gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def measure_step(recipe: Recipe, spec: DatasetSpec, method: Method, device: torch.device) -> StepMemory:
    """Measure this process in two real steps, by torch's allocator on a GPU, else by counting tensors."""
    counter, steps = MemoryCounter(), []

    def run() -> None:
        model = build_model(recipe.model, spec.num_classes, recipe.data.crop_size, spec.channels).to(device)
        method.attach(model)
        steps.append(TrainingStep(recipe_per_process(recipe, 1), spec, method, model))
        for number in range(STEPS):
            steps[0].run(number)

    if device.type == "cuda":
        return StepMemory(allocator_peak(run, device), steps[0].persistent())
    with counter:
        run()
    return StepMemory(counter.peak, steps[0].persistent())


def allocator_peak(run: Callable[[], object], device: torch.device) -> int:
    """Peak of torch's allocator during run(), in bytes beyond what was allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def resident_peak() -> int | None:
    """Peak of this process's main memory in bytes; None if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device_type: str) -> int | None:
    """Free bytes of the first GPU, or available main memory; None if unknown or there is no such device."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info(0)[0] if torch.cuda.is_available() else None
    return available_memory() or None


def main_memory() -> int:
    """Main memory of this machine in bytes; 0 if the system does not report it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def available_memory() -> int:
    """Available main memory in bytes, at most the limit of the container or Slurm job; 0 if it is unknown."""
    available = main_memory()
    if available:
        with contextlib.suppress(OSError, TypeError):  # Linux; page cache counts as available
            text = Path("/proc/meminfo").read_text(encoding="ascii")
            available = int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) * 1024
        for path in cgroup_limits():
            with contextlib.suppress(OSError, ValueError):  # "max": no limit
                available = min(available, int(path.read_text(encoding="ascii")))
    return available


def cgroup_limits() -> Iterator[Path]:
    """Files with the memory limits of this process's control group and its parents, in versions 1 and 2."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory"):
                root = Path("/sys/fs/cgroup") / controllers
                folder = root / group.lstrip("/")
                folders = (each for each in (folder, *folder.parents) if each.is_relative_to(root))
                yield from (each / ("memory.limit_in_bytes" if controllers else "memory.max") for each in folders)
