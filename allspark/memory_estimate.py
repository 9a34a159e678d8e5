"""What memory a training step takes: predicted by a step on tensors without content, and measured by real ones."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from allspark.bench.machine import memory_bytes
from allspark.bench.measure import Ledger, allocator_peak, aten
from allspark.config import Recipe
from allspark.data.batch import LabeledBatch, UnlabeledBatch
from allspark.data.spec import DatasetSpec
from allspark.engine.optim import build_optimizer
from allspark.engine.stepper import AUTOCAST, Stepper, autocast, pass_size
from allspark.methods import Method, Progress
from allspark.models.segmentor import Segmentor, build_model

GB = 1e9
STEPS = 2  # that are measured: from the second on all are alike


@dataclass(frozen=True)
class StepMemory:
    """Bytes. peak: of all tensors at their most; held: what stays from step to step, by name."""

    peak: int
    held: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in self.held.items() if size)
        rest = self.peak - sum(self.held.values())
        return f"{self.peak / GB:.2f} GB at its peak ({parts}, activations and the rest {rest / GB:.2f})"


class TrainingStep:
    """Steps of a recipe as train.py takes them in its last epoch, on random images.

    share: labeled images of a pass. passes: of a step; the later ones are alike, so two are the most that are taken.
    """

    def __init__(
        self, recipe: Recipe, spec: DatasetSpec, method: Method, model: Segmentor, share: int, passes: int = 1
    ) -> None:
        self.recipe, self.method, self.model, self.passes = recipe, method, model, min(passes, 2)
        self.size = (share, recipe.data.crop_size, recipe.data.crop_size)
        self.classes = spec.num_classes
        self.device = next(model.parameters()).device
        model.train()
        self.stepper = Stepper(model, build_optimizer(recipe.optim, model), recipe.precision, recipe.optim.clip_norm)

    def image(self) -> Tensor:
        batch, height, width = self.size
        return torch.randint(256, (batch, 3, height, width), dtype=torch.uint8, device=self.device)

    def batches(self) -> tuple[LabeledBatch, UnlabeledBatch | None]:
        views = self.method.views
        mask = torch.randint(self.classes, self.size, device=self.device)
        labeled = LabeledBatch(self.image(), mask).to(self.device)
        if not views.unlabeled:
            return labeled, None
        box = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        strong, boxes = tuple(self.image() for _ in views.strong), tuple(box.clone() for _ in views.strong)
        return labeled, UnlabeledBatch(self.image(), strong, ~box, boxes).to(self.device)

    def settle(self) -> None:
        """What a first step leaves: the optimizer's state."""
        for weight in self.model.parameters():
            weight.grad = torch.empty_like(weight)
        self.stepper.optimizer.step()
        self.stepper.optimizer.zero_grad()

    def run(self, step: int) -> None:
        progress = Progress(step, self.recipe.epochs - 1, STEPS)
        for _ in range(self.passes):
            labeled, unlabeled = self.batches()
            with autocast(self.recipe.precision, self.device):
                losses = self.method.losses(self.model, labeled, unlabeled, progress)
            self.stepper.backward(losses["loss"])
        self.stepper.step()
        self.method.after_step(self.model, progress)

    def held(self) -> dict[str, int]:
        state = [value for values in self.stepper.optimizer.state.values() for value in values.values()]
        return {
            "weights": size(self.model.parameters()),
            "optimizer": size(value for value in state if isinstance(value, Tensor)),
            "buffers, kept twice": size(self.model.buffers()) + size(self.stepper.kept),
            "teacher": size(self.method.state_dict().values()),
        }


def pass_and_passes(recipe: Recipe, processes: int) -> tuple[int, int]:
    """Labeled images of a pass, and the passes of a step."""
    images = pass_size(recipe, processes)
    return images, recipe.batch_size // processes // images


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def predict_step(
    recipe: Recipe, spec: DatasetSpec, method: Method, device_type: str = "cpu", processes: int = 1
) -> StepMemory:
    """Of each of `processes`, in seconds, on any machine: fake tensors have sizes, and nothing is computed.

    device_type cuda: with the kernels that a GPU takes. What these keep to themselves, the CUDA context and the
    allocator's gaps come on top.
    """
    model = build_model(recipe.model, spec.num_classes, recipe.data.crop_size)
    method.attach(model)
    ledger = Hollow()
    gpu = GPUKernels(recipe.precision in AUTOCAST) if device_type == "cuda" else contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), ledger, gpu:
        for module in (model, method):
            module.to_empty(device="cpu")
        step = TrainingStep(recipe, spec, method, model, *pass_and_passes(recipe, processes))
        buckets = [torch.empty_like(weight) for weight in model.parameters()] if processes > 1 else []  # of DDP
        step.settle()
        step.run(1)
        held = step.held() | {"DDP's buckets": size(buckets)}
    return StepMemory(ledger.peak, held)


class Hollow(Ledger):
    """The ledger of tensors without content: whatever number is asked for is 0, whatever condition False."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return False
        return super().__torch_dispatch__(func, types, args, kwargs)


class GPUKernels(TorchFunctionMode):
    """What differs on a GPU, on tensors that say they are on a CPU: attention in one kernel, which keeps no map, and
    under autocast LayerNorm and softmax in float32.
    """

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.mixed = mixed

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.is_cpu.__get__:
            return False
        if func is F.scaled_dot_product_attention:
            dtype = torch.get_autocast_dtype("cpu") if self.mixed else args[0].dtype
            return KernelAttention.apply(*(each.to(dtype) for each in args[:3]))
        if self.mixed and func in (F.layer_norm, F.softmax, Tensor.softmax, torch.softmax):
            args = (args[0].float(), *args[1:])
        return func(*args, **kwargs)


class KernelAttention(torch.autograd.Function):
    """The tensors of a fused attention: out and the rows' logsumexp; the backward pass has three gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def measure_step(recipe: Recipe, spec: DatasetSpec, method: Method, device: torch.device) -> StepMemory:
    """Of this process, by two real steps; on a GPU of torch's allocator, else of the tensors."""
    ledger, made = Ledger(), []

    def run() -> None:
        model = build_model(recipe.model, spec.num_classes, recipe.data.crop_size).to(device)
        method.attach(model)
        made.append(TrainingStep(recipe, spec, method, model, *pass_and_passes(recipe, 1)))
        for number in range(STEPS):
            made[0].run(number)

    if device.type == "cuda":
        return StepMemory(allocator_peak(run, device), made[0].held())
    with ledger:
        run()
    return StepMemory(ledger.peak, made[0].held())


def resident_peak() -> int | None:
    """Bytes of main memory that this process had at its most; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def room(device_type: str) -> int | None:
    """Bytes that are free on this machine's first GPU, or its main memory; None where there is no such device."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info(0)[0] if torch.cuda.is_available() else None
    return memory_bytes() or None
