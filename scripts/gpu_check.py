"""Check AllSpark on one NVIDIA GPU: correctness against the CPU, training end to end, and speed, within 8 minutes.

    python scripts/gpu_check.py --out DIR [--only a1,c] [--budget 450]

One line per check; DIR/gpu_check.json is rewritten after each of them. The exit code is the number of failed checks.
Wheels in .wheels/ (pip download --no-deps) are used where a package is missing. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / ".wheels"
if WHEELS.is_dir():
    site = Path(tempfile.gettempdir()) / "allspark_wheels"
    for wheel in WHEELS.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(site)
    sys.path.append(str(site))
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in (str(ROOT), *sys.path[-1:]) if path)

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from allspark.bench.machine import copy_rate, matrix_rate
from allspark.bench.step import StepBatch, StepCase, our_side, plain_side
from allspark.build import build_method, complete
from allspark.config_io import load_recipe
from allspark.cuda_graph import build_graphs
from allspark.data.batch import LabeledBatch, UnlabeledBatch
from allspark.data.datasets import spec_for
from allspark.device import choose_device
from allspark.engine.checkpoint import Position
from allspark.engine.optim import build_optimizer
from allspark.engine.stepper import Stepper, autocast, set_deterministic, set_precision
from allspark.evaluation.evaluate import predict, predict_tiled
from allspark.evaluation.sliding_window import inference_for
from allspark.losses import OHEM
from allspark.memory_estimate import allocator_peak, predict_step
from allspark.models import attention
from allspark.models.memory import SemanticMemory, group_channels
from allspark.models.segmentor import build_model
from allspark.models.sync_batch_norm import SyncBatchNorm
from allspark.train_step import TrainState, train_step

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


# ---------------------------------------------------------------------------------------------------------------------
# A training step of any method on random images


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


# ---------------------------------------------------------------------------------------------------------------------
# A. It runs and is right


def a1_environment(out: Path, found: dict[str, Any]) -> None:
    major, minor = torch.cuda.get_device_capability(0)
    found |= {
        "device": str(choose_device("auto")),
        "gpu": torch.cuda.get_device_name(0),
        "architecture": f"sm_{major}{minor}",
        "architectures": torch.cuda.get_arch_list(),
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "nccl": torch.distributed.is_nccl_available(),
        "compiler": shutil.which("gcc") or shutil.which("cc"),
    }
    require(found["device"] == "cuda:0" and found["bf16"] and found["nccl"], str(found))
    require(f"sm_{major}{minor}" in found["architectures"], "the wheel has no code for this card")


def reference_attention(q: Tensor, k: Tensor, v: Tensor, present: Tensor | None) -> Tensor:
    """Normalized similarities, softmax, weighted values, in the order in which the paper writes them; float64."""
    scores = q.transpose(1, 2) @ k.t()  # (B, Cq, M)
    seen = scores if present is None else scores[..., present.cpu().nonzero()[:, 0].to(scores.device)]
    scores = (scores - seen.mean((1, 2), keepdim=True)) / (seen.var((1, 2), False, keepdim=True) + attention.EPS).sqrt()
    if present is not None:
        scores = scores.masked_fill(~present, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def a2_attention(out: Path, found: dict[str, Any]) -> None:
    """The attention to the memory against float64 on the same device, for all dtypes; gradients, too."""
    errors: dict[str, float] = {}
    for classes, cells, kind, dtype in itertools.product(
        (21, 81), (9, 289), ("all", "half", "one"), (torch.float32, torch.bfloat16, torch.float16)
    ):
        generator, channels = torch.Generator().manual_seed(classes + cells), 512
        q = torch.randn(1, cells, 128, generator=generator).to(GPU)
        k, v = (torch.randn(classes * channels, cells, generator=generator).to(GPU) for _ in range(2))
        grad = torch.randn(q.shape, generator=generator).to(GPU)
        present = None
        if kind != "all":
            chosen = torch.arange(classes) % 2 == 0 if kind == "half" else torch.arange(classes) == classes // 2
            present = chosen.repeat_interleave(channels).to(GPU)
            k, v = k * present[:, None], v * present[:, None]
        given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        wanted = [x.detach().double().requires_grad_() for x in given]
        attended = attention.shared_channel_attention(*given, 0.0, present)
        truth = reference_attention(*wanted, present)
        attended.backward(grad.to(dtype))
        truth.backward(grad.to(dtype).double())
        pairs = [(attended, truth), *((a.grad, b.grad) for a, b in zip(given, wanted, strict=True))]
        error = max(relative(a, b) for a, b in pairs)
        errors[f"K={classes} N={cells} {kind} {str(dtype)[6:]}"] = error
        require(error <= (1e-4 if dtype == torch.float32 else 2e-2), f"{list(errors)[-1]}: {error:.1e}")
        if present is not None and (~present).any():
            require(given[2].grad[~present].abs().max().item() == 0, "absent values get a gradient")
    found |= {"largest": max(errors.values()), "errors": errors}


def a3_dropout(out: Path, found: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 9, 64, device=GPU), torch.randn(512, 9, device=GPU), torch.randn(512, 9, device=GPU)
    full = attention.shared_channel_attention(q, k, v, 0.0)
    draws = [attention.shared_channel_attention(q, k, v, 0.1) for _ in range(512)]
    error = relative(torch.stack(draws).mean(0), full)
    spread = torch.stack(draws).std(0).mean().item()
    require(error < 0.05 and spread > 0, f"mean of the draws is {error:.3f} off, spread {spread}")
    found |= {"error_of_mean": error, "spread": spread}


def a4_cpu_equals_cuda(out: Path, found: dict[str, Any]) -> None:
    """One step with the same weights, images and random numbers on both devices."""
    worst: dict[str, Any] = {}
    problems = []
    for method, bottleneck in CASES:
        pair: list[tuple[Trainer, dict[str, float]]] = []
        start: dict[str, Any] = {}
        for device in (CPU, GPU):
            trainer = Trainer(method, bottleneck, device, **NO_DROPOUT)
            if pair:
                trainer.load(start)
            start = start or copy.deepcopy(trainer.content())
            with DrawnOnCPU():
                torch.manual_seed(1)
                losses = trainer.step(trainer.batch())
            pair.append((trainer, {name: value.item() for name, value in losses.items()}))
        (on_cpu, losses), (on_gpu, theirs) = pair
        loss = max(abs(theirs[name] - value) / max(abs(value), 1e-3) for name, value in losses.items())
        norm = relative(on_gpu.stepper.norm, on_cpu.stepper.norm)
        name = f"{method} {bottleneck}"
        worst[name] = {"loss": loss, "norm": norm}
        if loss > 1e-4 or norm > 1e-3:
            problems.append(f"{name}: losses {loss:.1e}, gradient norm {norm:.1e}")
        for key, value in on_cpu.model.state_dict().items():
            other = on_gpu.model.state_dict()[key].cpu()
            if key.endswith("memory.queue"):
                equal = (value - other).abs().amax(-1).lt(1e-3).float().mean().item()
                worst[name]["equal_slots"] = equal
                if equal < 0.995:
                    problems.append(f"{name}: {equal:.4f} of the slots are equal")
            elif value.is_floating_point() and relative(other, value) > 1e-3 and (other - value).abs().max() > 1e-5:
                problems.append(f"{name}: {key} differs by {relative(other, value):.1e} after the step")
                break
    found |= {"cases": len(worst), "loss": max(w["loss"] for w in worst.values()), "all": worst}
    require(not problems, "; ".join(problems))


def a5_precisions(out: Path, found: dict[str, Any]) -> None:
    """tf32, bf16 and fp16 train like fp32; a batch with an infinity changes nothing."""
    problems, worst = [], 0.0
    for method, bottleneck in CASES:
        reference = None
        for precision in ("fp32", "tf32", "bf16", "fp16"):
            trainer = Trainer(method, bottleneck, precision=precision)
            losses = trainer.steps(2)
            reference = reference or losses
            apart = max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(losses, reference, strict=True))
            worst = max(worst, apart)
            if not apart < (0.1 if method in ("imas", "unimatch_v2", "maskmatch") else 0.05):
                problems.append(f"{method} {bottleneck} {precision}: {losses} {reference}")
            labeled, unlabeled = trainer.batch(7)
            labeled.image[0, 0, 0, 0] = math.inf
            before, skipped = digest(trainer.model.state_dict(), moments(trainer)), int(trainer.stepper.skipped)
            trainer.step((labeled, unlabeled), 2)
            if int(trainer.stepper.skipped) != skipped + 1:
                problems.append(f"{method} {bottleneck} {precision}: a poisoned step was not counted")
            if digest(trainer.model.state_dict(), moments(trainer)) != before:
                problems.append(f"{method} {bottleneck} {precision}: a poisoned step changed the network")
    found["largest_difference"] = worst
    require(not problems, "; ".join(problems))


def moments(trainer: Trainer) -> list[Tensor]:
    """What the optimizer keeps of each weight, but for counts of steps."""
    states = trainer.stepper.optimizer.state.values()
    return [value for state in states for name, value in state.items() if name != "step" and isinstance(value, Tensor)]


def a6_no_wait(out: Path, found: dict[str, Any]) -> None:
    """The host never waits for the device inside a step."""
    waits = {}
    for (method, bottleneck), precision in itertools.product(CASES, ("fp32", "bf16")):
        trainer = Trainer(method, bottleneck, precision=precision)
        trainer.step(trainer.batch())
        batch = trainer.batch(1)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.step(batch, 1)
        except RuntimeError as error:
            waits[f"{method} {bottleneck} {precision}"] = str(error).splitlines()[0][:100] + " " + place(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    unexpected = [name for name in waits if name.split()[0] not in WAITS]
    require(not unexpected, f"{unexpected}: {waits}")
    found["waits"] = waits


def place(error: BaseException) -> str:
    """Where in this project an error was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "allspark" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def a7_evaluation(out: Path, found: dict[str, Any]) -> None:
    """Predictions of both devices by every way of evaluating."""
    trainers = [Trainer("fixmatch", "allspark", device, crop=129) for device in (CPU, GPU)]
    for trainer in trainers:
        trainer.model.load_state_dict(trainers[0].model.state_dict())
    spec, agreed, total, shares = trainers[0].spec, 0, 0, {}
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(256, (4, 3, 17, 22), generator=generator).float()
    images = F.interpolate(coarse, (200, 260), mode="bilinear").byte()
    ways = [(mode, {}) for mode in ("whole", "sliding_window", "center_crop")]
    ways.append(("whole", {"scales": (0.75, 1.25), "flip": True}))
    for mode, options in [*ways, ("strips", {})]:
        both = []
        inference = inference_for(spec, 129, mode="sliding_window" if mode == "strips" else mode, **options)
        for trainer, device in zip(trainers, (CPU, GPU), strict=True):
            predictor = trainer.method.predictor(trainer.model).eval()
            with torch.no_grad():
                if mode == "strips":
                    labels = predict_tiled(predictor, images[:1], spec, device, inference, ["image"])[0]
                else:
                    labels = predict(predictor, images, spec, device, inference, ["image"])
            both.append(labels.cpu())
        same = (both[0] == both[1]).sum().item()
        shares[f"{mode} {options or ''}".strip()] = same / both[0].numel()
        agreed, total = agreed + same, total + both[0].numel()
    require(agreed / total >= 0.999, str(shares))
    found |= {"equal_pixels": agreed / total, **shares}


def train(out: Path, name: str, *argv: str, check: int | None = 0, **options: Any) -> subprocess.CompletedProcess:
    """train.py on shapes with 16 labeled images, in a process of its own."""
    words = ["--dataset", "shapes", "--split", "1_30", "--save-path", str(out / name), f"data.data_root={shapes()}"]
    command = [sys.executable, "train.py", *words, f"device={DEVICE}", *argv]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, **options)
    if check is not None:
        require(result.returncode == check, f"{name}: exit code {result.returncode}: {result.stderr[-600:]}")
    return result


def shapes() -> Path:
    """The shapes data set, which a process begins to draw when this script starts."""
    folder = Path(tempfile.gettempdir()) / "allspark_shapes"
    while drawing is not None and drawing.poll() is None:
        time.sleep(0.2)
    return folder


drawing: subprocess.Popen | None = None


def draw_shapes() -> None:
    global drawing
    code = "from pathlib import Path; from allspark.data.datasets.shapes import generate; import sys"
    code += "; generate(Path(sys.argv[1]))"
    folder = Path(tempfile.gettempdir()) / "allspark_shapes"
    drawing = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


SHORT = ("epoch_of=labeled", "epochs=3", "burn_in_epochs=1", "evaluation.interval=3", "log_interval=1")


def a8_train(out: Path, found: dict[str, Any]) -> None:
    """train.py with workers, fixmatch with the bottleneck, fp32 and bf16; memory against the prediction."""
    for precision in ("fp32", "bf16"):
        words = ("--method", "fixmatch", "model.bottleneck=allspark", f"precision={precision}", "data.num_workers=4")
        train(out, f"train_{precision}", *words, *SHORT, "warmup_epochs=1")
        scores = [line["miou"] for line in metrics(out / f"train_{precision}") if "miou" in line]
        require(bool(scores) and scores[-1] > 0, f"{precision}: mIoU {scores}")
        found[precision] = scores


def a9_resume(out: Path, found: dict[str, Any]) -> None:
    """Stopped by SIGTERM and started again; from CUDA to the CPU and back."""
    words = ("--method", "selftrain", "model.bottleneck=allspark", *SHORT, "checkpoint_interval=2", "epochs=40")
    command = [sys.executable, "train.py", "--dataset", "shapes", "--split", "1_30", f"data.data_root={shapes()}"]
    command += ["--save-path", str(out / "resume"), f"device={DEVICE}", "evaluation.interval=40", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "resume" / "latest.pth").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, errors = process.wait(60), process.stderr.read()
    require(code == 75, f"SIGTERM gave exit code {code}: {errors[-400:]}")
    first = torch.load(out / "resume" / "latest.pth", weights_only=True)["step"]
    steps = [first]
    for device in ("cpu", DEVICE):
        process = subprocess.Popen(
            [*command, f"device={device}"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        deadline, step = time.monotonic() + 60, steps[-1]
        while step < steps[-1] + 2 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
            with contextlib.suppress(Exception):
                step = torch.load(out / "resume" / "latest.pth", weights_only=True)["step"]
        process.send_signal(signal.SIGTERM)
        code, errors = process.wait(60), process.stderr.read()
        require(code == 75, f"on {device}: exit code {code}: {errors[-400:]}")
        steps.append(torch.load(out / "resume" / "latest.pth", weights_only=True)["step"])
    require(steps == sorted(set(steps)), f"steps {steps}")
    found["steps"] = steps


def a10_determinism(out: Path, found: dict[str, Any]) -> None:
    """deterministic=true: the same bits twice, and again when resumed in the middle."""
    problems = []
    for (method, bottleneck), precision in itertools.product(
        (("fixmatch", "allspark"), ("fixmatch_r50", "none")), ("fp32", "bf16")
    ):
        name, digests = f"{method} {bottleneck} {precision}", []
        for _ in range(2):
            trainer = Trainer(method, bottleneck, precision=precision, deterministic=True)
            trainer.steps(8)
            digests.append(digest(trainer.content()))
        trainer = Trainer(method, bottleneck, precision=precision, deterministic=True)
        trainer.steps(4)
        state = trainer.content()
        resumed = Trainer(method, bottleneck, precision=precision, deterministic=True)
        resumed.load(state)
        resumed.steps(4, first=4)
        digests.append(digest(resumed.content()))
        found[name] = [each[:8] for each in digests]
        if len(set(digests)) > 1:
            problems.append(f"{name}: {found[name]}")
    set_deterministic(False)
    require(not problems, "; ".join(problems))


# ---------------------------------------------------------------------------------------------------------------------
# B. Processes


def b1_ddp(out: Path, found: dict[str, Any]) -> None:
    """DistributedDataParallel and SyncBatchNorm over NCCL with a world of one, against a step without them."""
    store = dist.FileStore(str(out / "store"), 1)
    problems = []
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=GPU)
    try:
        for method, bottleneck in CASES:
            losses = []
            for wrapped in (False, True):
                trainer = Trainer(method, bottleneck, **NO_DROPOUT)
                if wrapped:
                    model = SyncBatchNorm.convert(trainer.model)
                    network = DistributedDataParallel(model, device_ids=[0], broadcast_buffers=False)
                    trainer.state = replace(trainer.state, network=network)
                losses.append(trainer.steps(2))
            apart = max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(*losses, strict=True))
            if not apart < 1e-3:
                problems.append(f"{method} {bottleneck}: {losses}")
    finally:
        dist.destroy_process_group()
    found["cases"] = len(CASES)
    require(not problems, "; ".join(problems))


def b3_sync_batch_norm(out: Path, found: dict[str, Any]) -> None:
    """Our SyncBatchNorm against BatchNorm2d in a world of one, values, gradients and buffers, without a host sync."""
    store = dist.FileStore(str(out / "store_b3"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=GPU)
    try:
        torch.manual_seed(0)
        plain = nn.BatchNorm2d(16).to(GPU)
        nn.init.normal_(plain.weight)
        synced = SyncBatchNorm.convert(nn.Sequential(copy.deepcopy(plain)))[0]
        x = 3 * torch.randn(4, 16, 33, 33, device=GPU) + 1
        results = []
        for norm in (plain, synced):
            given = x.clone().requires_grad_()
            norm(given)  # NCCL connects at its first call
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            value = norm(given)
            (value**2 * 0.5).sum().backward()
            torch.cuda.set_sync_debug_mode("default")
            results.append([value, given.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])
        found["errors"] = [relative(b, a) for a, b in zip(*results, strict=True)]
        require(max(found["errors"]) < 1e-4, str(found["errors"]))
    finally:
        dist.destroy_process_group()


def b2_too_many_processes(out: Path, found: dict[str, Any]) -> None:
    words = ["--dataset", "shapes", "--method", "supervised", "--split", "1_30", f"data.data_root={shapes()}"]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29611", "train.py"]
    command = [*run, *words, "--save-path", str(out / "two"), f"device={DEVICE}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    ours = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    require(result.returncode != 0 and len(set(ours)) == 1 and "GPU" in ours[0], f"{result.returncode}: {ours}")
    found |= {"exit": result.returncode, "message": ours}


def b4_out_of_memory(out: Path, found: dict[str, Any]) -> None:
    words = ("--method", "supervised", "data.crop_size=2049", "model.encoder=mit_b5", "batch_size=16", *SHORT)
    result = train(out, "memory", *words, "data.num_workers=8", check=None)
    tail = result.stderr.strip().splitlines()[-1:] or [""]
    require(result.returncode == 2 and "Traceback" not in result.stderr, f"exit {result.returncode}: {tail}")
    require("memory" in tail[0], tail[0])
    found["message"] = tail[0]


def b5_signal(out: Path, found: dict[str, Any]) -> None:
    """USR1, as slurm sends it before the time is up."""
    command = [sys.executable, "train.py", "--dataset", "shapes", "--split", "1_30", "--method", "fixmatch"]
    command += [
        f"data.data_root={shapes()}",
        "--save-path",
        str(out / "signal"),
        f"device={DEVICE}",
        *SHORT,
        "epochs=100",
    ]
    process = subprocess.Popen(
        [*command, "evaluation.interval=100"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
        log = out / "signal" / "metrics.jsonl"
        if log.exists() and '"step": 6' in log.read_text():
            break
    sent = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    code, errors = process.wait(60), process.stderr.read()
    require(code == 75 and (out / "signal" / "latest.pth").exists(), f"exit code {code}: {errors[-400:]}")
    found["seconds"] = time.monotonic() - sent


# ---------------------------------------------------------------------------------------------------------------------
# C. Speed


def c1_step(out: Path, found: dict[str, Any]) -> None:
    """AllSpark reading the memory, crop 513, 21 classes, against the plain formulation in float32."""
    found["rates"] = {precision: matrix_rate(GPU, precision) for precision in ("fp32", "tf32", "bf16")}
    found["rates"]["copy"] = copy_rate(GPU)
    for encoder, images in (("mit_b5", 2), ("mit_b5", 8), ("mit_b2", 2), ("mit_b2", 8)):
        case = StepCase(encoder=encoder, crop=513, batch=images)
        torch.manual_seed(0)
        with GPU:  # weights are drawn there, which is faster
            model = build_model(case.model, case.classes, case.crop)
        batch, rows = StepBatch.of(case, GPU), ["plain", "fp32 eager", "fp32", "tf32", "bf16 eager", "bf16"]
        for name in rows:
            precision, _, eager = name.partition(" ")
            set_precision("fp32" if name == "plain" else precision, GPU)
            with GPU:
                if name == "plain":
                    side = plain_side(case, model, batch)
                else:
                    side = our_side(case, model, precision, batch, cuda_graph=not eager and not NULL)
            row: dict[str, Any] = {"ms": timed(side.run, 5, 3 if name in rows[:2] else 8)}
            torch.cuda.synchronize()
            start, cpu = time.perf_counter(), time.process_time()
            side.run()
            row |= {"host_ms": (time.perf_counter() - start) * 1e3, "host_cpu_ms": (time.process_time() - cpu) * 1e3}
            row |= {"images_per_s": 2e3 * images / row["ms"], "peak_gb": allocator_peak(side.run, GPU) / 1e9}
            row["reserved_gb"] = torch.cuda.memory_reserved() / 1e9
            case_name = f"{encoder} {images}+{images}"
            found[f"{case_name} {name}"] = row
            row["ratio"] = found[f"{case_name} plain"]["ms"] / row["ms"]
            del side
            free_memory()
        del model, batch
        free_memory()


def c2_profile(out: Path, found: dict[str, Any]) -> None:
    """Kernels of one eager step of B5 in bf16."""
    case = StepCase(encoder="mit_b5", crop=513, batch=2)
    with GPU:
        model = build_model(case.model, case.classes, case.crop)
    batch = StepBatch.of(case, GPU)
    with GPU:
        side = our_side(case, model, "bf16", batch, cuda_graph=False)
    for _ in range(3):
        side.run()
    found |= profile(side.run, out / "profile_mit_b5_2_bf16.txt")


def c3_bottleneck(out: Path, found: dict[str, Any]) -> None:
    """Attention to the memory, forward and backward: ours against torch's fused kernels."""
    set_precision("fp32", GPU)
    for classes, images, dtype in itertools.product((21, 150), (2, 8), (torch.float32, torch.bfloat16)):
        rows, keys, cells = images * 1024, classes * 1024, 296
        q = torch.randn(rows, cells, device=GPU, dtype=dtype, requires_grad=True)
        k, v = (torch.randn(keys, cells, device=GPU, dtype=dtype, requires_grad=True) for _ in range(2))
        grad, row = torch.randn_like(q), {}
        for name, attend in (("ours", attention.attend), ("fused", fused_attention)):

            def run(attend: Callable = attend, given: tuple = (q, k, v), grad: Tensor = grad) -> None:
                attend(*given, 0.1).backward(grad)

            row[f"{name}_ms"] = timed(run, 2, 4)
            row[f"{name}_gb"] = allocator_peak(run, GPU) / 1e9
        found[f"K={classes} {images} {str(dtype)[6:]}"] = row
        free_memory()


def fused_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    heads = (x[None, None] for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, dropout_p=dropout, scale=1.0)[0, 0]


def c4_depthwise(out: Path, found: dict[str, Any]) -> None:
    for channels, side, dtype in itertools.product(
        (256, 512, 1280, 2048), (129, 65, 33, 17), (torch.float32, torch.bfloat16)
    ):
        if channels * side * side not in (256 * 129**2, 512 * 65**2, 1280 * 33**2, 2048 * 17**2):
            continue
        for name, layout in (("channels_last", torch.channels_last), ("nchw", torch.contiguous_format)):
            conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, device=GPU, dtype=dtype)
            x = torch.randn(4, channels, side, side, device=GPU, dtype=dtype).contiguous(memory_format=layout)
            x.requires_grad_()
            conv = conv.to(memory_format=layout)

            def run(conv: nn.Module = conv, x: Tensor = x) -> None:
                conv(x).sum().backward()

            found[f"{channels}x{side} {str(dtype)[6:]} {name}"] = timed(run, 2, 5)


def c5_attention(out: Path, found: dict[str, Any]) -> None:
    """The encoder's own attention by each backend; what a new image size costs."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    backends["efficient"] = SDPBackend.EFFICIENT_ATTENTION
    for name, backend in backends.items():
        try:
            with sdpa_kernel([backend]):
                shape = (4, 5, 1089, 64)
                q, k, v = (torch.randn(shape, device=GPU, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
                found[name] = timed(
                    lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v).sum().backward(), 2, 5
                )
                new = []
                for extra in range(10):
                    q, k, v = (
                        torch.randn(1, 5, 1100 + 7 * extra, 64, device=GPU, dtype=torch.bfloat16) for _ in range(3)
                    )
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    F.scaled_dot_product_attention(q, k, v)
                    torch.cuda.synchronize()
                    new.append((time.perf_counter() - start) * 1e3)
                found[f"{name} new shape"] = statistics.median(new)
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0][:120]


def c6_evaluation(out: Path, found: dict[str, Any]) -> None:
    """Whole images of forty sizes, bf16, the first time and again."""
    trainer = Trainer("supervised", crop=513, precision="bf16", **{"model.encoder": "mit_b2"})
    generator = torch.Generator().manual_seed(0)
    sizes = [(int(a), int(b)) for a, b in torch.randint(330, 501, (40, 2), generator=generator)]
    images = [torch.randint(256, (1, 3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    inference, rates = inference_for(trainer.spec, 513, mode="whole"), {}
    predictor = trainer.method.predictor(trainer.model).eval()
    for name in ("cold", "warm"):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad(), autocast("bf16", GPU):
            for image in images:
                predict(predictor, image, trainer.spec, GPU, inference, ["image"])
        torch.cuda.synchronize()
        rates[name] = len(images) / (time.perf_counter() - start)
    require(rates["cold"] >= 0.3 * rates["warm"], str(rates))
    found |= rates


def c7_compile(out: Path, found: dict[str, Any]) -> None:
    """compile=true on MiT-B0: the losses of eager mode, what it costs and gains."""
    losses = []
    for compiled in (False, True):
        words = {"compile": compiled, **NO_DROPOUT}
        trainer = Trainer("fixmatch", "allspark", precision="bf16", crop=257, images=4, **words)
        start = time.perf_counter()
        losses.append(trainer.steps(6))
        found[f"first_steps_s {compiled}"] = time.perf_counter() - start
        batch = trainer.batch()
        found[f"ms {compiled}"] = timed(lambda trainer=trainer, batch=batch: trainer.step(batch), 2, 10)
        found[f"profile {compiled}"] = profile(lambda trainer=trainer, batch=batch: trainer.step(batch))
    apart = max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(*losses, strict=True))
    require(apart < 2e-2, f"losses {losses}")
    found["losses_apart"] = apart


def c8_graph(out: Path, found: dict[str, Any]) -> None:
    """Steps replayed as CUDA graphs: the losses of eager steps, with dropout, teachers, skipped steps and fp16."""
    problems = []
    methods = ["fixmatch", "unimatch", "unimatch_v2", "maskmatch", "pseudoseg", "allspark", "allspark_revised"]
    cases = [(method, "allspark", "bf16") for method in methods]
    cases += [("supervised", "none", "fp32"), ("fixmatch_r50", "none", "fp16"), ("allspark", "allspark", "fp32")]
    cases += [("fixmatch", "none", "fp32 adamw")]
    for method, bottleneck, precision in cases:
        precision, _, optimizer = precision.partition(" ")
        name, losses, times = f"{method} {bottleneck} {precision}", [], []
        for cuda_graph in (False, True):
            options = {"cuda_graph": cuda_graph and not NULL, "optim.name": optimizer or "sgd"}
            trainer = Trainer(method, bottleneck, precision=precision, **options)
            values = trainer.steps(7)
            labeled, unlabeled = trainer.batch(7)
            labeled.image[0, 0, 0, 0] = math.inf
            before = digest(trainer.model.state_dict(), moments(trainer))
            trainer.step((labeled, unlabeled), 7)  # skipped
            if digest(trainer.model.state_dict(), moments(trainer)) != before:
                problems.append(f"{name}: a poisoned step changed the network, cuda_graph={cuda_graph}")
            losses.append(values + trainer.steps(3, first=8))
            if cuda_graph and not NULL and trainer.state.graphs.graph is None:
                problems.append(f"{name}: not captured")
            batch = trainer.batch()
            times.append(timed(lambda trainer=trainer, batch=batch: trainer.step(batch), 1, 5))
        apart = max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(*losses, strict=True))
        found[name] = {"apart": apart, "eager_ms": times[0], "graph_ms": times[1]}
        if not apart < (1e-5 if precision == "fp32" else 2e-2):  # atomic additions in half precision
            problems.append(f"{name}: {losses}")
    require(not problems, "; ".join(problems))


def c10_resnet(out: Path, found: dict[str, Any]) -> None:
    for method in ("fixmatch_r101", "unimatch_r101"):
        trainer = Trainer(method, precision="bf16", crop=321, images=8)
        batch = trainer.batch()
        run = lambda trainer=trainer, batch=batch: trainer.step(batch)  # noqa: E731
        found[method] = {"ms": timed(run, 3, 8), **profile(run, out / f"profile_{method}.txt")}
        del trainer, run
        free_memory()


def c11_parts(out: Path, found: dict[str, Any]) -> None:
    logits = torch.randn(2, 19, 801, 801, device=GPU, requires_grad=True)
    mask = torch.randint(19, (2, 801, 801), device=GPU)
    ohem = OHEM()
    memory = SemanticMemory(21, 512, 17).to(GPU)
    features, maps = torch.randn(2, 512, 17, 17, device=GPU), torch.randn(2, 21, 513, 513, device=GPU)
    classes = group_channels(features, maps)
    small = torch.randn(2, 19, 201, 201, device=GPU, requires_grad=True)
    found |= {
        "ohem": timed(lambda: ohem(logits, mask).backward()),
        "cross_entropy": timed(lambda: F.cross_entropy(logits, mask).backward()),
        "upsample": timed(lambda: F.interpolate(small, (801, 801), mode="bilinear").sum().backward()),
        "group_channels": timed(lambda: group_channels(features, maps)),
        "enqueue": timed(lambda: memory.enqueue(features.flatten(2), classes)),
    }


def c12_memory(out: Path, found: dict[str, Any]) -> None:
    """The predicted memory of a step against the allocator's."""
    problems = []
    for method, bottleneck, precision, encoder in (
        ("allspark", "allspark", "fp32", "mit_b5"),
        ("allspark", "allspark", "bf16", "mit_b5"),
        ("unimatch_r101", "none", "bf16", "resnet101"),
    ):
        options = {"model.encoder": encoder}
        trainer = Trainer(method, bottleneck, precision=precision, crop=321, images=2, **options)
        batch = trainer.batch()
        trainer.step(batch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        trainer.step(batch)
        real = torch.cuda.max_memory_allocated() / 1e9
        recipe, spec = trainer.recipe, trainer.spec
        del trainer, batch
        free_memory()
        predicted = predict_step(recipe, spec, build_method(recipe, spec), "cuda").peak / 1e9
        found[f"{method} {precision}"] = {"real_gb": real, "predicted_gb": predicted, "ratio": real / predicted}
        if real > 1.1 * predicted:
            problems.append(f"{method} {precision}: {real:.2f} GB, predicted {predicted:.2f}")
    require(not problems, "; ".join(problems))


def p_processes(out: Path, found: dict[str, Any]) -> None:
    """The checks that start processes of their own, at the same time."""
    checks = (a8_train, a9_resume, b2_too_many_processes, b4_out_of_memory, b5_signal)
    problems = []

    def run(check: Callable[[Path, dict[str, Any]], None]) -> None:
        name, numbers = check.__name__, {}
        try:
            check(out, numbers)
        except BaseException as error:
            problems.append(f"{name}: {type(error).__name__} {error}")
        found[name] = numbers

    shapes()
    threads = [threading.Thread(target=run, args=(check,)) for check in checks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    require(not problems, "; ".join(problems))


CHECKS: dict[str, tuple[Callable[[Path, dict[str, Any]], None], int]] = {  # name -> check, time limit in seconds
    "a1": (a1_environment, 20),
    "a2": (a2_attention, 30),
    "c8": (c8_graph, 60),
    "a10": (a10_determinism, 60),
    "c1": (c1_step, 130),
    "p": (p_processes, 110),
    "c12": (c12_memory, 40),
    "c3": (c3_bottleneck, 20),
    "b3": (b3_sync_batch_norm, 15),
    "b1": (b1_ddp, 50),
    "a3": (a3_dropout, 10),
    "a7": (a7_evaluation, 20),
    "c10": (c10_resnet, 30),
    "c2": (c2_profile, 30),
    "c6": (c6_evaluation, 30),
    "c11": (c11_parts, 15),
    "c4": (c4_depthwise, 20),
    "c5": (c5_attention, 20),
    "a4": (a4_cpu_equals_cuda, 90),
    "a6": (a6_no_wait, 60),
    "a5": (a5_precisions, 90),
    "c7": (c7_compile, 90),
}


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def machine() -> dict[str, Any]:
    query = "name,driver_version,clocks.sm,power.limit,memory.total"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    smi = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("nvidia-smi") else ""
    return {
        "gpu": torch.cuda.get_device_name(0),
        "smi": smi,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": None if NULL else torch.backends.cudnn.version(),
        "nccl": torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None,
        "cores": os.cpu_count(),
    }


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json and profiles")
    parser.add_argument("--only", help="names of checks, or their first letters, with commas between")
    parser.add_argument("--budget", type=float, default=450, help="seconds after which no check is started")
    args = parser.parse_args()
    start, out = time.monotonic(), args.out
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="gpu_check_"))
    result: dict[str, Any] = {"machine": machine(), "started": time.strftime("%Y-%m-%d %H:%M"), "checks": []}
    print(result["machine"], flush=True)
    draw_shapes()
    failed = 0
    for name, (check, limit) in CHECKS.items():
        if args.only and not re.fullmatch(
            "|".join(f"{only}.*" if only.isalpha() else only for only in args.only.split(",")), name
        ):
            continue
        left = args.budget - (time.monotonic() - start)
        began, verdict = time.monotonic(), "PASS"
        numbers: dict[str, Any] = {}
        if left < 10:
            verdict, numbers["why"] = "SKIP", "no time left"
        else:
            try:
                with time_limit(min(limit, int(left))):
                    check(out if name in ("c2", "c10") else work, numbers)
            except Failed as error:
                verdict, numbers["why"] = "FAIL", str(error)
            except BaseException as error:
                last = "".join(traceback.format_exception(error)).strip().splitlines()
                verdict = "FAIL"
                numbers |= {"why": f"{type(error).__name__}: {error}"[:600], "trace": last[-12:]}
        torch.cuda.set_sync_debug_mode("default")
        free_memory()
        failed += verdict == "FAIL"
        seconds = time.monotonic() - began
        result["checks"].append(
            {"name": name, "verdict": verdict, "seconds": round(seconds, 1), "numbers": rounded(numbers)}
        )
        (out / "gpu_check.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
        text = json.dumps(rounded(numbers), default=str)
        print(f"{verdict} {name} {check.__name__} {seconds:.1f} s {text[:700]}", flush=True)
    shutil.rmtree(work, ignore_errors=True)
    print(f"{failed} failed, {time.monotonic() - start:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
